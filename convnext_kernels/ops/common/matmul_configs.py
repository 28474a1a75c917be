"""Launch configurations of the matrix product: data, and the rule that picks among them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from convnext_kernels.ops.common.launch import float32_precision
from convnext_kernels.ops.common.tuning import Tunable


@dataclass(frozen=True)
class MatmulConfig:
    """Tile of a program and its pipeline; the most registers that a thread may take, if not as many as it wants."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    registers: int | None = None


# 128x128 of float32 accumulators is 64 registers a thread with 8 warps; three stages of 64-deep 16-bit tiles take 97 KB
# of shared memory on sm_90, and 64 KB on sm_80, within the 99 KB of its smaller sisters.
WIDE = MatmulConfig(block_m=128, block_n=128, block_k=64, warps=8, stages=3)
# Half the accumulators, for few columns and for what needs registers beside them. On sm_80 WIDE takes 255 registers and
# spills with the derivative's epilogue (200 bytes), patches as output (5 KB), scaled operands (8) or 24 channels (152).
NARROW = MatmulConfig(block_m=128, block_n=64, block_k=64, warps=8, stages=3)
# Half as deep where there may be two products in one: their 74 KB on sm_90 leave room for a second program beside the
# first, to multiply during its epilogue, and 96 channels are three whole steps.
SHALLOW = MatmulConfig(block_m=128, block_n=64, block_k=32, warps=8, stages=3)
SHALLOW_INNER = 256
TF32 = MatmulConfig(block_m=64, block_n=64, block_k=32, warps=8, stages=2)
# float32 in full precision has no matrix instruction: operands and products stay in registers, so tiles are small. With
# TF32's, sums over tokens spill 72 bytes on sm_80; half as deep instead of half as wide, 8 on sm_90.
FLOAT32 = MatmulConfig(block_m=64, block_n=32, block_k=32, warps=8, stages=2)

# With 128 registers a thread two programs of 8 warps fit on a multiprocessor.
TWO_PROGRAMS = 128
# Twice the tile: three quarters of WIDE's bytes from L2.
BROAD = MatmulConfig(block_m=128, block_n=256, block_k=32, warps=8, stages=4)
# Candidates may spill, BROAD 160 bytes with a residual on sm_90: what that costs is measured.
NARROW_CANDIDATES = [
    NARROW,
    SHALLOW,
    replace(NARROW, registers=TWO_PROGRAMS),
    MatmulConfig(block_m=128, block_n=64, block_k=64, warps=8, stages=4),
    MatmulConfig(block_m=128, block_n=64, block_k=32, warps=8, stages=4),
    MatmulConfig(block_m=64, block_n=128, block_k=64, warps=8, stages=3),
    MatmulConfig(block_m=64, block_n=64, block_k=64, warps=4, stages=4),
]
WIDE_CANDIDATES = [
    replace(WIDE, registers=TWO_PROGRAMS),
    MatmulConfig(block_m=128, block_n=128, block_k=64, warps=8, stages=4),
    MatmulConfig(block_m=128, block_n=128, block_k=32, warps=8, stages=4),
    MatmulConfig(block_m=64, block_n=256, block_k=64, warps=8, stages=3),
]
TF32_CANDIDATES = [
    MatmulConfig(block_m=64, block_n=64, block_k=32, warps=4, stages=3),
    MatmulConfig(block_m=64, block_n=64, block_k=32, warps=8, stages=3),
    MatmulConfig(block_m=128, block_n=64, block_k=32, warps=8, stages=3),
    MatmulConfig(block_m=128, block_n=32, block_k=32, warps=8, stages=3),
]
# 32x32 with 4 warps spill 8 bytes with sums of rows on sm_90.
FLOAT32_CANDIDATES = [
    MatmulConfig(block_m=32, block_n=64, block_k=32, warps=8, stages=2),
    MatmulConfig(block_m=64, block_n=32, block_k=16, warps=8, stages=2),
]

# Split reductions aim at this many programs: four for each of the 132 multiprocessors of an H200.
SPLIT_PROGRAMS = 512
# A split shorter than this costs more in its partial result than it gains in parallelism.
MINIMUM_SPLIT = 512


TF32_BITS = 19


def operand_bits(dtype: torch.dtype) -> int:
    """How many bits of an operand's elements the product multiplies: 16, TF32's 19 or 32, as PyTorch is set."""
    if dtype != torch.float32:
        return 16
    return 32 if float32_precision() == "ieee" else TF32_BITS


def _deep_config(columns: int, bits: int, needs_registers: int) -> MatmulConfig:
    if bits != 16:
        return TF32 if bits == TF32_BITS else FLOAT32
    return NARROW if columns <= 64 or needs_registers else WIDE


def matmul_config(columns: int, inner: int, bits: int, needs_registers: int) -> MatmulConfig:
    """The configuration for an output of so many columns.

    Args:
        bits: `operand_bits`.
        needs_registers: 1 if the product has a prologue, multiplies by a derivative, stores patches or, for want of
            alignment, loads element by element; else 0.
    """
    if bits == 16 and needs_registers and inner <= SHALLOW_INNER:
        return SHALLOW
    return _deep_config(columns, bits, needs_registers)


def _tiles(columns: int, bits: int, needs_registers: int) -> list[MatmulConfig]:
    if bits != 16:
        return TF32_CANDIDATES if bits == TF32_BITS else FLOAT32_CANDIDATES
    wide = WIDE_CANDIDATES if columns > 64 else []
    broad = [BROAD] if columns >= BROAD.block_n and not needs_registers else []
    return [*wide, *NARROW_CANDIDATES, *broad]


def matmul_candidates(columns: int, inner: int, bits: int, needs_registers: int) -> list[MatmulConfig]:
    """Other shapes of the tile, depths, numbers of stages and of registers."""
    found = _tiles(columns, bits, needs_registers)
    if bits == 16 and needs_registers and inner <= SHALLOW_INNER:
        # Where they may be two products in one, larger tiles want more shared memory than there is, 241 KB on sm_90.
        return [tile for tile in found if (tile.block_m + tile.block_n) * tile.block_k * tile.stages <= 49152]
    return found


def long_matmul_config(rows: int, columns: int, bits: int, needs_registers: int) -> MatmulConfig:
    """For an inner dimension of tokens: as `matmul_config` for a deep one, whatever the number of rows."""
    return _deep_config(columns, bits, needs_registers)


def long_matmul_candidates(rows: int, columns: int, bits: int, needs_registers: int) -> list[MatmulConfig]:
    """As `matmul_candidates`."""
    return _tiles(columns, bits, needs_registers)


MATMUL = Tunable("common.matmul", matmul_config, matmul_candidates)
LONG_MATMUL = Tunable("common.long_matmul", long_matmul_config, long_matmul_candidates)


def split_count(rows: int, columns: int, inner: int, config: MatmulConfig) -> int:
    """In how many parts a product with a long inner dimension is summed; from the shape alone, so runs agree."""
    tiles = -(-rows // config.block_m) * -(-columns // config.block_n)
    return max(1, min(-(-inner // MINIMUM_SPLIT), SPLIT_PROGRAMS // tiles))
