"""Schema, fake, gradient and choice of backend of the depthwise convolution."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from convnext_kernels.ops.common.layouts import empty_like, nothing, statistics_dtype
from convnext_kernels.ops.common.registration import (
    below_autograd,
    define,
    differentiate,
    dtypes_of,
    gradient_of_output,
    requested_gradients,
)

MAXIMUM_TRITON_SIZE = 11
"""The largest filter that the Triton kernels, which unroll a filter column, are compiled and tested for."""


def filter_limits(weight: Tensor) -> dict[str, list[str]]:
    """What a depthwise filter has against each backend."""
    size = weight.shape[-1]
    too_large = (
        f"the filter is {size}x{size}; the Triton kernel takes up to {MAXIMUM_TRITON_SIZE}x{MAXIMUM_TRITON_SIZE}"
    )
    return {"triton": [too_large] if size > MAXIMUM_TRITON_SIZE else [], "reference": []}


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
    limits=lambda input, weight, *_: filter_limits(weight),
)

BACKWARD = define(
    "depthwise_conv",
    "depthwise_conv2d_backward",
    "backward",
    "(Tensor grad_output, Tensor input, Tensor weight, int dilation, bool[] wanted, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    fake=_fake_backward,
    limits=lambda grad_output, input, weight, *_: filter_limits(weight),
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
        return (*requested_gradients(gradients, wanted, ctx.dtypes), None, None)


differentiate(FORWARD, _DepthwiseConv2d)
