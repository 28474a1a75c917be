"""Launch configurations of depthwise convolution + LayerNorm: data, and the rule that picks among them."""

from __future__ import annotations

from convnext_kernels.ops.common.launch import next_power_of_2
from convnext_kernels.ops.depthwise_conv.configs import TileConfig

# Above this, four rows of two whole pixels no longer fit the registers of 256 threads: convolution, then LayerNorm.
MAXIMUM_FUSED_CHANNELS = 1024


def fused_config(width: int, channels: int) -> TileConfig:
    """Whole pixels: four rows of 1024 to 2048 elements, 32 accumulators a thread."""
    padded = next_power_of_2(channels)
    pixels = min(max(2, 1024 // padded), max(2, next_power_of_2(width)))
    return TileConfig(pixels, padded, warps=4 if pixels * padded <= 1024 else 8)
