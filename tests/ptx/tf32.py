"""PyTorch's products of float32 tensors as a GPU makes them with TF32, on a CPU: what ours are then compared with."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from ptx.values import round_to_tf32
from torch import Tensor

from convnext_kernels import parity


def _rounded(tensor: Tensor) -> Tensor:
    return torch.from_numpy(round_to_tf32(tensor.detach().contiguous().numpy()))


class _Linear(torch.autograd.Function):
    """Every product of forward and backward with both operands rounded."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        input, weight = _rounded(input), _rounded(weight)
        ctx.save_for_backward(input, weight)
        ctx.has_bias = bias is not None
        return F.linear(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        rounded = _rounded(grad)
        grad_weight = rounded.flatten(0, -2).t() @ input.flatten(0, -2)
        return rounded @ weight, grad_weight, grad.flatten(0, -2).sum(0) if ctx.has_bias else None


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return _Linear.apply(input, weight, bias) if input.dtype == torch.float32 else F.linear(input, weight, bias)


def _conv2d(input: Tensor, weight: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
    """The patches of a stem or a downsampling are rows of a product; depthwise convolutions have none."""
    stride = options.get("stride", 1)
    if input.dtype != torch.float32 or stride == 1:
        return F.conv2d(input, weight, bias, **options)
    height, width = (size // stride for size in input.shape[2:])
    rows = F.unfold(input[..., : height * stride, : width * stride], stride, stride=stride).transpose(1, 2)
    return _linear(rows, weight.flatten(1), bias).transpose(1, 2).unflatten(2, (height, width))


class _Functional:
    linear, conv2d = staticmethod(_linear), staticmethod(_conv2d)

    def __getattr__(self, name: str) -> Any:
        return getattr(F, name)


def rounded() -> AbstractContextManager[Any]:
    """Within the context `parity`'s definitions, and so PyTorch's own error, have products in TF32."""
    return patch.object(parity, "F", _Functional())
