"""Schema, fake, gradient and choice of backend of the ConvNeXt block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from convnext_kernels.backends import machine_reasons
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
from convnext_kernels.ops.convnext_block.configs import recomputes_by_default
from convnext_kernels.ops.depthwise_conv.operator import filter_limits, filter_notes
from convnext_kernels.ops.layer_norm.operator import channel_limits, channel_notes


@cache
def _limits(size: int, dilation: int, width: int, products: tuple[str, ...]) -> Mapping[str, Sequence[str]]:
    """What a filter, a number of channels and, of this machine, the products have against each backend."""
    by_filter, by_channels = filter_limits(size, dilation), channel_limits(width)
    limits = {backend: by_filter[backend] + by_channels[backend] for backend in by_filter}
    limits["cuda"] += [f"its products are Triton's: {reason}" for reason in products]
    return limits


def _limits_of(input: Tensor, conv_weight: Tensor, dilation: int) -> Mapping[str, Sequence[str]]:
    products = machine_reasons("triton", input.device, input.dtype, by_name=True)
    return _limits(conv_weight.shape[-1], dilation, input.shape[1], products)


def _fake_forward(
    input: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    layer_scale: Tensor | None,
    drop_path_factor: Tensor | None,
    grn_weight: Tensor | None,
    grn_bias: Tensor | None,
    residual: Tensor | None,
    dilation: int,
    eps: float,
    grn_eps: float,
    activation: str,
    recompute_hidden: bool | None,
    save: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    output = empty_like(input if residual is None else residual)
    if not save:
        return output, *(nothing(input) for _ in range(5))
    batch, channels, height, width = input.shape
    hidden, statistics = weight1.shape[0], statistics_dtype(input)
    return (
        output,
        empty_like(input),
        input.new_empty(batch * height * width, dtype=statistics),
        input.new_empty((hidden, channels)),
        input.new_empty(hidden, dtype=statistics),
        nothing(input) if recompute_hidden else input.new_empty((batch, height, width, hidden)),
    )


def _fake_backward(
    grad_output: Tensor,
    input: Tensor,
    normalized: Tensor,
    rstd: Tensor,
    folded_weight1: Tensor,
    folded_bias1: Tensor,
    pre_activation: Tensor | None,
    conv_weight: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight1: Tensor,
    weight2: Tensor,
    bias2: Tensor | None,
    layer_scale: Tensor | None,
    drop_path_factor: Tensor | None,
    grn_weight: Tensor | None,
    grn_bias: Tensor | None,
    dilation: int,
    grn_eps: float,
    activation: str,
    skips: bool,
    wanted: list[bool],
    backend: str,
) -> tuple[Tensor, ...]:
    hidden, channels = weight1.shape
    vector, wide = (channels,), (hidden,)
    norm, first, second = (vector, vector), ((hidden, channels), wide), ((channels, hidden), vector)
    shapes = [conv_weight.shape, vector, *norm, *first, *second, vector, wide, wide]
    parameters = [
        rstd.new_empty(shape) if want else nothing(input) for shape, want in zip(shapes, wanted[1:], strict=True)
    ]
    return empty_like(input) if wanted[0] else nothing(input), *parameters


FORWARD = define(
    "convnext_block",
    "convnext_block",
    "forward",
    "(Tensor input, Tensor conv_weight, Tensor? conv_bias, Tensor? norm_weight, Tensor? norm_bias, Tensor weight1,"
    " Tensor? bias1, Tensor weight2, Tensor? bias2, Tensor? layer_scale, Tensor? drop_path_factor, Tensor? grn_weight,"
    " Tensor? grn_bias, Tensor? residual, int dilation, float eps, float grn_eps, str activation,"
    " bool? recompute_hidden, bool save, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_forward,
    limits=lambda input, conv_weight, *others: _limits_of(input, conv_weight, others[12]),
    notes=lambda input, *_: {"cuda": filter_notes(input)["cuda"] + channel_notes(input)["cuda"]},
)

BACKWARD = define(
    "convnext_block",
    "convnext_block_backward",
    "backward",
    "(Tensor grad_output, Tensor input, Tensor normalized, Tensor rstd, Tensor folded_weight1, Tensor folded_bias1,"
    " Tensor? pre_activation, Tensor conv_weight, Tensor? norm_weight, Tensor? norm_bias, Tensor weight1,"
    " Tensor weight2, Tensor? bias2, Tensor? layer_scale, Tensor? drop_path_factor, Tensor? grn_weight,"
    " Tensor? grn_bias, int dilation, float grn_eps, str activation, bool skips, bool[] wanted, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_backward,
    limits=lambda grad_output, input, *others: _limits_of(input, others[5], others[15]),
)


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        conv_weight: Tensor,
        conv_bias: Tensor | None,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        weight1: Tensor,
        bias1: Tensor | None,
        weight2: Tensor,
        bias2: Tensor | None,
        layer_scale: Tensor | None,
        drop_path_factor: Tensor | None,
        grn_weight: Tensor | None,
        grn_bias: Tensor | None,
        residual: Tensor | None,
        dilation: int,
        eps: float,
        grn_eps: float,
        activation: str,
        recompute_hidden: bool | None,
        save: bool,
        backend: str,
    ) -> tuple[Tensor, ...]:
        if recompute_hidden is None:
            recompute_hidden = recomputes_by_default(input, grn_weight is not None)
        conv, norm, grn = (conv_weight, conv_bias), (norm_weight, norm_bias), (grn_weight, grn_bias)
        layers = (weight1, bias1, weight2, bias2, layer_scale)
        options = (dilation, eps, grn_eps, activation, recompute_hidden)
        output, *saved = below_autograd(
            FORWARD, input, *conv, *norm, *layers, drop_path_factor, *grn, residual, *options, True, backend
        )
        pre_activation = None if recompute_hidden else saved[-1]
        branch = (weight1, weight2, bias2, layer_scale, drop_path_factor)
        ctx.save_for_backward(input, *saved[:-1], pre_activation, conv_weight, *norm, *branch, *grn)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*saved)
        ctx.options, ctx.backend = (dilation, grn_eps, activation, residual is None), backend
        ctx.dtypes = dtypes_of(input, *conv, *norm, *layers, *grn)
        return output, *saved

    @staticmethod
    @gradient_of_output
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad
        wanted = [needs[0] or needs[13], *needs[1:10], *needs[11:13]]
        saved = ctx.saved_tensors  # once: checkpoints let nobody unpack them twice
        gradients = BACKWARD(grad_output, *saved, *ctx.options, wanted, ctx.backend)
        requested = requested_gradients(gradients, wanted, ctx.dtypes)
        grad_input, grad_filter, *branch, grad_grn_weight, grad_grn_bias = requested
        grad_filter = in_strides_of(saved[6], grad_filter)
        grad_residual = None
        if needs[13] and grad_input is not None:  # the residual is what the input has been cast from
            grad_residual = grad_input + grad_output
            grad_input = None
        return grad_input, grad_filter, *branch, None, grad_grn_weight, grad_grn_bias, grad_residual, *(None,) * 7


CALL = differentiate(FORWARD, _Block)
