"""The pointwise MLP on Triton's matrix product: two products forward, four backward, all else in their epilogues."""

from __future__ import annotations

import torch
from torch import Tensor

from convnext_kernels.ops.common.layouts import from_channels_last, nothing, to_channels_last
from convnext_kernels.ops.common.triton_matmul import Epilogue, long_matmul, matmul, matrix
from convnext_kernels.ops.mlp.reference import APPROXIMATE, parameter_gradients, scaled_weight2
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
    recompute_hidden: bool,
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
        Epilogue(
            bias=bias1,
            activation=activation,
            pre_activation=pre_activation,
            row_scale=drop_path_factor,
            rows_per_scale=_per_image(rows),
            scale_rows=False,
        ),
    )
    if grn_weight is not None and grn_bias is not None:
        hidden, _ = response_norm.forward(hidden.flatten(1, -2), grn_weight, grn_bias, grn_eps)
    output = rows.new_empty(rows.shape)
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
    """As the reference's `backward`, with the stochastic-depth factor in an epilogue and a prologue, not in a pass.

    A pre-activation that was not saved is a second product in the kernel that needs it; with grn, a product before.
    """
    rows, grads, dtype = to_channels_last(input), to_channels_last(grad_output).flatten(0, -2), input.dtype
    tokens, (hidden_width, width) = rows.flatten(0, -2), weight1.shape
    count, per_image = tokens.shape[0], _per_image(rows)
    shape, first_product = (count, hidden_width, width), (matrix(tokens), matrix(weight1.to(dtype)).transposed)
    gradients = [nothing(input) for _ in wanted]

    grad_pre, hidden = (rows.new_empty((rows.shape[0], per_image, hidden_width)) for _ in range(2))
    epilogue = Epilogue(row_scale=drop_path_factor, rows_per_scale=per_image)
    if grn_weight is None:
        epilogue = epilogue._replace(activation=activation, derivative=True, hidden=hidden)
        if pre_activation is None:
            epilogue = epilogue._replace(recomputed=first_product, bias=bias1)
        else:
            epilogue = epilogue._replace(pre_activation=pre_activation)
    elif pre_activation is None:
        pre_activation = torch.empty_like(hidden)
        matmul(*first_product, matrix(pre_activation.flatten(0, 1)), shape, Epilogue(bias=bias1))
    weight = matrix(scaled_weight2(weight2, layer_scale).to(dtype))
    matmul(matrix(grads), weight, matrix(grad_pre.flatten(0, 1)), shape, epilogue)

    if grn_weight is not None and grn_bias is not None and pre_activation is not None:
        approximate, pre_activation = APPROXIMATE[activation], pre_activation.view(hidden.shape)
        activated = torch.nn.functional.gelu(pre_activation, approximate=approximate)
        hidden, norms = response_norm.forward(activated, grn_weight, grn_bias, grn_eps)
        grad_hidden, gradients[6], gradients[7] = response_norm.backward(
            grad_pre, activated, grn_weight, norms, grn_eps, [True, *wanted[6:]]
        )
        grad_pre = torch.ops.aten.gelu_backward(grad_hidden, pre_activation, approximate=approximate)
    if any(wanted[3:6]):
        a, b = matrix(grads).transposed, matrix(hidden.flatten(0, 1))
        products, sums = long_matmul(a, b, (width, hidden_width, count), drop_path_factor, per_image)
        gradients[3:6] = parameter_gradients(products, sums, weight2, bias2, layer_scale)
    grad_pre = grad_pre.flatten(0, 1)
    if wanted[0]:
        grad_input = rows.new_empty(rows.shape)
        shape = (count, width, hidden_width)
        matmul(matrix(grad_pre), matrix(weight1.to(dtype)), matrix(grad_input.flatten(0, -2)), shape)
        gradients[0] = from_channels_last(grad_input)
    if wanted[1] or wanted[2]:
        gradients[1:3] = long_matmul(matrix(grad_pre).transposed, matrix(tokens), (hidden_width, width, count))
    return tuple(g if want else nothing(input) for g, want in zip(gradients, wanted, strict=True))
