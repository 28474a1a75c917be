"""Launch configurations of global response normalisation: data, and the rules that pick among them."""

from __future__ import annotations

from dataclasses import dataclass

from convnext_kernels.ops.common.tuning import Tunable

# Sums over an image's tokens: one split for so many tokens, at most so many.
TOKENS_PER_SPLIT = 256
MAXIMUM_SPLITS = 64

# A program between the passes takes all channels of an image. 8192 spill nothing; V2-H's 11264 do backward, 240 bytes.
RATIOS_WARPS = 16


@dataclass(frozen=True)
class TileConfig:
    """Tokens and channels of a program's tile, and its warps."""

    tokens: int
    channels: int
    warps: int


def tile_config(channels: int) -> TileConfig:
    """One 128-bit load of 16-bit values for each of 256 threads, whatever the number of channels."""
    return TileConfig(tokens=32, channels=64, warps=8)


def tile_candidates(channels: int) -> list[TileConfig]:
    """8 or 16 elements a thread."""
    return [
        TileConfig(elements // block_channels, block_channels, warps)
        for elements, warps in ((1024, 4), (2048, 4), (2048, 8), (4096, 8))
        for block_channels in (64, 128)
    ]


SUMS = Tunable("response_norm.sums_kernel", tile_config, tile_candidates)
APPLY = Tunable("response_norm.apply_kernel", tile_config, tile_candidates)
ACTIVATED_BACKWARD = Tunable("response_norm.activated_backward_kernel", tile_config, tile_candidates)


def split_count(tokens: int) -> int:
    """In how many parts the sums over an image's tokens are taken; from their number alone, so runs agree."""
    return max(1, min(MAXIMUM_SPLITS, -(-tokens // TOKENS_PER_SPLIT)))
