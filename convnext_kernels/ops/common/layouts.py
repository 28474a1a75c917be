"""Layouts and precision: operators take images [N, C, H, W] or tokens [N, L, C], kernels see channels last."""

from __future__ import annotations

import torch
from torch import Tensor


def channels(input: Tensor) -> int:
    """The number of channels of images [N, C, H, W] or tokens [N, L, C]."""
    return input.shape[1] if input.dim() == 4 else input.shape[-1]


def to_channels_last(input: Tensor) -> Tensor:
    """Images as [N, H, W, C], tokens as they are, contiguous; a copy only if the memory is not so already."""
    return (input.permute(0, 2, 3, 1) if input.dim() == 4 else input).contiguous()


def from_channels_last(output: Tensor) -> Tensor:
    """The inverse of `to_channels_last`: [N, H, W, C] becomes an [N, C, H, W] view in channels-last memory."""
    return output.permute(0, 3, 1, 2) if output.dim() == 4 else output


def tokens_per_image(rows: Tensor) -> int:
    """Of channels-last rows [N, ..., C]; 1 where N is 0."""
    return rows[0].numel() // rows.shape[-1] if rows.shape[0] else 1


def empty_like(input: Tensor) -> Tensor:
    """An uninitialised result of the input's shape, in channels-last memory whatever the input's strides."""
    if input.dim() == 4:
        return torch.empty_like(input, memory_format=torch.channels_last)
    return torch.empty_like(input, memory_format=torch.contiguous_format)


def empty_statistic(rows: Tensor) -> Tensor:
    """An uninitialised float32 for each token of channels-last rows [N, ..., C]."""
    return rows.new_empty(rows.numel() // rows.shape[-1], dtype=torch.float32)


def nothing(input: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The empty tensor that an operator returns in place of a result nobody asked for."""
    return input.new_empty(0, dtype=dtype)


def at_least_float32(tensor: Tensor) -> Tensor:
    """16-bit tensors in float32, others as they are."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def statistics_dtype(input: Tensor) -> torch.dtype:
    """The dtype of sums, means and other statistics: float32, or float64 for float64 tensors."""
    return torch.float64 if input.dtype == torch.float64 else torch.float32
