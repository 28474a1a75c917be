"""Schema, fake, gradient and choice of backend of depthwise convolution + LayerNorm."""

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
    in_strides_of,
    requested_gradients,
)
from convnext_kernels.ops.depthwise_conv.operator import filter_limits, filter_notes
from convnext_kernels.ops.layer_norm.operator import channel_limits, channel_notes


def _limits(input: Tensor, weight: Tensor, dilation: int) -> dict[str, list[str]]:
    by_filter, by_channels = filter_limits(weight.shape[-1], dilation), channel_limits(input.shape[1])
    return {backend: by_filter[backend] + by_channels[backend] for backend in by_filter}


def _fake_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    dilation: int,
    eps: float,
    save: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if not save:
        return empty_like(input), nothing(input), nothing(input), nothing(input)
    pixels, dtype = input.numel() // input.shape[1], statistics_dtype(input)
    statistics = (input.new_empty(pixels, dtype=dtype), input.new_empty(pixels, dtype=dtype))
    return empty_like(input), empty_like(input), *statistics


def _fake_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    convolved: Tensor,
    mean: Tensor,
    rstd: Tensor,
    dilation: int,
    wanted: list[bool],
    backend: str,
) -> tuple[Tensor, ...]:
    shapes = [weight.shape, *[(weight.shape[0],)] * 3]
    parameters = [
        mean.new_empty(shape) if want else nothing(input) for shape, want in zip(shapes, wanted[1:], strict=True)
    ]
    return empty_like(input) if wanted[0] else nothing(input), *parameters


FORWARD = define(
    "depthwise_conv_layer_norm",
    "depthwise_conv2d_layer_norm",
    "forward",
    "(Tensor input, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, int dilation, float eps,"
    " bool save, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_forward,
    limits=lambda input, weight, bias, norm_weight, norm_bias, dilation, *_: _limits(input, weight, dilation),
    notes=lambda input, *_: {"cuda": filter_notes(input)["cuda"] + channel_notes(input)["cuda"]},
)

BACKWARD = define(
    "depthwise_conv_layer_norm",
    "depthwise_conv2d_layer_norm_backward",
    "backward",
    "(Tensor grad_output, Tensor input, Tensor weight, Tensor? norm_weight, Tensor convolved, Tensor mean, Tensor rstd,"
    " int dilation, bool[] wanted, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_backward,
    limits=lambda grad_output, input, weight, norm_weight, convolved, mean, rstd, dilation, *_: _limits(
        input, weight, dilation
    ),
)


class _DepthwiseConv2dLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        dilation: int,
        eps: float,
        save: bool,
        backend: str,
    ) -> tuple[Tensor, ...]:
        output, convolved, mean, rstd = below_autograd(
            FORWARD, input, weight, bias, norm_weight, norm_bias, dilation, eps, True, backend
        )
        ctx.save_for_backward(input, weight, norm_weight, convolved, mean, rstd)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(convolved, mean, rstd)
        ctx.dilation, ctx.backend = dilation, backend
        ctx.dtypes = dtypes_of(input, weight, bias, norm_weight, norm_bias)
        return output, convolved, mean, rstd

    @staticmethod
    @gradient_of_output
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        wanted = list(ctx.needs_input_grad[:5])
        saved = ctx.saved_tensors  # once: checkpoints let nobody unpack them twice
        gradients = BACKWARD(grad_output, *saved, ctx.dilation, wanted, ctx.backend)
        grad_input, grad_weight, *vectors = requested_gradients(gradients, wanted, ctx.dtypes)
        return grad_input, in_strides_of(saved[1], grad_weight), *vectors, None, None, None, None


CALL = differentiate(FORWARD, _DepthwiseConv2dLayerNorm)
