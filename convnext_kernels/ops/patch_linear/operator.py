"""Schema, fake, gradient and choice of backend of the patch embedding."""

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


def _fake_forward(input: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    outputs, _, size, _ = weight.shape
    batch, _, height, width = input.shape
    shape = (batch, outputs, height // size, width // size)
    return torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=torch.channels_last)


def _fake_backward(
    grad_output: Tensor, input: Tensor, weight: Tensor, wanted: list[bool], backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = statistics_dtype(input)
    return (
        empty_like(input) if wanted[0] else nothing(input),
        weight.new_empty(weight.shape, dtype=dtype) if wanted[1] else nothing(input),
        weight.new_empty(weight.shape[0], dtype=dtype) if wanted[2] else nothing(input),
    )


FORWARD = define(
    "patch_linear",
    "patch_linear",
    "forward",
    "(Tensor input, Tensor weight, Tensor? bias, str backend) -> Tensor",
    fake=_fake_forward,
    limits=lambda *_: LIMITS,
)

BACKWARD = define(
    "patch_linear",
    "patch_linear_backward",
    "backward",
    "(Tensor grad_output, Tensor input, Tensor weight, bool[] wanted, str backend) -> (Tensor, Tensor, Tensor)",
    fake=_fake_backward,
    limits=lambda *_: LIMITS,
)


class _PatchLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.backend = backend
        ctx.dtypes = dtypes_of(input, weight, bias)
        return below_autograd(FORWARD, input, weight, bias, backend)

    @staticmethod
    @gradient_of_output
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        wanted = list(ctx.needs_input_grad[:3])
        gradients = BACKWARD(grad_output, *ctx.saved_tensors, wanted, ctx.backend)
        return (*requested_gradients(gradients, wanted, ctx.dtypes), None)


CALL = differentiate(FORWARD, _PatchLinear)
