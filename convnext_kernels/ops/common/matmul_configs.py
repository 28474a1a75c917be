"""Launch configurations of the matrix product: data, and the rule that picks among them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from convnext_kernels.ops.common.launch import float32_precision


@dataclass(frozen=True)
class MatmulConfig:
    """Tile of a program and its pipeline."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


# 128x128 of float32 accumulators is 64 registers a thread with 8 warps; three stages of 64-deep 16-bit tiles take 97 KB
# of shared memory on sm_90, and 64 KB on sm_80, within the 99 KB of its smaller sisters.
WIDE = MatmulConfig(block_m=128, block_n=128, block_k=64, warps=8, stages=3)
# Half the accumulators, for few columns and for what needs registers beside them. On sm_80 WIDE takes 255 registers and
# spills with the derivative's epilogue (200 bytes), patches as output (5 KB), scaled operands (8) or 24 channels (152).
NARROW = MatmulConfig(block_m=128, block_n=64, block_k=64, warps=8, stages=3)
TF32 = MatmulConfig(block_m=64, block_n=64, block_k=32, warps=8, stages=2)
# float32 in full precision has no matrix instruction: operands and products stay in registers, so tiles are small. With
# TF32's, sums over tokens spill 72 bytes on sm_80; half as deep instead of half as wide, 8 on sm_90.
FLOAT32 = MatmulConfig(block_m=64, block_n=32, block_k=32, warps=8, stages=2)

# Split reductions aim at this many programs: four for each of the 132 multiprocessors of an H200.
SPLIT_PROGRAMS = 512
# A split shorter than this costs more in its partial result than it gains in parallelism.
MINIMUM_SPLIT = 512


def matmul_config(columns: int, dtype: torch.dtype, needs_registers: bool) -> MatmulConfig:
    """The configuration for an output of so many columns.

    Args:
        needs_registers: the product has a prologue, multiplies by a derivative, stores patches or, for want of
            alignment, loads element by element.
    """
    if dtype == torch.float32:
        return FLOAT32 if float32_precision() == "ieee" else TF32
    return NARROW if columns <= 64 or needs_registers else WIDE


def split_count(rows: int, columns: int, inner: int, config: MatmulConfig) -> int:
    """In how many parts a product with a long inner dimension is summed; from the shape alone, so runs agree."""
    tiles = -(-rows // config.block_m) * -(-columns // config.block_n)
    return max(1, min(-(-inner // MINIMUM_SPLIT), SPLIT_PROGRAMS // tiles))
