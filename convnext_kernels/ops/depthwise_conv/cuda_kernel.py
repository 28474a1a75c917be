"""Depthwise convolution in CUDA C++: 16-bit types on tensor cores; see csrc/depthwise_conv."""

from __future__ import annotations

import torch
from torch import Tensor

from convnext_kernels.ops.common.cuda_launch import (
    address,
    as_float32,
    element_type,
    image_strides,
    images,
    launch,
    library,
    parameter_type,
    partial_sums,
    same_dtype,
)
from convnext_kernels.ops.common.layouts import from_channels_last, nothing, to_channels_last


def _convolve(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    drop_path_factor: Tensor | None,
    residual: Tensor | None,
    *,
    flip_filter: bool,
) -> Tensor:
    rows, parameters = images(input), same_dtype(weight, bias)
    residual_rows = None if residual is None else to_channels_last(residual)
    factor = as_float32(drop_path_factor)
    output = rows.new_empty(rows.shape)
    launch(
        "depthwise_conv_forward",
        rows.device,
        input=address(rows),
        weight=address(parameters[0]),
        bias=address(parameters[1]),
        residual=address(residual_rows),
        drop_path_factor=address(factor),
        output=address(output),
        input_strides=image_strides(rows),
        output_strides=image_strides(output),
        type=element_type(rows.dtype),
        parameter_type=parameter_type(rows.dtype, *parameters),
        shape=rows.shape,
        kernel_size=weight.shape[-1],
        flip_filter=flip_filter,
    )
    return from_channels_last(output)


def forward(
    input: Tensor, weight: Tensor, bias: Tensor | None, dilation: int, drop_path_factor: Tensor | None = None
) -> Tensor:
    """As the reference's `forward`, of dilation 1."""
    return _convolve(input, weight, bias, drop_path_factor, None, flip_filter=False)


def _parameter_gradients(
    grad_output: Tensor, input: Tensor, size: int, drop_path_factor: Tensor | None
) -> tuple[Tensor, Tensor]:
    grads, rows = images(grad_output), images(input)
    factor = as_float32(drop_path_factor)
    call = {"type": element_type(rows.dtype), "shape": rows.shape, "kernel_size": size}
    splits, channels = library().filter_gradient_splits(**call), rows.shape[-1]
    partials = rows.new_empty((splits, channels * (size * size + 1)), dtype=torch.float32)
    launch(
        "depthwise_conv_filter_gradient",
        rows.device,
        grad_output=address(grads),
        input=address(rows),
        drop_path_factor=address(factor),
        partials=address(partials),
        grad_output_strides=image_strides(grads),
        input_strides=image_strides(rows),
        **call,
    )
    sums = partial_sums(partials)
    return sums[:-channels].view(channels, 1, size, size), sums[-channels:]


def backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    dilation: int,
    wanted: list[bool],
    drop_path_factor: Tensor | None = None,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference's `backward`, of dilation 1."""
    grad_input, grad_weight, grad_bias = nothing(weight), nothing(weight), nothing(weight)
    if wanted[0]:
        grad_input = _convolve(grad_output, weight, None, drop_path_factor, residual, flip_filter=True)
    if wanted[1] or wanted[2]:
        weight_part, bias_part = _parameter_gradients(grad_output, input, weight.shape[-1], drop_path_factor)
        grad_weight = weight_part if wanted[1] else grad_weight
        grad_bias = bias_part if wanted[2] else grad_bias
    return grad_input, grad_weight, grad_bias
