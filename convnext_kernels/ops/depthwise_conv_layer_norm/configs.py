"""Launch configurations of depthwise convolution + LayerNorm: data, and the rule that picks among them."""

from __future__ import annotations

from convnext_kernels.ops.common.launch import next_power_of_2
from convnext_kernels.ops.common.tuning import Tunable
from convnext_kernels.ops.depthwise_conv.configs import TileConfig, width_class

# Above this, four rows of two whole pixels no longer fit the registers of 256 threads: convolution, then LayerNorm.
MAXIMUM_FUSED_CHANNELS = 1024


def fused_config(width: int, channels: int, size: int) -> TileConfig:
    """Whole pixels: four rows of at most 1024 elements, or of two pixels, 32 accumulators a thread.

    Larger filters take half: with 1024 elements 11x11 of dilation 2 spills 8 bytes. So do 32 pixels of 32 channels, 16;
    and 512 channels with 4 warps, whose 168 registers on sm_90 are 80 with 8.
    """
    padded, elements = next_power_of_2(channels), 1024 if size <= 7 else 512
    pixels = min(16, max(2, elements // padded), max(2, width_class(width)))
    return TileConfig(pixels, padded, warps=4 if pixels * padded <= elements and padded < 512 else 8)


def fused_candidates(width: int, channels: int, size: int) -> list[TileConfig]:
    """16 or 32 accumulators a thread, for four rows of 512 to 2048 elements."""
    padded = next_power_of_2(channels)
    return [
        TileConfig(elements // padded, padded, warps)
        for elements, warps in ((512, 4), (1024, 4), (1024, 8), (2048, 8), (2048, 16))
        if 2 <= elements // padded <= min(16, max(2, width_class(width)))
        if padded < 512 or warps > 4
    ]


FUSED = Tunable("depthwise_conv_layer_norm.fused_kernel", fused_config, fused_candidates)
