"""Depthwise convolution + LayerNorm in Triton: a program convolves whole pixels and normalises them in registers."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from convnext_kernels.ops.common.launch import launch
from convnext_kernels.ops.common.layouts import empty_statistic, from_channels_last, nothing, to_channels_last
from convnext_kernels.ops.depthwise_conv import triton_kernel as depthwise_conv
from convnext_kernels.ops.depthwise_conv.triton_kernel import (
    convolve_rows,
    filter_rows,
    pixel_indices,
    store_row,
    tile_count,
    tile_position,
)
from convnext_kernels.ops.depthwise_conv_layer_norm.configs import FUSED, MAXIMUM_FUSED_CHANNELS, width_class
from convnext_kernels.ops.depthwise_conv_layer_norm.two_steps import TwoSteps
from convnext_kernels.ops.layer_norm import triton_kernel as layer_norm
from convnext_kernels.ops.layer_norm.triton_kernel import affine, normalize

_two_steps = TwoSteps(depthwise_conv, layer_norm)
backward = _two_steps.backward


@triton.jit
def _finish_row(
    convolved,
    norm_weight_ptr,
    norm_bias_ptr,
    out_ptr,
    convolved_ptr,
    mean_ptr,
    rstd_ptr,
    image,
    row,
    columns,
    c,
    height,
    width,
    channels,
    eps,
):
    c_mask = c < channels
    normalized, mean, rstd = normalize(convolved, c_mask, channels, eps)
    out = affine(normalized, norm_weight_ptr, norm_bias_ptr, c, c_mask)
    store_row(out_ptr, out, image, row, columns, c, height, width, channels)
    if convolved_ptr is not None:
        store_row(convolved_ptr, convolved, image, row, columns, c, height, width, channels)
    if rstd_ptr is not None:
        indices, mask = pixel_indices(image, row, columns, height, width)
        tl.store(rstd_ptr + indices, rstd, mask=mask)
        if mean_ptr is not None:
            tl.store(mean_ptr + indices, mean, mask=mask)


@triton.jit(do_not_specialize=["height", "width"])
def fused_kernel(
    input_ptr,
    weight_ptr,
    bias_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    drop_path_factor_ptr,
    out_ptr,
    convolved_ptr,
    mean_ptr,
    rstd_ptr,
    height,
    width,
    channels,
    eps,
    SIZE: tl.constexpr,
    DILATION: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    image, row, columns = tile_position(tl.program_id(0), height, width, DILATION, BLOCK_W)
    c = tl.arange(0, BLOCK_C)
    row0, row1, row2, row3 = convolve_rows(
        input_ptr, weight_ptr, bias_ptr, drop_path_factor_ptr, image, row, columns, c, height, width, channels,
        SIZE, DILATION, False, BLOCK_W, BLOCK_C,
    )  # fmt: skip
    _finish_row(
        row0, norm_weight_ptr, norm_bias_ptr, out_ptr, convolved_ptr, mean_ptr, rstd_ptr,
        image, row, columns, c, height, width, channels, eps,
    )  # fmt: skip
    _finish_row(
        row1, norm_weight_ptr, norm_bias_ptr, out_ptr, convolved_ptr, mean_ptr, rstd_ptr,
        image, row + DILATION, columns, c, height, width, channels, eps,
    )  # fmt: skip
    _finish_row(
        row2, norm_weight_ptr, norm_bias_ptr, out_ptr, convolved_ptr, mean_ptr, rstd_ptr,
        image, row + 2 * DILATION, columns, c, height, width, channels, eps,
    )  # fmt: skip
    _finish_row(
        row3, norm_weight_ptr, norm_bias_ptr, out_ptr, convolved_ptr, mean_ptr, rstd_ptr,
        image, row + 3 * DILATION, columns, c, height, width, channels, eps,
    )  # fmt: skip


def _fused(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    dilation: int,
    eps: float,
    drop_path_factor: Tensor | None = None,
    convolved: Tensor | None = None,
    mean: Tensor | None = None,
    rstd: Tensor | None = None,
) -> Tensor:
    """The output; `convolved`, `mean` and `rstd` are filled where they are given."""
    _, height, width, channels = rows.shape
    config = FUSED(rows, width_class(width), channels, weight.shape[-1])
    output = rows.new_empty(rows.shape)
    launch(
        fused_kernel,
        (tile_count(rows, dilation, config.pixels),),
        rows,
        filter_rows(weight),
        bias,
        norm_weight,
        norm_bias,
        drop_path_factor,
        output,
        convolved,
        mean,
        rstd,
        height,
        width,
        channels,
        eps,
        SIZE=weight.shape[-1],
        DILATION=dilation,
        BLOCK_W=config.pixels,
        BLOCK_C=config.channels,
        warps=config.warps,
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
    """As the reference's `forward`: one kernel where whole pixels fit into registers, else two."""
    if input.shape[1] > MAXIMUM_FUSED_CHANNELS:
        return _two_steps.forward(input, weight, bias, norm_weight, norm_bias, dilation, eps, save)
    rows, parameters = to_channels_last(input), (weight, bias, norm_weight, norm_bias, dilation, eps)
    if not save:
        return _fused(rows, *parameters), nothing(input), nothing(input), nothing(input)
    convolved, mean, rstd = rows.new_empty(rows.shape), *(empty_statistic(rows) for _ in range(2))
    output = _fused(rows, *parameters, convolved=convolved, mean=mean, rstd=rstd)
    return output, from_channels_last(convolved), mean, rstd


def forward_normalized(
    input: Tensor, weight: Tensor, bias: Tensor | None, dilation: int, eps: float, drop_path_factor: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As the reference's `forward_normalized`: one kernel where `forward` is one."""
    if input.shape[1] > MAXIMUM_FUSED_CHANNELS:
        return _two_steps.forward_normalized(input, weight, bias, dilation, eps, drop_path_factor)
    rows = to_channels_last(input)
    rstd = empty_statistic(rows)
    return _fused(rows, weight, bias, None, None, dilation, eps, drop_path_factor, rstd=rstd), rstd
