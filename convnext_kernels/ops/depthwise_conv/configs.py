"""Launch configurations of the depthwise convolution: data, and the rules that pick among them."""

from __future__ import annotations

from dataclasses import dataclass

from convnext_kernels.ops.common.launch import next_power_of_2
from convnext_kernels.ops.common.tuning import Tunable

# Output rows of a program: an input row is loaded once for all of them. Four keep 7x7 at 70 loads for 4 rows, not 196.
# They lie one dilation apart, so that they meet the same input rows.
ROWS = 4

# Partial filter gradients: enough programs (channel blocks x filter rows x splits) to fill an H200 four times over.
MAXIMUM_SPLITS = 256
PIXELS_PER_SPLIT = 512


@dataclass(frozen=True)
class TileConfig:
    """Pixels and channels of a program's tile, and its warps."""

    pixels: int
    channels: int
    warps: int


def width_class(width: int) -> int:
    """Maps of one class share their configuration: the next power of two, at most 32."""
    return min(32, next_power_of_2(width))


def forward_config(width: int, channels: int, size: int) -> TileConfig:
    """Up to 1024 elements, 8 for each thread: one 128-bit load of 16-bit values. Small maps and few channels take less.

    With 4 elements a thread ptxas takes 72 registers and spills 40 bytes. All sizes of filters take the same.
    """
    block_channels = min(64, next_power_of_2(channels))
    pixels = min(1024 // block_channels, max(4, width_class(width)))
    return TileConfig(pixels, block_channels, warps=max(1, pixels * block_channels // 256))


def forward_candidates(width: int, channels: int, size: int) -> list[TileConfig]:
    """512 to 2048 elements, 8 for each thread."""
    return [
        TileConfig(elements // block_channels, block_channels, warps=elements // 256)
        for elements in (512, 1024, 2048)
        for block_channels in (16, 32, 64, 128)
        if block_channels <= next_power_of_2(channels)
        if 4 <= elements // block_channels <= max(4, width_class(width))
    ]


def weight_gradient_config(channels: int, size: int) -> TileConfig:
    """The accumulators hold one filter row: filter columns x pixels x channels, at most 4096 floats for 128 threads."""
    block_channels = min(32, next_power_of_2(channels))
    return TileConfig(max(2, 4096 // (block_channels * next_power_of_2(size))), block_channels, warps=4)


def weight_gradient_candidates(channels: int, size: int) -> list[TileConfig]:
    """16 or 32 accumulators a thread; 16 pixels of 16 channels spill 8 bytes on sm_90."""
    return [
        TileConfig(accumulators // (block_channels * next_power_of_2(size)), block_channels, warps)
        for accumulators, warps in ((2048, 4), (4096, 4), (4096, 8), (8192, 8))
        for block_channels in (32, 64)
        if block_channels <= next_power_of_2(channels)
        if accumulators // (block_channels * next_power_of_2(size)) >= 2
    ]


FORWARD = Tunable("depthwise_conv.convolution_kernel", forward_config, forward_candidates)
WEIGHT_GRADIENT = Tunable("depthwise_conv.weight_gradient_kernel", weight_gradient_config, weight_gradient_candidates)


def split_count(pixels: int) -> int:
    """In how many parts the filter's gradient is summed; from the number of pixels alone, so runs agree."""
    return max(1, min(MAXIMUM_SPLITS, -(-pixels // PIXELS_PER_SPLIT)))
