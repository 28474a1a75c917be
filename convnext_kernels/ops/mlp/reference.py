"""The definition of the pointwise MLP and its gradients in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from convnext_kernels.ops.common.layouts import (
    at_least_float32,
    from_channels_last,
    nothing,
    statistics_dtype,
    to_channels_last,
)
from convnext_kernels.ops.response_norm import reference as response_norm

APPROXIMATE = {"gelu": "none", "gelu_tanh": "tanh"}
"""PyTorch's names of the two GELUs."""


def branch_scale(rows: Tensor, layer_scale: Tensor | None, drop_path_factor: Tensor | None) -> Tensor | None:
    """layer_scale * drop_path_factor, shaped to multiply rows [N, ..., C]; None if both are."""
    if drop_path_factor is not None:
        drop_path_factor = at_least_float32(drop_path_factor).view(-1, *[1] * (rows.dim() - 1))
    if layer_scale is not None:
        layer_scale = at_least_float32(layer_scale)
    if layer_scale is None or drop_path_factor is None:
        return drop_path_factor if layer_scale is None else layer_scale
    return layer_scale * drop_path_factor


def parameter_gradients(
    products: Tensor, grad_sums: Tensor, weight2: Tensor, bias2: Tensor | None, layer_scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of weight2, bias2 and layer_scale from products = gs' hidden [C, hidden] and grad_sums = sum(gs) [C].

    gs is the output's gradient times the stochastic-depth factor. layer_scale's gradient needs no output of the branch:

        grad_layer_scale = rowsum(products * weight2) + bias2 * grad_sums
    """
    if layer_scale is None:
        return products, grad_sums, nothing(products)
    grad_layer_scale = (products * weight2.to(products.dtype)).sum(1)
    if bias2 is not None:
        grad_layer_scale = grad_layer_scale + bias2.to(products.dtype) * grad_sums
    layer_scale = layer_scale.to(products.dtype)
    return layer_scale[:, None] * products, layer_scale * grad_sums, grad_layer_scale


def forward(
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
    save: bool,
) -> tuple[Tensor, Tensor]:
    """Output, and where `save` asks for it the pre-activation [N, ..., hidden]; see `mlp`."""
    rows, dtype = to_channels_last(input), input.dtype
    bias1, bias2 = (None if bias is None else bias.to(dtype) for bias in (bias1, bias2))
    pre_activation = F.linear(rows, weight1.to(dtype), bias1)
    approximate = APPROXIMATE[activation]
    if save:
        hidden = F.gelu(pre_activation, approximate=approximate)
    else:
        hidden = torch.ops.aten.gelu_(pre_activation, approximate=approximate)
    if grn_weight is not None and grn_bias is not None:
        hidden, _ = response_norm.forward(hidden.flatten(1, -2), grn_weight, grn_bias, grn_eps)
        hidden = hidden.view(pre_activation.shape)
    output = F.linear(hidden, weight2.to(dtype), bias2)
    scale = branch_scale(rows, layer_scale, drop_path_factor)
    if residual is not None:
        shortcut = at_least_float32(to_channels_last(residual))
        branch = at_least_float32(output)
        output = shortcut + branch if scale is None else torch.addcmul(shortcut, branch, scale)
    elif scale is not None:
        output = output * scale
    return from_channels_last(output.to(dtype)), pre_activation if save else nothing(input)


def backward(
    grad_output: Tensor,
    input: Tensor,
    pre_activation: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    bias2: Tensor | None,
    layer_scale: Tensor | None,
    drop_path_factor: Tensor | None,
    grn_weight: Tensor | None,
    grn_bias: Tensor | None,
    grn_eps: float,
    activation: str,
    wanted: list[bool],
) -> tuple[Tensor, ...]:
    """Gradients of input, weight1, bias1, weight2, bias2, layer_scale, grn_weight and grn_bias, the parameters' in float32.

    With p the pre-activation, h = gelu(p), v = grn(h) or h, u the input and gs = drop_path_factor grad_output:

        dv = gs diag(layer_scale) weight2,  dh = grn'(dv),  dp = dh * gelu'(p)
        grad_input = dp weight1,  grad_weight1 = dp' u,  grad_bias1 = sum(dp)

    and `parameter_gradients` of gs' v for the others.
    """
    want_input, want_weight1, want_bias1, want_weight2, want_bias2, want_scale, *want_grn = wanted
    dtype, statistics = input.dtype, statistics_dtype(input)
    tokens = to_channels_last(input).flatten(0, -2)
    approximate = APPROXIMATE[activation]
    grads = to_channels_last(grad_output)
    if drop_path_factor is not None:
        grads = (grads * branch_scale(grads, None, drop_path_factor)).to(dtype)
    grads = grads.flatten(0, -2)
    gradients = [nothing(input) for _ in wanted]

    hidden_shape = pre_activation.flatten(1, -2).shape
    if want_weight2 or want_scale or any(want_grn) or grn_weight is not None:
        hidden = F.gelu(pre_activation, approximate=approximate).view(hidden_shape)
    if grn_weight is not None and grn_bias is not None:
        normalized, norms = response_norm.forward(hidden, grn_weight, grn_bias, grn_eps)
    elif want_weight2 or want_scale:
        normalized = hidden

    if want_weight2 or want_bias2 or want_scale:
        sums = grads.sum(0, dtype=statistics)
        gradients[4] = sums if layer_scale is None else sums * layer_scale
        if want_weight2 or want_scale:
            products = (grads.t() @ normalized.flatten(0, 1)).to(statistics)
            gradients[3:6] = parameter_gradients(products, sums, weight2, bias2, layer_scale)

    if want_input or want_weight1 or want_bias1 or any(want_grn):
        scaled = weight2 if layer_scale is None else at_least_float32(layer_scale)[:, None] * weight2
        grad_hidden = (grads @ scaled.to(dtype)).view(hidden_shape)
        if grn_weight is not None:
            needs = [want_input or want_weight1 or want_bias1, *want_grn]
            grad_hidden, gradients[6], gradients[7] = response_norm.backward(
                grad_hidden, hidden, grn_weight, norms, grn_eps, needs
            )
    if want_input or want_weight1 or want_bias1:
        pre_activation = pre_activation.view(hidden_shape)
        grad_pre = torch.ops.aten.gelu_backward(grad_hidden, pre_activation, approximate=approximate).flatten(0, 1)
        if want_input:
            gradients[0] = from_channels_last((grad_pre @ weight1.to(dtype)).view(to_channels_last(input).shape))
        if want_weight1:
            gradients[1] = (grad_pre.t() @ tokens).to(statistics)
        if want_bias1:
            gradients[2] = grad_pre.sum(0, dtype=statistics)
    return tuple(g if want else nothing(input) for g, want in zip(gradients, wanted, strict=True))
