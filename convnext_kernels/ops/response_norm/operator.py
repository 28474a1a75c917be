"""Schema, fake, gradient and choice of backend of global response normalisation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from convnext_kernels.ops.common.layouts import channels, empty_like, nothing, statistics_dtype
from convnext_kernels.ops.common.registration import (
    below_autograd,
    define,
    differentiate,
    dtypes_of,
    gradient_of_output,
    requested_gradients,
)

LIMITS: dict[str, list[str]] = {"triton": [], "reference": []}


def _fake_forward(input: Tensor, weight: Tensor, bias: Tensor, eps: float, backend: str) -> tuple[Tensor, Tensor]:
    norms = input.new_empty((input.shape[0], channels(input)), dtype=statistics_dtype(input))
    return empty_like(input), norms


def _fake_backward(
    grad_output: Tensor, input: Tensor, weight: Tensor, norms: Tensor, eps: float, wanted: list[bool], backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        empty_like(input) if wanted[0] else nothing(input),
        norms.new_empty(channels(input)) if wanted[1] else nothing(input),
        norms.new_empty(channels(input)) if wanted[2] else nothing(input),
    )


FORWARD = define(
    "response_norm",
    "global_response_norm",
    "forward",
    "(Tensor input, Tensor weight, Tensor bias, float eps, str backend) -> (Tensor, Tensor)",
    fake=_fake_forward,
    limits=lambda *_: LIMITS,
)

BACKWARD = define(
    "response_norm",
    "global_response_norm_backward",
    "backward",
    "(Tensor grad_output, Tensor input, Tensor weight, Tensor norms, float eps, bool[] wanted, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    fake=_fake_backward,
    limits=lambda *_: LIMITS,
)


class _GlobalResponseNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor, eps: float, backend: str
    ) -> tuple[Tensor, Tensor]:
        output, norms = below_autograd(FORWARD, input, weight, bias, eps, backend)
        ctx.save_for_backward(input, weight, norms)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(norms)
        ctx.eps, ctx.backend = eps, backend
        ctx.dtypes = dtypes_of(input, weight, bias)
        return output, norms

    @staticmethod
    @gradient_of_output
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        wanted = list(ctx.needs_input_grad[:3])
        gradients = BACKWARD(grad_output, *ctx.saved_tensors, ctx.eps, wanted, ctx.backend)
        return (*requested_gradients(gradients, wanted, ctx.dtypes), None, None)


CALL = differentiate(FORWARD, _GlobalResponseNorm)
