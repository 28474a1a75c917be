"""Depthwise convolution in Triton, on CUDA cores, channels-last."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from convnext_kernels.ops.common.launch import launch, next_power_of_2, round_up
from convnext_kernels.ops.common.layouts import from_channels_last, nothing, to_channels_last
from convnext_kernels.ops.depthwise_conv.configs import FORWARD, ROWS, WEIGHT_GRADIENT, split_count, width_class


@triton.jit
def _load_row(pixel_ptrs, y, row_stride, columns_mask, height):
    """Pixels of row y in float32; pixel_ptrs point to row 0. Zeros outside the image."""
    mask = columns_mask & ((y >= 0) & (y < height))[:, None]
    return tl.load(pixel_ptrs + (y.to(tl.int64) * row_stride)[:, None], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def convolve_rows(
    input_ptr,
    weight_ptr,
    bias_ptr,
    drop_path_factor_ptr,
    image,
    row,
    columns,
    c,
    height,
    width,
    channels,
    SIZE: tl.constexpr,
    DILATION: tl.constexpr,
    FLIP: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Output rows row, row + DILATION, ... four in all, [BLOCK_W, BLOCK_C] in float32. weight is [SIZE SIZE, channels].

    At each filter column a window of four input rows slides down the filter: a row is loaded once for the four output
    rows that it meets, and a tap once for all four. Only the filter's rows are unrolled; all taps unrolled took 20 s to
    compile for 7x7 and 125 s, and 14 KB of spills, for 11x11.

    Of an image whose drop_path_factor is 0 nothing is read: zeros.
    """
    c_mask = c < channels
    out0 = tl.zeros((BLOCK_W, BLOCK_C), dtype=tl.float32)
    out1, out2, out3 = out0, out0, out0
    radius: tl.constexpr = DILATION * (SIZE // 2)
    top, row_stride = row - radius, width * channels
    image_ptr = input_ptr + image.to(tl.int64) * height * row_stride
    first = 0
    if drop_path_factor_ptr is not None:
        first = tl.where(tl.load(drop_path_factor_ptr + image).to(tl.float32) != 0, 0, SIZE)
    for j in range(first, SIZE):
        x = columns + j * DILATION - radius
        pixel_ptrs = image_ptr + x[:, None] * channels + c[None, :]
        mask = ((x >= 0) & (x < width))[:, None] & c_mask[None, :]
        row0 = _load_row(pixel_ptrs, top, row_stride, mask, height)
        row1 = _load_row(pixel_ptrs, top + DILATION, row_stride, mask, height)
        row2 = _load_row(pixel_ptrs, top + 2 * DILATION, row_stride, mask, height)
        for i in tl.static_range(SIZE):
            row3 = _load_row(pixel_ptrs, top + (i + 3) * DILATION, row_stride, mask, height)
            tap = SIZE * SIZE - 1 - (i * SIZE + j) if FLIP else i * SIZE + j
            weight = tl.load(weight_ptr + tap * channels + c, mask=c_mask, other=0.0).to(tl.float32)[None, :]
            out0 += row0 * weight
            out1 += row1 * weight
            out2 += row2 * weight
            out3 += row3 * weight
            row0, row1, row2 = row1, row2, row3
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + c, mask=c_mask, other=0.0).to(tl.float32)[None, :]
        if drop_path_factor_ptr is not None:
            # Volatile, that is again: kept over the loop it spills 8 bytes.
            factor = tl.load(drop_path_factor_ptr + image, volatile=True).to(tl.float32)
            bias = tl.where(factor != 0, bias, 0.0)
        out0, out1, out2, out3 = out0 + bias, out1 + bias, out2 + bias, out3 + bias
    return out0, out1, out2, out3


@triton.jit
def tile_position(tile, height, width, DILATION: tl.constexpr, BLOCK_W: tl.constexpr):
    """Image, first output row (for each column) and columns of a tile of four rows, DILATION apart."""
    tiles_w, tiles_h = tl.cdiv(width, BLOCK_W), tl.cdiv(height, 4 * DILATION) * DILATION
    columns = (tile % tiles_w) * BLOCK_W + tl.arange(0, BLOCK_W)
    tile_h = tile // tiles_w % tiles_h
    # A row for each column: the interpreter of Triton 3.9 cannot make a mask of a scalar and a vector.
    row = (tile_h // DILATION) * 4 * DILATION + tile_h % DILATION + tl.zeros_like(columns)
    return tile // (tiles_w * tiles_h), row, columns


@triton.jit
def pixel_indices(image, row, columns, height, width):
    """Index of a row's pixels among all pixels, and which of them exist."""
    indices = (image.to(tl.int64) * height + row) * width + columns
    return indices, (row < height) & (columns < width)


@triton.jit
def store_row(out_ptr, values, image, row, columns, c, height, width, channels):
    """Stores one row [BLOCK_W, BLOCK_C] of an image, in the memory's dtype."""
    indices, mask = pixel_indices(image, row, columns, height, width)
    offsets = indices[:, None] * channels + c[None, :]
    tl.store(out_ptr + offsets, values.to(out_ptr.dtype.element_ty), mask=mask[:, None] & (c < channels)[None, :])


@triton.jit
def _add_row(values, residual_ptr, image, row, columns, c, height, width, channels):
    """values plus one row of the residual's image, if there is one."""
    if residual_ptr is not None:
        indices, mask = pixel_indices(image, row, columns, height, width)
        offsets = indices[:, None] * channels + c[None, :]
        values += tl.load(residual_ptr + offsets, mask=mask[:, None] & (c < channels)[None, :], other=0.0).to(
            tl.float32
        )
    return values


@triton.jit(do_not_specialize=["height", "width"])
def convolution_kernel(
    input_ptr,
    weight_ptr,
    bias_ptr,
    drop_path_factor_ptr,
    residual_ptr,
    out_ptr,
    height,
    width,
    channels,
    SIZE: tl.constexpr,
    DILATION: tl.constexpr,
    FLIP: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    image, row, columns = tile_position(tl.program_id(0), height, width, DILATION, BLOCK_W)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    out0, out1, out2, out3 = convolve_rows(
        input_ptr, weight_ptr, bias_ptr, drop_path_factor_ptr, image, row, columns, c, height, width, channels,
        SIZE, DILATION, FLIP, BLOCK_W, BLOCK_C,
    )  # fmt: skip
    out0 = _add_row(out0, residual_ptr, image, row, columns, c, height, width, channels)
    out1 = _add_row(out1, residual_ptr, image, row + DILATION, columns, c, height, width, channels)
    out2 = _add_row(out2, residual_ptr, image, row + 2 * DILATION, columns, c, height, width, channels)
    out3 = _add_row(out3, residual_ptr, image, row + 3 * DILATION, columns, c, height, width, channels)
    store_row(out_ptr, out0, image, row, columns, c, height, width, channels)
    store_row(out_ptr, out1, image, row + DILATION, columns, c, height, width, channels)
    store_row(out_ptr, out2, image, row + 2 * DILATION, columns, c, height, width, channels)
    store_row(out_ptr, out3, image, row + 3 * DILATION, columns, c, height, width, channels)


@triton.jit(do_not_specialize=["pixels", "height", "width", "pixels_per_split"])
def weight_gradient_kernel(
    grad_ptr,
    input_ptr,
    drop_path_factor_ptr,
    grad_weight_ptr,
    grad_bias_ptr,
    pixels,
    pixels_per_split,
    height,
    width,
    channels,
    SIZE: tl.constexpr,
    DILATION: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Partial gradients of one filter row (and of the bias) over one split of the pixels."""
    split, c, i = tl.program_id(0), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C), tl.program_id(2)
    c_mask = c < channels
    j = tl.arange(0, BLOCK_J)
    shift_y, shift_x = (i - SIZE // 2) * DILATION, (j - SIZE // 2) * DILATION
    grad_weight = tl.zeros((BLOCK_J, BLOCK_P, BLOCK_C), dtype=tl.float32)
    grad_bias = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    start = split.to(tl.int64) * pixels_per_split
    for offset in range(0, pixels_per_split, BLOCK_P):
        p = start + offset + tl.arange(0, BLOCK_P)
        y, x = (p // width % height).to(tl.int32), (p % width).to(tl.int32)
        exists = p < pixels
        if drop_path_factor_ptr is not None:
            factor = tl.load(drop_path_factor_ptr + p // (height * width), mask=exists, other=0.0)
            exists &= factor.to(tl.float32) != 0
        grad_mask = exists[:, None] & c_mask[None, :]
        grad = tl.load(grad_ptr + p[:, None] * channels + c[None, :], mask=grad_mask, other=0.0).to(tl.float32)
        inside_y = exists & (y + shift_y >= 0) & (y + shift_y < height)
        inside_x = (x[None, :] + shift_x[:, None] >= 0) & (x[None, :] + shift_x[:, None] < width)
        inside = inside_y[None, :] & inside_x & (j < SIZE)[:, None]
        neighbours = p[None, :] + shift_y * width + shift_x[:, None]
        mask = inside[:, :, None] & c_mask[None, None, :]
        values = tl.load(input_ptr + neighbours[:, :, None] * channels + c[None, None, :], mask=mask, other=0.0)
        # Not a product with the zero of the mask: that would spread NaN and inf beyond their window.
        grad_weight += tl.where(mask, grad[None, :, :] * values.to(tl.float32), 0.0)
        grad_bias += grad
    offsets = ((split * SIZE + i) * SIZE + j)[:, None] * channels + c[None, :]
    mask = (j < SIZE)[:, None] & c_mask[None, :]
    tl.store(grad_weight_ptr + offsets, tl.sum(grad_weight, axis=1), mask=mask)
    if i == 0:
        tl.store(grad_bias_ptr + split * channels + c, tl.sum(grad_bias, axis=0), mask=c_mask)


def filter_rows(weight: Tensor) -> Tensor:
    """The filter [C, 1, K, K] as [K K, C], so that a tap's channels lie side by side."""
    return weight.reshape(weight.shape[0], -1).t().contiguous()


def tile_count(images: Tensor, dilation: int, block_w: int) -> int:
    """How many tiles of `tile_position` cover images [N, H, W, C]."""
    batch, height, width, _ = images.shape
    return batch * -(-height // (ROWS * dilation)) * dilation * -(-width // block_w)


def _convolve(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dilation: int,
    drop_path_factor: Tensor | None,
    residual: Tensor | None,
    flip: bool,
) -> Tensor:
    rows = to_channels_last(input)
    output = rows.new_empty(rows.shape)
    _, height, width, channels = rows.shape
    config = FORWARD(rows, width_class(width), channels, weight.shape[-1])
    launch(
        convolution_kernel,
        (tile_count(rows, dilation, config.pixels), -(-channels // config.channels)),
        rows,
        filter_rows(weight),
        bias,
        drop_path_factor,
        None if residual is None else to_channels_last(residual),
        output,
        height,
        width,
        channels,
        SIZE=weight.shape[-1],
        DILATION=dilation,
        FLIP=flip,
        BLOCK_W=config.pixels,
        BLOCK_C=config.channels,
        warps=config.warps,
    )
    return from_channels_last(output)


def forward(
    input: Tensor, weight: Tensor, bias: Tensor | None, dilation: int, drop_path_factor: Tensor | None = None
) -> Tensor:
    """As the reference's `forward`."""
    return _convolve(input, weight, bias, dilation, drop_path_factor, None, flip=False)


def _parameter_gradients(
    grad_output: Tensor, input: Tensor, weight: Tensor, dilation: int, drop_path_factor: Tensor | None
) -> tuple[Tensor, Tensor]:
    grads, rows = to_channels_last(grad_output), to_channels_last(input)
    batch, height, width, channels = rows.shape
    pixels, size = batch * height * width, weight.shape[-1]
    config = WEIGHT_GRADIENT(rows, channels, size)
    splits = split_count(pixels)
    grad_weight = torch.empty((splits, size * size, channels), dtype=torch.float32, device=rows.device)
    grad_bias = torch.empty((splits, channels), dtype=torch.float32, device=rows.device)
    launch(
        weight_gradient_kernel,
        (splits, -(-channels // config.channels), size),
        grads,
        rows,
        drop_path_factor,
        grad_weight,
        grad_bias,
        pixels,
        round_up(-(-pixels // splits), config.pixels),
        height,
        width,
        channels,
        SIZE=size,
        DILATION=dilation,
        BLOCK_J=next_power_of_2(size),
        BLOCK_P=config.pixels,
        BLOCK_C=config.channels,
        warps=config.warps,
    )
    # PyTorch adds the splits in an order that their number alone fixes.
    return grad_weight.sum(0).t().contiguous().view(weight.shape), grad_bias.sum(0)


def backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    dilation: int,
    wanted: list[bool],
    drop_path_factor: Tensor | None = None,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference's `backward`."""
    grad_input, grad_weight, grad_bias = nothing(weight), nothing(weight), nothing(weight)
    if wanted[0]:
        grad_input = _convolve(grad_output, weight, None, dilation, drop_path_factor, residual, flip=True)
    if wanted[1] or wanted[2]:
        weight_part, bias_part = _parameter_gradients(grad_output, input, weight, dilation, drop_path_factor)
        grad_weight = weight_part if wanted[1] else grad_weight
        grad_bias = bias_part if wanted[2] else grad_bias
    return grad_input, grad_weight, grad_bias
