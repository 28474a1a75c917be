"""Schema, fake, gradient and choice of backend of the pointwise MLP."""

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

LIMITS: dict[str, list[str]] = {"triton": [], "reference": []}


def _fake_forward(
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    layer_scale: Tensor | None,
    drop_path_factor: Tensor | None,
    residual: Tensor | None,
    grn_weight: Tensor | None,
    grn_bias: Tensor | None,
    grn_eps: float,
    activation: str,
    recompute_hidden: bool,
    save: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if not save:
        return empty_like(input), nothing(input)
    spatial = input.shape[2:] if input.dim() == 4 else input.shape[1:2]
    return empty_like(input), input.new_empty((input.shape[0], *spatial, weight1.shape[0]))


def _fake_backward(
    grad_output: Tensor,
    input: Tensor,
    pre_activation: Tensor | None,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    layer_scale: Tensor | None,
    drop_path_factor: Tensor | None,
    grn_weight: Tensor | None,
    grn_bias: Tensor | None,
    grn_eps: float,
    activation: str,
    wanted: list[bool],
    backend: str,
) -> tuple[Tensor, ...]:
    hidden, width = weight1.shape
    shapes = [(hidden, width), (hidden,), (width, hidden), (width,), (width,), (hidden,), (hidden,)]
    dtype = statistics_dtype(input)
    parameters = [
        input.new_empty(shape, dtype=dtype) if want else nothing(input)
        for shape, want in zip(shapes, wanted[1:], strict=True)
    ]
    return empty_like(input) if wanted[0] else nothing(input), *parameters


FORWARD = define(
    "mlp",
    "mlp",
    "forward",
    "(Tensor input, Tensor weight1, Tensor? bias1, Tensor weight2, Tensor? bias2, Tensor? layer_scale,"
    " Tensor? drop_path_factor, Tensor? residual, Tensor? grn_weight, Tensor? grn_bias, float grn_eps, str activation,"
    " bool recompute_hidden, bool save, str backend) -> (Tensor, Tensor)",
    fake=_fake_forward,
    limits=lambda *_: LIMITS,
)

BACKWARD = define(
    "mlp",
    "mlp_backward",
    "backward",
    "(Tensor grad_output, Tensor input, Tensor? pre_activation, Tensor weight1, Tensor? bias1, Tensor weight2,"
    " Tensor? bias2, Tensor? layer_scale, Tensor? drop_path_factor, Tensor? grn_weight, Tensor? grn_bias,"
    " float grn_eps, str activation, bool[] wanted, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_backward,
    limits=lambda *_: LIMITS,
)


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight1: Tensor,
        bias1: Tensor | None,
        weight2: Tensor,
        bias2: Tensor | None,
        layer_scale: Tensor | None,
        drop_path_factor: Tensor | None,
        residual: Tensor | None,
        grn_weight: Tensor | None,
        grn_bias: Tensor | None,
        grn_eps: float,
        activation: str,
        recompute_hidden: bool,
        save: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        save = not recompute_hidden
        parameters = (weight1, bias1, weight2, bias2, layer_scale)
        grn = (grn_weight, grn_bias)
        output, pre_activation = below_autograd(
            FORWARD, input, *parameters, drop_path_factor, residual, *grn, grn_eps, activation, False, save, backend
        )
        saved = pre_activation if save else None
        ctx.save_for_backward(input, saved, *parameters, drop_path_factor, *grn)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(pre_activation)
        ctx.grn_eps, ctx.activation, ctx.backend = grn_eps, activation, backend
        ctx.dtypes = dtypes_of(input, *parameters, *grn)
        return output, pre_activation

    @staticmethod
    @gradient_of_output
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad
        wanted = [*needs[:6], *needs[8:10]]
        gradients = BACKWARD(grad_output, *ctx.saved_tensors, ctx.grn_eps, ctx.activation, wanted, ctx.backend)
        *branch, grad_grn_weight, grad_grn_bias = requested_gradients(gradients, wanted, ctx.dtypes)
        grad_residual = grad_output if needs[7] else None
        return *branch, None, grad_residual, grad_grn_weight, grad_grn_bias, None, None, None, None, None


CALL = differentiate(FORWARD, _MLP)
