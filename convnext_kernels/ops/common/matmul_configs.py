"""Launch configurations of the matrix product: data, and the rule that picks among them.

No tile has been measured by us. They follow the instructions of the compiled kernels and what others measured: vLLM's
tuned tables of a product with plain loads as ours (fused_moe, one expert) take 128x128x64 with 4 warps on an A100 from
1536 rows on (1792 and 3584 wide), 128x256x64 with 8 on an H100 from 5120 (3072 wide).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum

import torch

from convnext_kernels.backends import interpreting, release
from convnext_kernels.ops.common.launch import float32_precision
from convnext_kernels.ops.common.tuning import Tunable


@dataclass(frozen=True)
class MatmulConfig:
    """Tile of a program and its pipeline; the most registers that a thread may take, if not as many as it wants; and
    how many bytes of a row the epilogue stores at a time."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    registers: int | None = None
    part_bytes: int = 128


class Kind(IntEnum):
    """What a product's tile depends on beside its shape: which registers it needs beside its sums."""

    PLAIN = 0
    PATCHES = 1
    """An operand is the patches of images."""
    SCALED = 2
    """An operand is scaled as it is read, for each image."""
    DERIVATIVE = 3
    """The product is multiplied by an activation's derivative."""
    RECOMPUTED = 4
    """And what that is taken at is a second product."""
    ELEMENTS = 5
    """It stores patches, or a size is no multiple of 16: Triton reads and writes element by element."""


# With 128 registers a thread two programs of 8 warps fit on a multiprocessor.
TWO_PROGRAMS = 128

# sm_90 and sm_100: matrix instructions read shared memory, and what limits is what comes from L2, less for large tiles.
# 128x128 of float32 accumulators is 64 registers a thread with 8 warps; three stages of 64-deep 16-bit tiles take 97 KB
# of shared memory, so that one program multiplies during the epilogue of the other.
WIDE = MatmulConfig(block_m=128, block_n=128, block_k=64, warps=8, stages=3)
# Twice the tile, three quarters of the bytes, alone on its multiprocessor: where the loop is long beside the epilogue.
# On sm_100 TALL spills up to 280 bytes: not there. Its epilogue spills 152 with 128 bytes of a row at a time.
BROAD = MatmulConfig(block_m=128, block_n=256, block_k=64, warps=8, stages=3)
TALL = MatmulConfig(block_m=256, block_n=128, block_k=64, warps=8, stages=3, part_bytes=64)
LONG_INNER = 1024
# Where an operand is scaled, which passes through registers: less often, the broader the tile. Half as deep, so that
# 128x256 takes 252 registers and of 128x128 two programs fit.
BROAD_SHALLOW = MatmulConfig(block_m=128, block_n=256, block_k=32, warps=8, stages=4)
WIDE_SHALLOW = MatmulConfig(block_m=128, block_n=128, block_k=32, warps=8, stages=4, registers=TWO_PROGRAMS)

# mma.sync, on all others: operands are loaded from shared memory, which takes 0.8 of the multiplication's clocks where
# a warp has 64x64 of the tile and 1.0 with 8 warps. Of these two programs fit on a multiprocessor, of 255 registers and
# in 100 KB of shared memory; of 8 warps one.
WIDE_OF_4 = MatmulConfig(block_m=128, block_n=128, block_k=32, warps=4, stages=4)
NARROW_OF_4 = MatmulConfig(block_m=128, block_n=64, block_k=32, warps=4, stages=3)

# Half the accumulators, for few columns and for what needs registers beside them. On sm_80 WIDE takes 255 registers and
# spills with patches as output (5 KB) or 24 channels (152).
NARROW = MatmulConfig(block_m=128, block_n=64, block_k=64, warps=8, stages=3)
# Half as deep for two products in one, whose 74 KB on sm_90 leave room for a second program beside the first, to
# multiply during its epilogue, and for few steps: 96 channels are three whole ones.
SHALLOW = MatmulConfig(block_m=128, block_n=64, block_k=32, warps=8, stages=3)
SHALLOW_INNER = 256
# Two products in one with mma.sync: 1.15 of the multiplication's clocks in shared memory, not 1.67, which limits where
# memory does not, from about 128 channels on.
FLAT_OF_4 = MatmulConfig(block_m=64, block_n=128, block_k=32, warps=4, stages=3)
FLAT_INNER = 128

# Of a derivative's epilogue, which reads the pre-activation and writes two results: with 128 up to 350 bytes spill
# where two programs are to fit, with 64 on sm_80 as many.
DERIVATIVE_BYTES = 64
DERIVATIVE_BYTES_OF_4 = 32

# Where there are few programs: four for each of WIDE's, with half the bytes each.
SMALL = MatmulConfig(block_m=64, block_n=64, block_k=64, warps=4, stages=4)
SMALL_SHALLOW = MatmulConfig(block_m=64, block_n=64, block_k=32, warps=4, stages=4)

# TF32: half the rate for twice the bytes. On sm_80 shared memory takes 1.15 of the multiplication's clocks, 1.4 where
# both operands are transposed; with 64x64 2.1 and 2.8, for what spills otherwise.
TF32_WIDE = MatmulConfig(block_m=128, block_n=128, block_k=32, warps=8, stages=3)
TF32_OF_4 = MatmulConfig(block_m=64, block_n=128, block_k=32, warps=4, stages=3)
TF32_SMALL = MatmulConfig(block_m=64, block_n=64, block_k=32, warps=4, stages=3)
TF32_OF_8 = MatmulConfig(block_m=64, block_n=64, block_k=32, warps=8, stages=2)

# float32 in full precision has no matrix instruction: operands and products stay in registers, so tiles are small. A
# thread has 32 of the products; with 8, as in the small tile, shared memory takes 1.6 of their clocks on sm_80 and 3.3
# on sm_90. Over tokens twice the depth spills 232 bytes.
FLOAT32 = MatmulConfig(block_m=64, block_n=64, block_k=32, warps=4, stages=2, part_bytes=256)
FLOAT32_LONG = MatmulConfig(block_m=64, block_n=64, block_k=16, warps=4, stages=2, part_bytes=256)
FLOAT32_SMALL = MatmulConfig(block_m=64, block_n=32, block_k=32, warps=8, stages=2)

# Candidates may spill: what that costs is measured.
CANDIDATES = [
    WIDE,
    replace(WIDE, registers=TWO_PROGRAMS),
    replace(WIDE, warps=4),
    WIDE_OF_4,
    replace(WIDE_OF_4, warps=8),
    NARROW,
    replace(NARROW, registers=TWO_PROGRAMS),
    NARROW_OF_4,
    SHALLOW,
    replace(SHALLOW, registers=TWO_PROGRAMS),
    replace(SHALLOW, stages=4),
    FLAT_OF_4,
    replace(FLAT_OF_4, block_k=64),
    WIDE_SHALLOW,
    SMALL,
    SMALL_SHALLOW,
]
BROAD_CANDIDATES = [BROAD, BROAD_SHALLOW]
TALL_CANDIDATES = [TALL, replace(TALL, part_bytes=128)]
TF32_CANDIDATES = [
    TF32_WIDE,
    TF32_OF_4,
    TF32_SMALL,
    TF32_OF_8,
    MatmulConfig(block_m=128, block_n=64, block_k=32, warps=4, stages=3),
    MatmulConfig(block_m=128, block_n=64, block_k=32, warps=8, stages=3),
]
FLOAT32_CANDIDATES = [
    FLOAT32,
    FLOAT32_LONG,
    FLOAT32_SMALL,
    MatmulConfig(block_m=128, block_n=64, block_k=16, warps=8, stages=2, part_bytes=256),
    MatmulConfig(block_m=64, block_n=32, block_k=16, warps=8, stages=2),
]

MULTIPROCESSORS = 128
"""About as many as an A100 (108) and an H200 (132) have."""

# Split reductions aim at four programs for each, fewer where a tile, and so a partial result, is larger than 128x128.
SPLIT_PROGRAMS = 4 * MULTIPROCESSORS
# A split shorter than this costs more in its partial result than it gains in parallelism.
MINIMUM_SPLIT = 512


TF32_BITS = 19


MINIMUM_TOKENS = 128
"""Of an image that a product scales: no tile has more rows there, so that it has parts of two images at most."""


def scales_operands(tokens_per_image: int, architecture: int) -> bool:
    """Whether a product scales images of so many tokens as it reads them; else that takes a pass of its own.

    On sm_90 a scaled operand is multiplied from registers, which the assembler of Triton before 3.9 gives to the next
    ones too early: loads into them come before the wait for the instruction that reads them.
    """
    too_early = architecture // 10 == 9 and not interpreting() and release("triton") < (3, 9)
    return tokens_per_image >= MINIMUM_TOKENS and not too_early


def operand_bits(dtype: torch.dtype) -> int:
    """How many bits of an operand's elements the product multiplies: 16, TF32's 19 or 32, as PyTorch is set."""
    if dtype != torch.float32:
        return 16
    return 32 if float32_precision() == "ieee" else TF32_BITS


def _tiles(rows: int, columns: int, config: MatmulConfig) -> int:
    return -(-rows // config.block_m) * -(-columns // config.block_n)


def few_programs(rows: int, columns: int) -> bool:
    """Whether tiles of 64x64 are at most one for each multiprocessor; Triton's interpreter has none of these.

    Where they are more, several share one, and read more from L2 than the larger tiles in their place.
    """
    return _tiles(rows, columns, SMALL) <= MULTIPROCESSORS and not interpreting()


def aligned(kind: Kind, *sizes: int) -> Kind:
    """The kind, or `Kind.ELEMENTS` where one of the sizes, those of rows in memory, is no multiple of 16."""
    return Kind.ELEMENTS if any(size % 16 for size in sizes) else kind


def _loads_operands(architecture: int) -> bool:
    """Whether matrix instructions read registers (mma.sync), not shared memory (wgmma, tcgen05)."""
    return architecture // 10 not in (9, 10)


def _tf32_config(kind: int, architecture: int) -> MatmulConfig:
    if kind in (Kind.PATCHES, Kind.ELEMENTS):
        return TF32_OF_8
    if kind == Kind.RECOMPUTED:
        return TF32_SMALL if _loads_operands(architecture) else TF32_OF_4
    if kind == Kind.DERIVATIVE:
        return TF32_OF_4
    return TF32_OF_4 if _loads_operands(architecture) else TF32_WIDE


def _small_config(bits: int, kind: int) -> MatmulConfig:
    if bits == 16:
        return SMALL if kind == Kind.PLAIN else SMALL_SHALLOW
    if bits != TF32_BITS:
        return FLOAT32_SMALL
    return TF32_OF_8 if kind == Kind.ELEMENTS else TF32_SMALL


def _eight_warps(columns: int) -> MatmulConfig:
    return NARROW if columns <= 64 else WIDE


def _plain_config(columns: int, inner: int, architecture: int) -> MatmulConfig:
    if _loads_operands(architecture):
        # 192 columns are three times 64.
        half_empty = 0 < columns % 128 <= 64
        return NARROW_OF_4 if half_empty else WIDE_OF_4
    if architecture // 10 != 9 or columns <= 64:
        return _eight_warps(columns)
    return TALL if inner >= LONG_INNER else replace(WIDE, registers=TWO_PROGRAMS)


def _scaled_config(columns: int, architecture: int) -> MatmulConfig:
    """Tiles of at most 128 rows, two images' at most."""
    if architecture // 10 != 9 or columns <= 64:
        return _plain_config(columns, 0, architecture)
    return BROAD_SHALLOW if columns > 128 else WIDE_SHALLOW


def _derivative_config(columns: int, inner: int, architecture: int) -> MatmulConfig:
    if _loads_operands(architecture):
        return replace(_plain_config(columns, inner, architecture), part_bytes=DERIVATIVE_BYTES_OF_4)
    tile = replace(_eight_warps(columns), registers=TWO_PROGRAMS, part_bytes=DERIVATIVE_BYTES)
    return replace(tile, block_k=32, stages=4) if inner <= SHALLOW_INNER else tile


def _recomputed_config(inner: int, architecture: int) -> MatmulConfig:
    if _loads_operands(architecture) and inner > FLAT_INNER:
        return FLAT_OF_4
    # With that limit sm_120 spills 200 bytes in the loop.
    return SHALLOW if architecture // 10 == 12 else replace(SHALLOW, registers=TWO_PROGRAMS)


def matmul_config(columns: int, inner: int, bits: int, kind: int, few: int, architecture: int) -> MatmulConfig:
    """The configuration for an output of so many columns.

    Args:
        bits: `operand_bits`.
        kind: a `Kind`.
        few: 1 where `few_programs`, else 0.
        architecture: as `ops.common.launch.architecture` gives it.
    """
    if few:
        return _small_config(bits, kind)
    if bits == TF32_BITS:
        return _tf32_config(kind, architecture)
    if bits != 16:
        return FLOAT32_SMALL if kind in (Kind.RECOMPUTED, Kind.ELEMENTS) else FLOAT32
    if kind == Kind.PLAIN:
        return _plain_config(columns, inner, architecture)
    if kind == Kind.SCALED:
        return _scaled_config(columns, architecture)
    if kind == Kind.PATCHES:
        return _eight_warps(columns)
    if kind == Kind.DERIVATIVE:
        return _derivative_config(columns, inner, architecture)
    if kind == Kind.RECOMPUTED:
        return _recomputed_config(inner, architecture)
    return SHALLOW if inner <= SHALLOW_INNER else NARROW


def matmul_candidates(
    columns: int, inner: int, bits: int, kind: int, few: int, architecture: int
) -> list[MatmulConfig]:
    """Other shapes of the tile, depths, numbers of warps, stages and registers."""
    if bits != 16:
        return TF32_CANDIDATES if bits == TF32_BITS else FLOAT32_CANDIDATES
    if kind in (Kind.PLAIN, Kind.SCALED) and columns > 64 and not few:
        return [*CANDIDATES, *BROAD_CANDIDATES, *(TALL_CANDIDATES if kind == Kind.PLAIN else ())]
    tiles = CANDIDATES
    if kind == Kind.DERIVATIVE:
        parts = (DERIVATIVE_BYTES, DERIVATIVE_BYTES_OF_4)
        tiles = [*tiles, *(replace(tile, part_bytes=part) for tile in tiles if tile.block_n == 128 for part in parts)]
    if kind != Kind.RECOMPUTED and inner > SHALLOW_INNER:
        return tiles
    # Where they may be two products in one, larger tiles want more shared memory than there is, 241 KB on sm_90.
    return [tile for tile in tiles if (tile.block_m + tile.block_n) * tile.block_k * tile.stages <= 49152]


def long_matmul_config(rows: int, columns: int, bits: int, kind: int, architecture: int) -> MatmulConfig:
    """For an inner dimension of tokens, arguments as `matmul_config`'s."""
    if bits == TF32_BITS:
        return _tf32_config(kind, architecture)
    if bits != 16:
        return FLOAT32_SMALL if kind == Kind.ELEMENTS else FLOAT32_LONG
    if kind in (Kind.PATCHES, Kind.ELEMENTS):
        return _eight_warps(columns)
    if _loads_operands(architecture):
        return NARROW_OF_4 if columns <= 64 else WIDE_OF_4
    if architecture // 10 != 9 or columns <= 64:
        return _eight_warps(columns)
    if columns % BROAD.block_n == 0:
        return BROAD
    # With weights for the sums of rows it takes 140 registers where it is let.
    return TALL if rows % TALL.block_m == 0 else replace(WIDE, registers=TWO_PROGRAMS)


def long_matmul_candidates(rows: int, columns: int, bits: int, kind: int, architecture: int) -> list[MatmulConfig]:
    """As `matmul_candidates`."""
    if bits != 16:
        return TF32_CANDIDATES if bits == TF32_BITS else FLOAT32_CANDIDATES
    return [*CANDIDATES, *([*BROAD_CANDIDATES, TALL] if max(rows, columns) > 128 else ())]


MATMUL = Tunable("common.matmul", matmul_config, matmul_candidates)
LONG_MATMUL = Tunable("common.long_matmul", long_matmul_config, long_matmul_candidates)


def split_count(rows: int, columns: int, inner: int, config: MatmulConfig) -> int:
    """In how many parts a product with a long inner dimension is summed; from the shape alone, so runs agree."""
    larger = max(1, config.block_m * config.block_n // (WIDE.block_m * WIDE.block_n))
    return max(1, min(-(-inner // MINIMUM_SPLIT), SPLIT_PROGRAMS // larger // _tiles(rows, columns, config)))
