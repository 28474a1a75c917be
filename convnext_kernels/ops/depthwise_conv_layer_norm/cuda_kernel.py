"""Depthwise convolution + LayerNorm in CUDA C++: one pass where whole pixels fit into shared memory, else two."""

from __future__ import annotations

import torch
from torch import Tensor

from convnext_kernels.ops.common.cuda_launch import (
    address,
    element_type,
    image_strides,
    images,
    launch,
    library,
    parameter_type,
    same_dtype,
)
from convnext_kernels.ops.common.layouts import from_channels_last, nothing
from convnext_kernels.ops.depthwise_conv import cuda_kernel as depthwise_conv
from convnext_kernels.ops.depthwise_conv_layer_norm.two_steps import TwoSteps
from convnext_kernels.ops.layer_norm import cuda_kernel as layer_norm

_two_steps = TwoSteps(depthwise_conv, layer_norm)
backward = _two_steps.backward


def forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    dilation: int,
    eps: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As the reference's `forward`, of dilation 1."""
    rows = images(input)
    call = {
        "input": address(rows),
        "input_strides": image_strides(rows),
        "type": element_type(rows.dtype),
        "shape": rows.shape,
        "kernel_size": weight.shape[-1],
    }
    if not library().in_one_pass(**call):
        return _two_steps.forward(input, weight, bias, norm_weight, norm_bias, dilation, eps, save)
    parameters, norm_parameters = same_dtype(weight, bias), same_dtype(norm_weight, norm_bias)
    output, pixels = rows.new_empty(rows.shape), rows.numel() // rows.shape[-1]
    convolved = rows.new_empty(rows.shape) if save else None
    mean, rstd = (rows.new_empty(pixels, dtype=torch.float32) if save else None for _ in range(2))
    launch(
        "depthwise_conv_layer_norm_forward",
        rows.device,
        weight=address(parameters[0]),
        bias=address(parameters[1]),
        norm_weight=address(norm_parameters[0]),
        norm_bias=address(norm_parameters[1]),
        drop_path_factor=0,
        output=address(output),
        convolved=address(convolved),
        mean=address(mean),
        rstd=address(rstd),
        parameter_type=parameter_type(rows.dtype, *parameters),
        norm_parameter_type=parameter_type(rows.dtype, *norm_parameters),
        eps=eps,
        **call,
    )
    output = from_channels_last(output)
    if convolved is None or mean is None or rstd is None:
        return output, nothing(input), nothing(input), nothing(input)
    return output, from_channels_last(convolved), mean, rstd
