"""The definition of the patch embedding and its gradients in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from convnext_kernels.ops.common.layouts import from_channels_last, nothing, statistics_dtype, to_channels_last
from convnext_kernels.ops.common.products import linear


def patch_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight [O, C, P, P] as the matrix [O, P P C] whose columns run as a patch lies in channels-last memory."""
    return weight.permute(0, 2, 3, 1).to(dtype).flatten(1)


def weight_from_patches(matrix: Tensor, weight: Tensor) -> Tensor:
    """The inverse of `patch_weight`, for gradients: [O, P P C] as a contiguous [O, C, P, P]."""
    outputs, channels, size, _ = weight.shape
    return matrix.view(outputs, size, size, channels).permute(0, 3, 1, 2).contiguous()


def _patches(rows: Tensor, size: int) -> Tensor:
    """[N, H, W, C] as [N, H // P, W // P, P P C], a copy."""
    batch, height, width, channels = rows.shape
    height, width = height // size, width // size
    grid = rows[:, : height * size, : width * size].reshape(batch, height, size, width, size, channels)
    return grid.transpose(2, 3).reshape(batch, height, width, size * size * channels)


def forward(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution of size and stride P; see `patch_linear`."""
    bias = None if bias is None else bias.to(input.dtype)
    patches = _patches(to_channels_last(input), weight.shape[-1])
    return from_channels_last(linear(patches, patch_weight(weight, input.dtype), bias))


def backward(grad_output: Tensor, input: Tensor, weight: Tensor, wanted: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, weight and bias, the parameters' in float32.

    Patches do not overlap, so each input pixel gets its gradient from one patch, and pixels beyond the last whole
    patch get zero.
    """
    grad_input, grad_weight, grad_bias = nothing(input), nothing(input), nothing(input)
    grads = to_channels_last(grad_output)
    size, dtype = weight.shape[-1], statistics_dtype(input)
    batch, height, width, outputs = grads.shape
    channels = input.shape[1]
    if wanted[0]:
        patches = linear(grads, patch_weight(weight, input.dtype).t())
        grid = patches.view(batch, height, width, size, size, channels).transpose(2, 3)
        rows = grid.reshape(batch, height * size, width * size, channels)
        padding = (0, 0, 0, input.shape[3] - width * size, 0, input.shape[2] - height * size)
        grad_input = from_channels_last(F.pad(rows, padding).contiguous())
    if wanted[1]:
        patches = _patches(to_channels_last(input), size).flatten(0, 2)
        grad_weight = weight_from_patches((grads.view(-1, outputs).t() @ patches).to(dtype), weight)
    if wanted[2]:
        grad_bias = grads.sum((0, 1, 2), dtype=dtype)
    return grad_input, grad_weight, grad_bias
