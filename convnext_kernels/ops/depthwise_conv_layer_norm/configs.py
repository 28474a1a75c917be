"""Launch configurations of depthwise convolution + LayerNorm: data, and the rule that picks among them."""

from __future__ import annotations

from convnext_kernels.ops.common.launch import next_power_of_2
from convnext_kernels.ops.depthwise_conv.configs import TileConfig

# Above this, four rows of two whole pixels no longer fit the registers of 256 threads: convolution, then LayerNorm.
MAXIMUM_FUSED_CHANNELS = 1024


def fused_config(width: int, channels: int, size: int) -> TileConfig:
    """Whole pixels: four rows of at most 1024 elements, or of two pixels, 32 accumulators a thread.

    Larger filters take half: with 1024 elements 11x11 of dilation 2 spills 8 bytes. So do 32 pixels of 32 channels, 16.
    """
    padded, elements = next_power_of_2(channels), 1024 if size <= 7 else 512
    pixels = min(16, max(2, elements // padded), max(2, next_power_of_2(width)))
    return TileConfig(pixels, padded, warps=4 if pixels * padded <= elements else 8)
