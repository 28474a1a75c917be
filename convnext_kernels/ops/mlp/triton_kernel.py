"""The pointwise MLP in Triton.

Forward is one kernel that never writes the hidden activations, where there are few channels and nothing is saved, else
two products; backward is four. All else is in their epilogues, but for the sums over images of a response norm, whose
scales the second product applies to what it reads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from convnext_kernels.ops.common.launch import architecture, launch
from convnext_kernels.ops.common.layouts import (
    channels,
    empty_statistic,
    from_channels_last,
    nothing,
    to_channels_last,
    tokens_per_image,
)
from convnext_kernels.ops.common.matmul_configs import scales_operands
from convnext_kernels.ops.common.triton_drop_path import drop_path
from convnext_kernels.ops.common.triton_images import ImageScale
from convnext_kernels.ops.common.triton_math import gelu, gelu_form, in_parts, load_part
from convnext_kernels.ops.common.triton_matmul import Epilogue, long_matmul, matmul, matrix
from convnext_kernels.ops.layer_norm.triton_kernel import affine
from convnext_kernels.ops.mlp.configs import FUSED, FusedConfig
from convnext_kernels.ops.mlp.triton_layer_scale import parameter_gradients, scaled_weight2
from convnext_kernels.ops.response_norm import triton_kernel as response_norm


@triton.jit
def _statistics(low, high, channels, eps):
    """Mean and rstd of a tile in two parts, whose second may be None; variance from differences, not from squares."""
    low = low.to(tl.float32)
    total = tl.sum(low, axis=1)
    if high is not None:
        high = high.to(tl.float32)
        total += tl.sum(high, axis=1)
    mean = total / channels
    low -= mean[:, None]
    squares = tl.sum(low * low, axis=1)
    if high is not None:
        high -= mean[:, None]
        squares += tl.sum(high * high, axis=1)
    return mean, tl.rsqrt(squares / channels + eps)


@triton.jit
def _normalize(part, mean, rstd, weight_ptr, bias_ptr, normalized_ptr, tile, offsets, mask, c):
    """LayerNorm's output for some channels; x^, before the affine, is stored where asked for."""
    normalized = (part.to(tl.float32) - mean[:, None]) * rstd[:, None]
    if normalized_ptr is not None:
        tl.store(normalized_ptr + tile + offsets, normalized.to(part.dtype), mask=mask)
    return affine(normalized, weight_ptr, bias_ptr, c, c >= 0).to(part.dtype)


@triton.jit
def _finish(
    sums, bias_ptr, column_scale_ptr, factor, residual_ptr, out_ptr, row_offsets, mask, kept, first, PART: tl.constexpr
):
    """Stores channels of the output from the first on: residual + factor * column_scale * (sums + bias), 0 where not
    kept. Of as many at a time as a part has, which spares registers."""
    # A part's residual is loaded before the last part is stored, and under way meanwhile.
    COLUMNS: tl.constexpr = PART if sums.shape[1] > PART else sums.shape[1]
    PARTS: tl.constexpr = sums.shape[1] // COLUMNS
    parts = in_parts(sums, PARTS)
    if residual_ptr is not None:
        following = load_part(residual_ptr, row_offsets, mask, first, None, COLUMNS)
    for part in tl.static_range(PARTS):
        accumulator, c = parts[part], tl.arange(0, COLUMNS) + (first + part * COLUMNS)
        if residual_ptr is not None:
            residual = following
            if part + 1 < PARTS:
                following = load_part(residual_ptr, row_offsets, mask, first + (part + 1) * COLUMNS, None, COLUMNS)
        if bias_ptr is not None:
            accumulator += tl.load(bias_ptr + c).to(tl.float32)[None, :]
        if column_scale_ptr is not None:
            accumulator *= tl.load(column_scale_ptr + c).to(tl.float32)[None, :]
        if factor is not None:
            accumulator = tl.where(kept[:, None], accumulator * factor[:, None], 0.0)
        if residual_ptr is not None:
            accumulator += residual.to(tl.float32)
        places = row_offsets[:, None] + c[None, :]
        tl.store(out_ptr + places, accumulator.to(out_ptr.dtype.element_ty), mask=mask[:, None])


@triton.jit(do_not_specialize=["tokens"])
def fused_kernel(
    input_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    normalized_ptr,
    rstd_ptr,
    weight1_ptr,
    bias1_ptr,
    weight2_ptr,
    bias2_ptr,
    layer_scale_ptr,
    order_ptr,
    factor_ptr,
    kept_ptr,
    residual_ptr,
    out_ptr,
    tokens,
    eps,
    CHANNELS: tl.constexpr,
    HIDDEN: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PART: tl.constexpr,
):
    """Walks over the hidden channels: a few of them at a time, for all channels of a tile of tokens.

    With an eps the tile is normalized first, and x^ and rstd are stored where asked for. With an order of
    stochastic depth x^ of tokens that it drops is 0.
    """
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    t_mask, low = t < tokens, tl.arange(0, LOW)
    # One 64-bit offset for the tile: with one for each element 128 channels spill 16 bytes on sm_80.
    tile = tl.program_id(0).to(tl.int64) * (BLOCK_T * CHANNELS)
    row, end = tl.arange(0, BLOCK_T), HIDDEN
    mask, kept = t_mask[:, None], t_mask
    if order_ptr is not None:
        count = tl.load(kept_ptr)
        kept = t < count
        # One step at least: after a loop that may be skipped sm_90's products wait for one another in it.
        end = tl.where(tl.program_id(0) * BLOCK_T < count, HIDDEN, BLOCK_H)
        tile, row = 0, tl.load(order_ptr + t, mask=t_mask, other=0).to(tl.int64)
    offsets = row[:, None] * CHANNELS + low[None, :]
    input_low = tl.load(input_ptr + tile + offsets, mask=kept[:, None], other=0.0)
    sum_low, input_high = tl.zeros((BLOCK_T, LOW), dtype=tl.float32), None
    if HIGH > 0:
        high = LOW + tl.arange(0, HIGH)
        offsets_high = row[:, None] * CHANNELS + high[None, :]
        input_high = tl.load(input_ptr + tile + offsets_high, mask=kept[:, None], other=0.0)
        sum_high = tl.zeros((BLOCK_T, HIGH), dtype=tl.float32)
    if eps is not None:
        mean, rstd = _statistics(input_low, input_high, CHANNELS, eps)
        input_low = _normalize(
            input_low, mean, rstd, norm_weight_ptr, norm_bias_ptr, normalized_ptr, tile, offsets, mask, low
        )
        if HIGH > 0:
            input_high = _normalize(
                input_high, mean, rstd, norm_weight_ptr, norm_bias_ptr, normalized_ptr, tile, offsets_high, mask, high
            )
        if rstd_ptr is not None:
            tl.store(rstd_ptr + tile // CHANNELS + row, rstd, mask=t_mask)
    step = tl.arange(0, BLOCK_H)
    for start in range(0, end, BLOCK_H):
        h = start + step
        h_mask = tl.full((BLOCK_H,), True, tl.int1) if HIDDEN % BLOCK_H == 0 else h < HIDDEN
        # Each step has pointers of its own: with offsets of h 96 channels spill in the loop on sm_90.
        first, second, line = weight1_ptr + start * CHANNELS, weight2_ptr + start, step[None, :] * CHANNELS
        activation = tl.zeros((BLOCK_T, BLOCK_H), dtype=tl.float32)
        # The fewer channels first: on sm_90 the last step's product is still reading its operand from registers too.
        if HIGH > 0:
            weight = tl.load(first + line + high[:, None], mask=h_mask[None, :], other=0.0)
            activation = tl.dot(input_high, weight, activation)
        weight = tl.load(first + line + low[:, None], mask=h_mask[None, :], other=0.0)
        activation = tl.dot(input_low, weight, activation)
        if bias1_ptr is not None:
            activation += tl.load(bias1_ptr + h, mask=h_mask, other=0.0).to(tl.float32)[None, :]
        # Behind the last hidden channel weights are 0: whatever the activation is there, it adds nothing.
        activated = gelu(activation, ACTIVATION).to(input_ptr.dtype.element_ty)
        weight = tl.load(second + low[None, :] * HIDDEN + step[:, None], mask=h_mask[:, None], other=0.0)
        sum_low = tl.dot(activated, weight, sum_low)
        if HIGH > 0:
            weight = tl.load(second + high[None, :] * HIDDEN + step[:, None], mask=h_mask[:, None], other=0.0)
            sum_high = tl.dot(activated, weight, sum_high)
    factor = None
    if order_ptr is not None:
        # Volatile, that is again: kept over the loop 128 channels spill on sm_80.
        row = tl.load(order_ptr + t, mask=t_mask, other=0, volatile=True).to(tl.int64)
        factor = tl.load(factor_ptr + t, mask=t_mask, other=0.0)
    out_ptr, row_offsets = out_ptr + tile, row * CHANNELS
    if residual_ptr is not None:
        residual_ptr += tile
    _finish(sum_low, bias2_ptr, layer_scale_ptr, factor, residual_ptr, out_ptr, row_offsets, t_mask, kept, 0, PART)
    if HIGH > 0:
        _finish(
            sum_high, bias2_ptr, layer_scale_ptr, factor, residual_ptr, out_ptr, row_offsets, t_mask, kept, LOW, PART
        )


class Norm(NamedTuple):
    """A LayerNorm of the input: eps and its affine; `save` also asks for x^, before the affine, and rstd."""

    eps: float
    weight: Tensor | None
    bias: Tensor | None
    save: bool


def _empty_output(rows: Tensor, residual: Tensor | None) -> Tensor:
    """In the residual's dtype, if there is one."""
    return rows.new_empty(rows.shape, dtype=None if residual is None else residual.dtype)


def _fused_forward(
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    layer_scale: Tensor | None,
    drop_path_factor: Tensor | None,
    residual: Tensor | None,
    activation: str,
    norm: Norm | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Output and, where the norm is to be saved, x^ and rstd."""
    rows, config = to_channels_last(input), _one_kernel_config(input)
    if config is None:
        raise ValueError(
            f"input: got {channels(input)} channels of {input.dtype}; accepted: what `takes_one_kernel` does"
        )
    output, tokens = _empty_output(rows, residual), rows.numel() // rows.shape[-1]
    save, drop = norm is not None and norm.save, drop_path(drop_path_factor, tokens_per_image(rows))
    normalized = torch.empty_like(rows) if save else None
    rstd = empty_statistic(rows) if save else None
    launch(
        fused_kernel,
        (-(-tokens // config.tokens),),
        rows,
        norm and norm.weight,
        norm and norm.bias,
        normalized,
        rstd,
        weight1.to(rows.dtype).contiguous(),
        bias1,
        weight2.to(rows.dtype).contiguous(),
        bias2,
        layer_scale,
        *(drop or (None, None, None)),
        None if residual is None else to_channels_last(residual),
        output,
        tokens,
        norm and norm.eps,
        CHANNELS=rows.shape[-1],
        HIDDEN=weight1.shape[0],
        LOW=config.low,
        HIGH=config.high,
        ACTIVATION=gelu_form(activation, rows.dtype),
        BLOCK_T=config.tokens,
        BLOCK_H=config.hidden,
        PART=config.part_bytes // output.itemsize,
        warps=config.warps,
        registers=config.registers,
        num_stages=2,
    )
    return from_channels_last(output), normalized, rstd


def _one_kernel_config(input: Tensor) -> FusedConfig | None:
    """None also for float32, whose weights take too many registers."""
    if not input.shape[0] or input.dtype == torch.float32:
        return None
    return FUSED(input, channels(input), architecture(input.device))


def takes_one_kernel(input: Tensor, grn_weight: Tensor | None) -> bool:
    """Whether forward is one kernel where no pre-activation is saved."""
    return grn_weight is None and _one_kernel_config(input) is not None


def forward_normalizing(
    convolved: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    layer_scale: Tensor | None,
    drop_path_factor: Tensor | None,
    residual: Tensor | None,
    activation: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`forward` of a LayerNorm of convolved in one kernel, where `takes_one_kernel`.

    Returns:
        Output and, where `save` asks for them, x^ = (convolved - mean) rstd, of convolved's shape and dtype, and rstd
        [tokens] in float32. x^ of dropped images is 0.
    """
    norm = Norm(eps, norm_weight, norm_bias, save)
    parameters = (weight1, bias1, weight2, bias2, layer_scale)
    output, normalized, rstd = _fused_forward(convolved, *parameters, drop_path_factor, residual, activation, norm)
    if normalized is None or rstd is None:
        return output, nothing(convolved), nothing(convolved)
    return output, from_channels_last(normalized), rstd


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
    if not save and takes_one_kernel(input, grn_weight):
        parameters = (weight1, bias1, weight2, bias2, layer_scale)
        return _fused_forward(input, *parameters, drop_path_factor, residual, activation)[0], nothing(input)
    rows, dtype = to_channels_last(input), input.dtype
    tokens, width, hidden_width = rows.flatten(0, -2), rows.shape[-1], weight1.shape[0]
    count, per_image = tokens.shape[0], tokens_per_image(rows)
    hidden, drop = rows.new_empty((*rows.shape[:-1], hidden_width)), drop_path(drop_path_factor, per_image)
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
            drop_path=drop,
            scale_tokens=False,
            write_dropped=grn_weight is not None,
        ),
    )
    image_scale = None
    if grn_weight is not None and grn_bias is not None:
        images = hidden.flatten(1, -2)
        if scales_operands(per_image, architecture(input.device)):
            scales, _ = response_norm.scales_and_norms(images, grn_weight, grn_eps)
            image_scale = ImageScale(scales, grn_bias)
        else:
            hidden, _ = response_norm.forward(images, grn_weight, grn_bias, grn_eps)
    output = _empty_output(rows, residual)
    matmul(
        matrix(hidden.view(count, hidden_width)),
        matrix(weight2.to(dtype)).transposed,
        matrix(output.flatten(0, -2)),
        (count, width, hidden_width),
        Epilogue(
            bias=bias2,
            column_scale=layer_scale,
            drop_path=drop,
            residual=None if residual is None else to_channels_last(residual),
        ),
        image_scale,
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
    """As the reference's `backward`, with the stochastic-depth factor in epilogues, not in a pass of its own.

    The gradient of weight2 is a product of the gradient and the hidden activations times that factor.

    What is left out for dropped images are their rows of every product, but for the passes of grn.
    A pre-activation that was not saved is a second product in the kernel that needs it; with grn, a product before, and
    there are two passes over it and the gradient.
    """
    rows, grads, dtype = to_channels_last(input), to_channels_last(grad_output).flatten(0, -2), input.dtype
    tokens, (hidden_width, width) = rows.flatten(0, -2), weight1.shape
    count, per_image = tokens.shape[0], tokens_per_image(rows)
    shape, first_product = (count, hidden_width, width), (matrix(tokens), matrix(weight1.to(dtype)).transposed)
    gradients, drop = [nothing(input) for _ in wanted], drop_path(drop_path_factor, per_image)
    unscaled = Epilogue(drop_path=drop, scale_tokens=False)

    grad_pre, epilogue = rows.new_empty((rows.shape[0], per_image, hidden_width)), Epilogue(drop_path=drop)
    if grn_weight is None:
        hidden = torch.empty_like(grad_pre)
        epilogue = Epilogue(activation=activation, derivative=True, hidden=hidden, drop_path=drop, write_dropped=False)
        if pre_activation is None:
            epilogue = epilogue._replace(recomputed=first_product, bias=bias1)
        else:
            epilogue = epilogue._replace(pre_activation=pre_activation)
    elif pre_activation is None:
        pre_activation = torch.empty_like(grad_pre)
        matmul(*first_product, matrix(pre_activation.flatten(0, 1)), shape, unscaled._replace(bias=bias1))
    weight, power = scaled_weight2(weight2, layer_scale, dtype)
    matmul(matrix(grads), matrix(weight), matrix(grad_pre.flatten(0, 1)), shape, epilogue._replace(scale=power))

    if grn_weight is not None and grn_bias is not None and pre_activation is not None:
        hidden, gradients[6], gradients[7] = response_norm.activated_backward(
            grad_pre, pre_activation.view(grad_pre.shape), grn_weight, grn_bias, grn_eps, activation, drop_path_factor
        )
    if any(wanted[3:6]):
        a, b = matrix(grads).transposed, matrix(hidden.flatten(0, 1))
        products, sums = long_matmul(a, b, (width, hidden_width, count), drop, weigh_sums=True)
        gradients[3:6] = parameter_gradients(products, sums, weight2, bias2, layer_scale)
    grad_pre = grad_pre.flatten(0, 1)
    if wanted[0]:
        grad_input = rows.new_empty(rows.shape)
        shape = (count, width, hidden_width)
        matmul(matrix(grad_pre), matrix(weight1.to(dtype)), matrix(grad_input.flatten(0, -2)), shape, unscaled)
        gradients[0] = from_channels_last(grad_input)
    if wanted[1] or wanted[2]:
        shape = (hidden_width, width, count)
        gradients[1:3] = long_matmul(matrix(grad_pre).transposed, matrix(tokens), shape, drop)
    return tuple(g if want else nothing(input) for g, want in zip(gradients, wanted, strict=True))
