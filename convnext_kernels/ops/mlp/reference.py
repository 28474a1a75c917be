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
from convnext_kernels.ops.common.products import linear
from convnext_kernels.ops.response_norm import reference as response_norm

APPROXIMATE = {"gelu": "none", "gelu_tanh": "tanh"}
"""PyTorch's names of the two GELUs."""


def branch_scale(rows: Tensor, layer_scale: Tensor | None, drop_path_factor: Tensor | None) -> Tensor | None:
    """layer_scale * drop_path_factor, shaped to multiply rows [N, ..., C]; None if both are."""
    if drop_path_factor is None:
        return None if layer_scale is None else at_least_float32(layer_scale)
    factor = at_least_float32(drop_path_factor).view(-1, *[1] * (rows.dim() - 1))
    return factor if layer_scale is None else at_least_float32(layer_scale) * factor


def scaled_weight2(weight2: Tensor, layer_scale: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """diag(layer_scale) weight2 in a dtype: the output's gradient times it is that of the hidden activations.

    At the 1e-6 that layer scale starts from it is less than float16's smallest number: there it is divided by the
    second result, a power of two [1] in float32, which either the gradient or the product is multiplied by.
    """
    if layer_scale is None:
        return weight2.to(dtype), None
    layer_scale, power = at_least_float32(layer_scale), None
    if dtype == torch.float16:
        largest = torch.linalg.vector_norm(layer_scale, torch.inf, keepdim=True)
        # Its exponent alone. Found on the device: its value on the host would be a synchronisation.
        power = (largest.view(torch.int32) & 0x7F800000).view(torch.float32)
        power = torch.where(power > 0, power, 1.0)
        layer_scale = layer_scale / power
    # One kernel: the product is not written in float32 first.
    return torch.mul(layer_scale[:, None], weight2, out=weight2.new_empty(weight2.shape, dtype=dtype)), power


def parameter_gradients(
    products: Tensor, grad_sums: Tensor, weight2: Tensor, bias2: Tensor | None, layer_scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of weight2, bias2 and layer_scale from products = gs' hidden [C, hidden] and grad_sums = sum(gs) [C].

    gs is the output's gradient times the stochastic-depth factor. layer_scale's gradient needs no output of the branch:

        grad_layer_scale = rowsum(products * weight2) + bias2 * grad_sums
    """
    if layer_scale is None:
        return products, grad_sums, nothing(products)
    grad_layer_scale = (products * weight2).sum(1)
    if bias2 is not None:
        grad_layer_scale = grad_layer_scale + bias2.to(products.dtype) * grad_sums
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
    recompute_hidden: bool,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """Output, in a residual's dtype if there is one, and where `save` asks for it the pre-activation [N, ..., hidden].

    See `mlp`, where the residual has the input's dtype.
    """
    rows, dtype = to_channels_last(input), input.dtype
    bias1, bias2 = (None if bias is None else bias.to(dtype) for bias in (bias1, bias2))
    pre_activation = linear(rows, weight1.to(dtype), bias1)
    approximate = APPROXIMATE[activation]
    if save:
        hidden = F.gelu(pre_activation, approximate=approximate)
    else:
        hidden = torch.ops.aten.gelu_(pre_activation, approximate=approximate)
    if grn_weight is not None and grn_bias is not None:
        hidden, _ = response_norm.forward(hidden.flatten(1, -2), grn_weight, grn_bias, grn_eps)
        hidden = hidden.view(pre_activation.shape)
    output = linear(hidden, weight2.to(dtype), bias2)
    scale = branch_scale(rows, layer_scale, drop_path_factor)
    if residual is not None:
        shortcut = at_least_float32(to_channels_last(residual))
        branch = at_least_float32(output)
        output = shortcut + branch if scale is None else torch.addcmul(shortcut, branch, scale)
    elif scale is not None:
        output = output * scale
    dtype = dtype if residual is None else residual.dtype
    return from_channels_last(output.to(dtype)), pre_activation if save else nothing(input)


def backward(
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
) -> tuple[Tensor, ...]:
    """Gradients of input and, in float32, weight1, bias1, weight2, bias2, layer_scale, grn_weight and grn_bias.

    With p the pre-activation, h = gelu(p), v = grn(h) or h, u the input and gs = drop_path_factor grad_output:

        dv = gs diag(layer_scale) weight2,  dh = grn'(dv),  dp = dh * gelu'(p)
        grad_input = dp weight1,  grad_weight1 = dp' u,  grad_bias1 = sum(dp)

    and `parameter_gradients` of gs' v for the others. A pre-activation that was not saved is computed again.
    """
    rows, grads, statistics = to_channels_last(input), to_channels_last(grad_output), statistics_dtype(input)
    if pre_activation is None:
        bias1 = None if bias1 is None else bias1.to(input.dtype)
        pre_activation = linear(rows, weight1.to(input.dtype), bias1)
    weight, power = scaled_weight2(weight2, layer_scale, input.dtype)
    factor = branch_scale(grads, power, drop_path_factor)
    if factor is not None:
        grads = (grads * factor).to(input.dtype)
    grads, pre_activation = grads.flatten(0, -2), pre_activation.flatten(1, -2)
    gradients = [nothing(input) for _ in wanted]

    hidden = normalized = F.gelu(pre_activation, approximate=APPROXIMATE[activation])
    if grn_weight is not None and grn_bias is not None:
        normalized, norms = response_norm.forward(hidden, grn_weight, grn_bias, grn_eps)
    if any(wanted[3:6]):
        products, sums = (grads.t() @ normalized.flatten(0, 1)).to(statistics), grads.sum(0, dtype=statistics)
        if power is not None:
            products, sums = products / power, sums / power
        gradients[3:6] = parameter_gradients(products, sums, weight2, bias2, layer_scale)
    if any(wanted[:3]) or any(wanted[6:]):
        grad_hidden = linear(grads, weight.t()).view(pre_activation.shape)
        if grn_weight is not None:
            wanted_grn = [any(wanted[:3]), *wanted[6:]]
            grad_hidden, gradients[6], gradients[7] = response_norm.backward(
                grad_hidden, hidden, grn_weight, norms, grn_eps, wanted_grn
            )
    if any(wanted[:3]):
        # In place: a CPU spends about as long on the page faults of a fresh tensor of this size as on its values.
        torch.ops.aten.gelu_backward.grad_input(
            grad_hidden, pre_activation, approximate=APPROXIMATE[activation], grad_input=grad_hidden
        )
        grad_pre = grad_hidden.flatten(0, 1)
        if wanted[0]:
            gradients[0] = from_channels_last(linear(grad_pre, weight1.to(input.dtype).t()).view(rows.shape))
        if wanted[1]:
            gradients[1] = (grad_pre.t() @ rows.flatten(0, -2)).to(statistics)
        if wanted[2]:
            gradients[2] = grad_pre.sum(0, dtype=statistics)
    return tuple(g if want else nothing(input) for g, want in zip(gradients, wanted, strict=True))
