"""Launch configurations of LayerNorm: data, and the rule that picks among them."""

from __future__ import annotations

from dataclasses import dataclass

from convnext_kernels.ops.common.launch import next_power_of_2
from convnext_kernels.ops.common.tuning import Tunable

# Partial parameter gradients, one for each program: four programs for each of the 132 multiprocessors of an H200.
BACKWARD_PROGRAMS = 528


@dataclass(frozen=True)
class NormConfig:
    """Tokens of a tile, channels padded to a power of two, and warps."""

    tokens: int
    channels: int
    warps: int


def norm_config(channels: int) -> NormConfig:
    """A tile of 2048 elements is 16 for each of 128 threads; wider tokens get more warps at 16 to 32 a thread."""
    padded = next_power_of_2(channels)
    return NormConfig(max(1, 2048 // padded), padded, warps=4 if padded <= 2048 else 8)


def norm_candidates(channels: int) -> list[NormConfig]:
    """8 to 32 elements for each thread of 64 to 512."""
    padded = next_power_of_2(channels)
    return [
        NormConfig(elements // padded, padded, warps)
        for elements in (1024, 2048, 4096, 8192)
        for warps in (2, 4, 8, 16)
        if elements >= padded and 8 <= elements // (32 * warps) <= 32
    ]


def backward_candidates(channels: int) -> list[NormConfig]:
    """16 elements a thread: 8 spill on sm_80 with 512 channels; 32, or 16 warps, in float32 on sm_90 with 40."""
    return [c for c in norm_candidates(channels) if c.warps <= 8 and c.tokens * c.channels == 16 * 32 * c.warps]


FORWARD = Tunable("layer_norm.forward_kernel", norm_config, norm_candidates)
BACKWARD = Tunable("layer_norm.backward_kernel", norm_config, backward_candidates)
