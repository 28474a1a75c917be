"""Schema, fake, gradient and choice of backend of LayerNorm over channels."""

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

MAXIMUM_TRITON_CHANNELS = 8192
"""The Triton kernel holds a whole token in registers."""


def channel_limits(width: int) -> dict[str, list[str]]:
    """What a number of channels has against each backend."""
    triton = []
    if width > MAXIMUM_TRITON_CHANNELS:
        triton.append(f"{width} channels; the Triton kernel holds up to {MAXIMUM_TRITON_CHANNELS} in registers")
    return {"cuda": [], "triton": triton, "reference": []}


CUDA_VECTORS = 3 * 256
"""Of 16 bytes, that the threads of a block hold of one token; see csrc/layer_norm/tokens.cuh."""


def channel_notes(input: Tensor) -> dict[str, list[str]]:
    """Why the CUDA kernels read a channel at a time, or a token more than once."""
    width, vector, notes = channels(input), 16 // input.element_size(), []
    if width % vector:
        notes.append(f"one channel at a time: {width} channels are no multiple of {vector}")
        vector = 1
    if width > CUDA_VECTORS * vector:
        notes.append(f"each token is read again: of {width} channels registers hold {CUDA_VECTORS * vector}")
    return {"cuda": notes}


def _fake_forward(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, save: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    tokens = input.numel() // channels(input)
    if not save:
        return empty_like(input), nothing(input), nothing(input)
    dtype = statistics_dtype(input)
    return empty_like(input), input.new_empty(tokens, dtype=dtype), input.new_empty(tokens, dtype=dtype)


def _fake_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    wanted: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        empty_like(input) if wanted[0] else nothing(input),
        mean.new_empty(channels(input)) if wanted[1] else nothing(input),
        mean.new_empty(channels(input)) if wanted[2] else nothing(input),
    )


FORWARD = define(
    "layer_norm",
    "layer_norm",
    "forward",
    "(Tensor input, Tensor? weight, Tensor? bias, float eps, bool save, str backend) -> (Tensor, Tensor, Tensor)",
    fake=_fake_forward,
    limits=lambda input, *_: channel_limits(channels(input)),
    notes=lambda input, *_: channel_notes(input),
)

BACKWARD = define(
    "layer_norm",
    "layer_norm_backward",
    "backward",
    "(Tensor grad_output, Tensor input, Tensor? weight, Tensor mean, Tensor rstd, bool[] wanted, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    fake=_fake_backward,
    limits=lambda grad_output, *_: channel_limits(channels(grad_output)),
)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, save: bool, backend: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        output, mean, rstd = below_autograd(FORWARD, input, weight, bias, eps, True, backend)
        ctx.save_for_backward(input, weight, mean, rstd)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(mean, rstd)
        ctx.backend = backend
        ctx.dtypes = dtypes_of(input, weight, bias)
        return output, mean, rstd

    @staticmethod
    @gradient_of_output
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, mean, rstd = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[:3])
        gradients = BACKWARD(grad_output, input, weight, mean, rstd, wanted, ctx.backend)
        return (*requested_gradients(gradients, wanted, ctx.dtypes), None, None, None)


CALL = differentiate(FORWARD, _LayerNorm)
