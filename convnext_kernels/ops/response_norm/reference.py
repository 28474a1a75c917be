"""The definition of global response normalisation and its gradients in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from convnext_kernels.ops.common.layouts import (
    at_least_float32,
    from_channels_last,
    nothing,
    statistics_dtype,
    to_channels_last,
)


def scales(norms: Tensor, weight: Tensor, eps: float) -> Tensor:
    """What each channel of each image is multiplied by: 1 + weight G / (mean_c(G) + eps), [N, C]."""
    return 1 + at_least_float32(weight) * norms / (norms.mean(1, keepdim=True) + eps)


def input_coefficients(norms: Tensor, dots: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The factor of the input in its own gradient, [N, C], from dots[n, c] = sum over tokens of grad_output * input.

    With M = mean_c(G) + eps, D = weight dots = d loss / d (G / M):

        d loss / d G = D / M - sum_c(D G) / (C M^2),      d G / d input = input / G  (0 where G = 0)
    """
    mean = norms.mean(1, keepdim=True) + eps
    grad_ratio = at_least_float32(weight) * dots
    grad_norms = grad_ratio / mean - (grad_ratio * norms).sum(1, keepdim=True) / (norms.shape[1] * mean.square())
    return torch.where(norms == 0, 0, grad_norms / norms)


def weight_gradient(norms: Tensor, dots: Tensor, eps: float) -> Tensor:
    """sum over images of dots G / (mean_c(G) + eps), [C]."""
    return (dots * norms / (norms.mean(1, keepdim=True) + eps)).sum(0)


def _tokens(tensor: Tensor) -> Tensor:
    return at_least_float32(to_channels_last(tensor)).flatten(1, -2)


def forward(input: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Output and the norms G [N, C] in float32; see `global_response_norm`."""
    rows = to_channels_last(input)
    tokens = at_least_float32(rows).flatten(1, -2)
    norms = torch.linalg.vector_norm(tokens, dim=1)
    output = torch.addcmul(at_least_float32(bias), tokens, scales(norms, weight, eps).unsqueeze(1))
    return from_channels_last(output.to(input.dtype).view(rows.shape)), norms


def backward(
    grad_output: Tensor, input: Tensor, weight: Tensor, norms: Tensor, eps: float, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, weight and bias (both in float32):

    grad_input = grad_output * scales + input * input_coefficients
    """
    grads, tokens = _tokens(grad_output), _tokens(input)
    grad_input, grad_weight, grad_bias = nothing(input), nothing(input), nothing(input)
    if wanted[0] or wanted[1]:
        dots = (grads * tokens).sum(1)
    if wanted[0]:
        coefficients = input_coefficients(norms, dots, weight, eps).unsqueeze(1)
        grad_tokens = torch.addcmul(grads * scales(norms, weight, eps).unsqueeze(1), tokens, coefficients)
        shape = to_channels_last(input).shape
        grad_input = from_channels_last(grad_tokens.to(input.dtype).view(shape))
    if wanted[1]:
        grad_weight = weight_gradient(norms, dots, eps)
    if wanted[2]:
        grad_bias = grads.sum((0, 1), dtype=statistics_dtype(input))
    return grad_input, grad_weight, grad_bias
