"""Trying a swap before it is made: on a copy of the module, with random parameters, in float64 on the CPU."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from convnext_kernels.accelerate.blocks import AcceleratedBlock
from convnext_kernels.accelerate.norms import AcceleratedNorm
from convnext_kernels.accelerate.swap import Swapped, swap
from convnext_kernels.backends import use_backend

TOLERANCE = 1e-5
"""Relative: a host that computes norm or activation in float32 differs by 1e-7, another block by 1e-2."""


def block_difference(block: nn.Module, wiring: Any) -> float:
    """Relative difference of a block's branch, as its host computes it, to ours.

    Layer scale of 1e-6 and response norm's zeros, as they are at first, would hide any mistake: hence the random
    parameters. The norm's input has a variance near 1e-5, so that another epsilon shows.
    """
    probe = _randomised(block)
    conv = wiring.parts(probe).conv
    conv.weight.data.div_(300 * conv.kernel_size[0])
    if conv.bias is not None:
        conv.bias.data.div_(300)
    height, width = 2 * conv.dilation[0] + 2, conv.dilation[0] + 3
    return _difference(probe, AcceleratedBlock, wiring, (2, conv.in_channels, height, width), residual=True)


def plain_attributes(block: nn.Module) -> tuple[Any, ...]:
    """What may make blocks of one class compute different things: numbers, flags and names in them, but no widths."""
    ignored = {"training", "in_channels", "out_channels", "in_features", "out_features", "groups", "num_features"}
    ignored |= {"drop_prob", "p"}  # not in eval mode, in which a block is tried
    values = tuple(
        (path, name, value)
        for path, module in block.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, bool | int | float | str) and name not in ignored
    )
    return *values, *(name for name, _ in block.named_parameters())


def norm_difference(norm: nn.Module) -> float:
    """Relative difference of a layer norm over channels of images, as its host computes it, to ours."""
    probe = _randomised(norm)
    channels = next(probe.parameters()).numel()
    return _difference(probe, AcceleratedNorm, None, (2, channels, 3, 5), residual=False)


def _randomised(module: nn.Module) -> nn.Module:
    probe = copy.deepcopy(module).to_empty(device="cpu").double().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in probe.parameters():
        fan_in = parameter[0].numel() if parameter.shape[0] > 1 else 1
        parameter.normal_(generator=generator).div_(fan_in**0.5)
    return probe


def _difference(probe: nn.Module, kind: type[Swapped], wiring: Any, shape: tuple[int, ...], residual: bool) -> float:
    generator = torch.Generator().manual_seed(1)
    input = torch.randn(shape, dtype=torch.float64, device="cpu", generator=generator)
    skipped = input if residual else 0.0
    with torch.no_grad(), use_backend("reference"):
        expected: Tensor = probe.forward(input) - skipped
        swap(probe, kind, wiring)
        got: Tensor = probe.forward(input) - skipped
    if got.shape != expected.shape:
        return float("inf")
    return ((got - expected).norm() / expected.norm()).item()
