"""Schema, fake, gradient and choice of backend of the depthwise convolution."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from convnext_kernels.ops.common.cuda_launch import image_strides
from convnext_kernels.ops.common.layouts import empty_like, nothing, statistics_dtype
from convnext_kernels.ops.common.registration import (
    below_autograd,
    define,
    differentiate,
    dtypes_of,
    gradient_of_output,
    in_strides_of,
    requested_gradients,
)

MAXIMUM_TRITON_SIZE = 11
"""The largest filter that the Triton kernels, which unroll a filter column, are compiled and tested for."""


CUDA_SIZES = (3, 5, 7)
"""The filters that the CUDA kernels are written for."""


@cache
def filter_limits(size: int, dilation: int) -> dict[str, list[str]]:
    """What a depthwise filter of this size and dilation has against each backend."""
    cuda, triton = [], []
    if size not in CUDA_SIZES:
        cuda.append(f"the filter is {size}x{size}; the CUDA kernels take 3x3, 5x5 and 7x7")
    if dilation != 1:
        cuda.append(f"the dilation is {dilation}; the CUDA kernels take 1")
    if size > MAXIMUM_TRITON_SIZE:
        largest = f"{MAXIMUM_TRITON_SIZE}x{MAXIMUM_TRITON_SIZE}"
        triton.append(f"the filter is {size}x{size}; the Triton kernel takes up to {largest}")
    return {"cuda": cuda, "triton": triton, "reference": []}


def filter_notes(input: Tensor) -> dict[str, list[str]]:
    """Why the CUDA kernels compute on CUDA cores: tensor cores take 16-bit values, two channels in one aligned word."""
    channels, strides = input.shape[1], image_strides(input.permute(0, 2, 3, 1))
    copied = input.stride(1) != 1
    why = ""
    if input.dtype == torch.float32:
        why = "float32"
    elif channels % 2:
        why = f"an odd number of channels, {channels}"
    elif not copied and any(stride % 2 for stride in strides):
        why = f"odd strides of image, row or pixel, {strides}"
    elif not copied and input.data_ptr() % 4:
        why = "memory that is not aligned to 4 bytes"
    return {"cuda": [f"on CUDA cores, not tensor cores: {why}"] if why else []}


def _fake_forward(input: Tensor, weight: Tensor, bias: Tensor | None, dilation: int, backend: str) -> Tensor:
    return empty_like(input)


def _fake_backward(
    grad_output: Tensor, input: Tensor, weight: Tensor, dilation: int, wanted: list[bool], backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        empty_like(input) if wanted[0] else nothing(weight),
        weight.new_empty(weight.shape, dtype=statistics_dtype(input)) if wanted[1] else nothing(weight),
        weight.new_empty(weight.shape[0], dtype=statistics_dtype(input)) if wanted[2] else nothing(weight),
    )


FORWARD = define(
    "depthwise_conv",
    "depthwise_conv2d",
    "forward",
    "(Tensor input, Tensor weight, Tensor? bias, int dilation, str backend) -> Tensor",
    fake=_fake_forward,
    limits=lambda input, weight, bias, dilation: filter_limits(weight.shape[-1], dilation),
    notes=lambda input, *_: filter_notes(input),
)

BACKWARD = define(
    "depthwise_conv",
    "depthwise_conv2d_backward",
    "backward",
    "(Tensor grad_output, Tensor input, Tensor weight, int dilation, bool[] wanted, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    fake=_fake_backward,
    limits=lambda grad_output, input, weight, dilation, *_: filter_limits(weight.shape[-1], dilation),
)


class _DepthwiseConv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, dilation: int, backend: str) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.dilation, ctx.backend = dilation, backend
        ctx.dtypes = dtypes_of(input, weight, bias)
        return below_autograd(FORWARD, input, weight, bias, dilation, backend)

    @staticmethod
    @gradient_of_output
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[:3])
        gradients = BACKWARD(grad_output, input, weight, ctx.dilation, wanted, ctx.backend)
        grad_input, grad_weight, grad_bias = requested_gradients(gradients, wanted, ctx.dtypes)
        return grad_input, in_strides_of(weight, grad_weight), grad_bias, None, None


CALL = differentiate(FORWARD, _DepthwiseConv2d)
