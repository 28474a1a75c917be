"""The pointwise MLP on Triton's matrix product: two products forward, four backward, all else in their epilogues."""

from __future__ import annotations

import torch
from torch import Tensor

from convnext_kernels.ops.common.layouts import from_channels_last, nothing, to_channels_last
from convnext_kernels.ops.common.triton_matmul import Epilogue, long_matmul, matmul, matrix
from convnext_kernels.ops.mlp.reference import APPROXIMATE, parameter_gradients
from convnext_kernels.ops.response_norm import triton_kernel as response_norm


def _per_image(rows: Tensor) -> int:
    return rows[0].numel() // rows.shape[-1] if rows.shape[0] else 1


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
    """As the reference's `forward`."""
    rows, dtype = to_channels_last(input), input.dtype
    tokens, width, hidden_width = rows.flatten(0, -2), rows.shape[-1], weight1.shape[0]
    count = tokens.shape[0]
    hidden = rows.new_empty((*rows.shape[:-1], hidden_width))
    pre_activation = torch.empty_like(hidden) if save else None
    matmul(
        matrix(tokens),
        matrix(weight1.to(dtype)).transposed,
        matrix(hidden.flatten(0, -2)),
        (count, hidden_width, width),
        Epilogue(bias=bias1, activation=activation, pre_activation=pre_activation),
    )
    if grn_weight is not None and grn_bias is not None:
        hidden, _ = response_norm.forward(hidden.flatten(1, -2), grn_weight, grn_bias, grn_eps)
    output = torch.empty_like(rows, memory_format=torch.contiguous_format)
    matmul(
        matrix(hidden.view(count, hidden_width)),
        matrix(weight2.to(dtype)).transposed,
        matrix(output.flatten(0, -2)),
        (count, width, hidden_width),
        Epilogue(
            bias=bias2,
            column_scale=layer_scale,
            row_scale=drop_path_factor,
            rows_per_scale=_per_image(rows),
            residual=None if residual is None else to_channels_last(residual),
        ),
    )
    return from_channels_last(output), nothing(input) if pre_activation is None else pre_activation


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
    """As the reference's `backward`. The stochastic-depth factor enters in an epilogue and a prologue, not as a pass."""
    want_input, want_weight1, want_bias1, want_weight2, want_bias2, want_scale, *want_grn = wanted
    rows, grads, dtype = to_channels_last(input), to_channels_last(grad_output).flatten(0, -2), input.dtype
    tokens, (hidden_width, width) = rows.flatten(0, -2), weight1.shape
    count, per_image = tokens.shape[0], _per_image(rows)
    gradients = [nothing(input) for _ in wanted]
    want_branch2 = want_weight2 or want_bias2 or want_scale
    want_branch1 = want_input or want_weight1 or want_bias1
    has_grn = grn_weight is not None and grn_bias is not None

    scaled_weight2 = (weight2 if layer_scale is None else layer_scale.float()[:, None] * weight2).to(dtype)
    pre_activation = pre_activation.view(count, hidden_width)
    grad_pre = torch.empty_like(pre_activation)
    hidden = torch.empty_like(pre_activation) if want_branch2 or has_grn else None
    epilogue = Epilogue(
        activation=activation,
        pre_activation=pre_activation,
        derivative=True,
        hidden=hidden,
        row_scale=drop_path_factor,
        rows_per_scale=per_image,
    )
    if has_grn:
        hidden = torch.nn.functional.gelu(pre_activation, approximate=APPROXIMATE[activation])
        epilogue = Epilogue(row_scale=drop_path_factor, rows_per_scale=per_image)
    matmul(matrix(grads), matrix(scaled_weight2), matrix(grad_pre), (count, hidden_width, width), epilogue)

    if has_grn:
        images = (rows.shape[0], -1, hidden_width) if count else (0, 1, hidden_width)
        normalized, norms = response_norm.forward(hidden.view(images), grn_weight, grn_bias, grn_eps)
        grad_hidden, gradients[6], gradients[7] = response_norm.backward(
            grad_pre.view(images), hidden.view(images), grn_weight, norms, grn_eps, [want_branch1, *want_grn]
        )
        hidden = normalized.view(count, hidden_width)
        if want_branch1:
            grad_pre = torch.ops.aten.gelu_backward(
                grad_hidden.view(count, hidden_width), pre_activation, approximate=APPROXIMATE[activation]
            )
    if want_branch2:
        products, sums = long_matmul(
            matrix(grads).transposed, matrix(hidden), (width, hidden_width, count), drop_path_factor, per_image
        )
        gradients[3:6] = parameter_gradients(products, sums, weight2, bias2, layer_scale)
    if want_input:
        grad_input = torch.empty_like(rows, memory_format=torch.contiguous_format)
        shape = (count, width, hidden_width)
        matmul(matrix(grad_pre), matrix(weight1.to(dtype)), matrix(grad_input.flatten(0, -2)), shape)
        gradients[0] = from_channels_last(grad_input)
    if want_weight1 or want_bias1:
        gradients[1:3] = long_matmul(matrix(grad_pre).transposed, matrix(tokens), (hidden_width, width, count))
    return tuple(g if want else nothing(input) for g, want in zip(gradients, wanted, strict=True))
