"""The patch embedding on Triton's matrix product: patches are read and written where they lie in the image."""

from __future__ import annotations

from torch import Tensor

from convnext_kernels.ops.common.layouts import from_channels_last, nothing, to_channels_last
from convnext_kernels.ops.common.triton_matmul import Epilogue, long_matmul, matmul, matrix, patches
from convnext_kernels.ops.patch_linear.reference import patch_weight, weight_from_patches


def forward(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As the reference's `forward`."""
    rows, (outputs, _, size, _) = to_channels_last(input), weight.shape
    matrix_weight = patch_weight(weight, input.dtype)
    batch, height, width, _ = rows.shape
    output = rows.new_empty((batch, height // size, width // size, outputs))
    tokens = output.flatten(0, 2)
    shape = (tokens.shape[0], outputs, matrix_weight.shape[1])
    matmul(patches(rows, size), matrix(matrix_weight).transposed, matrix(tokens), shape, Epilogue(bias=bias))
    return from_channels_last(output)


def backward(grad_output: Tensor, input: Tensor, weight: Tensor, wanted: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference's `backward`."""
    rows, (outputs, _, size, _) = to_channels_last(input), weight.shape
    grads = to_channels_last(grad_output).flatten(0, 2)
    grad_input, grad_weight, grad_bias = nothing(input), nothing(input), nothing(input)
    count, patch_size = grads.shape[0], weight[0].numel()
    if wanted[0]:
        # Pixels beyond the last whole patch belong to none: they alone need the zeros.
        whole = rows.shape[1] % size == 0 and rows.shape[2] % size == 0
        grad_rows = rows.new_empty(rows.shape) if whole else rows.new_zeros(rows.shape)
        matrix_weight = patch_weight(weight, input.dtype)
        matmul(matrix(grads), matrix(matrix_weight), patches(grad_rows, size), (count, patch_size, outputs))
        grad_input = from_channels_last(grad_rows)
    if wanted[1] or wanted[2]:
        product, sums = long_matmul(matrix(grads).transposed, patches(rows, size), (outputs, patch_size, count))
        grad_weight = weight_from_patches(product, weight) if wanted[1] else grad_weight
        grad_bias = sums if wanted[2] else grad_bias
    return grad_input, grad_weight, grad_bias
