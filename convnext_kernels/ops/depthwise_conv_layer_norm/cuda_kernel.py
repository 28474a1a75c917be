"""Depthwise convolution + LayerNorm in CUDA C++: one pass where whole pixels fit into shared memory, else two."""

from __future__ import annotations

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
    same_dtype,
)
from convnext_kernels.ops.common.layouts import empty_statistic, from_channels_last, nothing
from convnext_kernels.ops.depthwise_conv import cuda_kernel as depthwise_conv
from convnext_kernels.ops.depthwise_conv_layer_norm.two_steps import TwoSteps
from convnext_kernels.ops.layer_norm import cuda_kernel as layer_norm

_two_steps = TwoSteps(depthwise_conv, layer_norm)
backward = _two_steps.backward


def _in_one_pass(rows: Tensor, weight: Tensor) -> bool:
    return bool(
        library().in_one_pass(
            input=address(rows),
            input_strides=image_strides(rows),
            type=element_type(rows.dtype),
            shape=rows.shape,
            kernel_size=weight.shape[-1],
        )
    )


def _one_pass(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    drop_path_factor: Tensor | None = None,
    convolved: Tensor | None = None,
    mean: Tensor | None = None,
    rstd: Tensor | None = None,
) -> Tensor:
    """The output; `convolved`, `mean` and `rstd` are filled where they are given."""
    parameters, norm_parameters = same_dtype(weight, bias), same_dtype(norm_weight, norm_bias)
    factor = as_float32(drop_path_factor)
    output = rows.new_empty(rows.shape)
    launch(
        "depthwise_conv_layer_norm_forward",
        rows.device,
        input=address(rows),
        weight=address(parameters[0]),
        bias=address(parameters[1]),
        norm_weight=address(norm_parameters[0]),
        norm_bias=address(norm_parameters[1]),
        drop_path_factor=address(factor),
        output=address(output),
        convolved=address(convolved),
        mean=address(mean),
        rstd=address(rstd),
        input_strides=image_strides(rows),
        type=element_type(rows.dtype),
        parameter_type=parameter_type(rows.dtype, *parameters),
        norm_parameter_type=parameter_type(rows.dtype, *norm_parameters),
        shape=rows.shape,
        kernel_size=weight.shape[-1],
        eps=eps,
    )
    return from_channels_last(output)


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
    rows, parameters = images(input), (weight, bias, norm_weight, norm_bias)
    if not _in_one_pass(rows, weight):
        return _two_steps.forward(input, *parameters, dilation, eps, save)
    if not save:
        return _one_pass(rows, *parameters, eps), nothing(input), nothing(input), nothing(input)
    convolved, mean, rstd = rows.new_empty(rows.shape), *(empty_statistic(rows) for _ in range(2))
    output = _one_pass(rows, *parameters, eps, convolved=convolved, mean=mean, rstd=rstd)
    return output, from_channels_last(convolved), mean, rstd


def forward_normalized(
    input: Tensor, weight: Tensor, bias: Tensor | None, dilation: int, eps: float, drop_path_factor: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As the reference's `forward_normalized`, of dilation 1."""
    rows = images(input)
    if not _in_one_pass(rows, weight):
        return _two_steps.forward_normalized(input, weight, bias, dilation, eps, drop_path_factor)
    rstd = empty_statistic(rows)
    return _one_pass(rows, weight, bias, None, None, eps, drop_path_factor, rstd=rstd), rstd
