"""Global response normalisation in Triton: one pass for the sums over each image, one that applies them.

For the MLP's backward both also compute the activation before it. Between the two is a small kernel on [N, C].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from convnext_kernels.ops.common.launch import launch, next_power_of_2, round_up
from convnext_kernels.ops.common.layouts import from_channels_last, nothing, to_channels_last
from convnext_kernels.ops.common.triton_math import gelu, gelu_derivative, gelu_form
from convnext_kernels.ops.response_norm.configs import ACTIVATED_BACKWARD, APPLY, RATIOS_WARPS, SUMS, split_count


@triton.jit
def _activated(x, ACTIVATION: tl.constexpr):
    """The activation as it would have been stored, in float32, where there is one."""
    if ACTIVATION is None:
        return x.to(tl.float32)
    return gelu(x.to(tl.float32), ACTIVATION).to(x.dtype).to(tl.float32)


@triton.jit(do_not_specialize=["tokens", "tokens_per_split"])
def sums_kernel(
    a_ptr,
    b_ptr,
    dots_ptr,
    sums_ptr,
    squares_ptr,
    tokens,
    tokens_per_split,
    channels,
    ACTIVATION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Over one split of an image's tokens: the sum of a b and, where asked for, of a and b^2; b is activated before."""
    image, split = tl.program_id(0), tl.program_id(2)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_mask = c < channels
    image_offset = image.to(tl.int64) * tokens * channels
    dots = tl.zeros((BLOCK_T, BLOCK_C), dtype=tl.float32)
    sums = tl.zeros((BLOCK_T, BLOCK_C), dtype=tl.float32)
    squares = tl.zeros((BLOCK_T, BLOCK_C), dtype=tl.float32)
    for start in range(0, tokens_per_split, BLOCK_T):
        t = split * tokens_per_split + start + tl.arange(0, BLOCK_T)
        mask = (t < tokens)[:, None] & c_mask[None, :]
        offsets = image_offset + t.to(tl.int64)[:, None] * channels + c[None, :]
        a = tl.load(a_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        b = _activated(tl.load(b_ptr + offsets, mask=mask, other=0.0), ACTIVATION)
        dots += a * b
        sums += a
        squares += b * b
    out = (split.to(tl.int64) * tl.num_programs(0) + image) * channels + c
    tl.store(dots_ptr + out, tl.sum(dots, axis=0), mask=c_mask)
    if sums_ptr is not None:
        tl.store(sums_ptr + out, tl.sum(sums, axis=0), mask=c_mask)
    if squares_ptr is not None:
        tl.store(squares_ptr + out, tl.sum(squares, axis=0), mask=c_mask)


@triton.jit
def _add_up(partial_ptr, splits, stride, mask, BLOCK_C: tl.constexpr):
    """The sum over the splits, in their order."""
    total = tl.zeros((BLOCK_C,), dtype=tl.float32)
    for split in range(splits):
        total += tl.load(partial_ptr + split * stride, mask=mask, other=0.0)
    return total


@triton.jit(do_not_specialize=["splits"])
def ratios_kernel(
    norms_ptr,
    squares_ptr,
    dots_ptr,
    weight_ptr,
    scale_ptr,
    coefficient_ptr,
    weight_gradient_ptr,
    splits,
    channels,
    eps,
    BLOCK_C: tl.constexpr,
):
    """The reference's `scales` and, of dots, `input_coefficients` and an image's part of `weight_gradient`.

    Of all channels of an image. Norms are the square roots of squares, and stored, where there are squares.
    """
    c = tl.arange(0, BLOCK_C)
    mask = c < channels
    offsets = tl.program_id(0).to(tl.int64) * channels + c
    stride = tl.num_programs(0).to(tl.int64) * channels
    if squares_ptr is None:
        norms = tl.load(norms_ptr + offsets, mask=mask, other=0.0)
    else:
        norms = tl.sqrt_rn(_add_up(squares_ptr + offsets, splits, stride, mask, BLOCK_C))
        tl.store(norms_ptr + offsets, norms, mask=mask)
    mean = tl.sum(norms) / channels + eps
    weight = tl.load(weight_ptr + c, mask=mask, other=0.0).to(tl.float32)
    tl.store(scale_ptr + offsets, 1 + tl.div_rn(weight * norms, mean), mask=mask)
    if dots_ptr is not None:
        dots = _add_up(dots_ptr + offsets, splits, stride, mask, BLOCK_C)
        tl.store(weight_gradient_ptr + offsets, tl.div_rn(dots * norms, mean), mask=mask)
        grad_ratio = weight * dots
        along = tl.sum(grad_ratio * norms) / (channels * mean * mean)
        coefficient = tl.where(norms == 0, 0.0, tl.div_rn(tl.div_rn(grad_ratio, mean) - along, norms))
        tl.store(coefficient_ptr + offsets, coefficient, mask=mask)


@triton.jit(do_not_specialize=["tokens"])
def apply_kernel(
    a_ptr,
    a_scale_ptr,
    b_ptr,
    b_scale_ptr,
    bias_ptr,
    out_ptr,
    tokens,
    channels,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out = a * a_scale[image, channel] + b * b_scale[image, channel] + bias[channel]; b and bias may be None."""
    tiles = tl.cdiv(tokens, BLOCK_T)
    image, t = tl.program_id(0) // tiles, (tl.program_id(0) % tiles) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_mask = c < channels
    mask = (t < tokens)[:, None] & c_mask[None, :]
    offsets = (image.to(tl.int64) * tokens + t)[:, None] * channels + c[None, :]
    scale_offsets = image.to(tl.int64) * channels + c
    a_scale = tl.load(a_scale_ptr + scale_offsets, mask=c_mask, other=0.0)
    out = tl.load(a_ptr + offsets, mask=mask, other=0.0).to(tl.float32) * a_scale[None, :]
    if b_ptr is not None:
        b_scale = tl.load(b_scale_ptr + scale_offsets, mask=c_mask, other=0.0)
        out += tl.load(b_ptr + offsets, mask=mask, other=0.0).to(tl.float32) * b_scale[None, :]
    if bias_ptr is not None:
        out += tl.load(bias_ptr + c, mask=c_mask, other=0.0).to(tl.float32)[None, :]
    tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens"])
def activated_backward_kernel(
    grad_ptr,
    scale_ptr,
    pre_activation_ptr,
    coefficient_ptr,
    bias_ptr,
    factor_ptr,
    out_ptr,
    tokens,
    channels,
    ACTIVATION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Of p with h = activation(p): grad becomes (grad * scale + h * coefficient) * h'(p).

    out = (h * scale + bias) * factor[image], which may be None.
    """
    tiles = tl.cdiv(tokens, BLOCK_T)
    image, t = tl.program_id(0) // tiles, (tl.program_id(0) % tiles) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_mask = c < channels
    mask = (t < tokens)[:, None] & c_mask[None, :]
    offsets = (image.to(tl.int64) * tokens + t)[:, None] * channels + c[None, :]
    scale_offsets = image.to(tl.int64) * channels + c
    scale = tl.load(scale_ptr + scale_offsets, mask=c_mask, other=0.0)[None, :]
    coefficient = tl.load(coefficient_ptr + scale_offsets, mask=c_mask, other=0.0)[None, :]
    bias = tl.load(bias_ptr + c, mask=c_mask, other=0.0).to(tl.float32)[None, :]
    pre_activation = tl.load(pre_activation_ptr + offsets, mask=mask, other=0.0)
    hidden = _activated(pre_activation, ACTIVATION)
    out = hidden * scale + bias
    if factor_ptr is not None:
        out *= tl.load(factor_ptr + image).to(tl.float32)
    tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=mask)
    grad = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32) * scale + hidden * coefficient
    grad *= gelu_derivative(pre_activation.to(tl.float32), ACTIVATION)
    tl.store(grad_ptr + offsets, grad.to(grad_ptr.dtype.element_ty), mask=mask)


def _sizes(rows: Tensor) -> tuple[int, int, int]:
    batch, channels = rows.shape[0], rows.shape[-1]
    return batch, rows[0].numel() // channels if batch else 1, channels


def _partial_sums(a: Tensor, b: Tensor, kinds: int, activation: str | None = None) -> Tensor:
    """The first kinds of: sums over each image's tokens of a b, a and b^2, [kinds, splits, N, C] in float32."""
    batch, tokens, channels = _sizes(a)
    config, splits = SUMS(a, channels), split_count(tokens)
    partial = torch.empty((kinds, splits, batch, channels), dtype=torch.float32, device=a.device)
    launch(
        sums_kernel,
        (batch, -(-channels // config.channels), splits),
        a,
        b,
        *partial,
        *[None] * (3 - kinds),
        tokens,
        round_up(-(-tokens // splits), config.tokens),
        channels,
        ACTIVATION=activation and gelu_form(activation, b.dtype),
        BLOCK_T=config.tokens,
        BLOCK_C=config.channels,
        warps=config.warps,
    )
    return partial


def _ratios(
    norms: Tensor, weight: Tensor, eps: float, squares: Tensor | None = None, dots: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`scales` and, from partial dots, `input_coefficients` and each image's part of `weight_gradient`, all [N, C].

    Norms [N, C] are written where there are partial sums of squares.
    """
    partial, scales = dots if squares is None else squares, torch.empty_like(norms)
    coefficients, weight_gradients = (nothing(norms) if dots is None else torch.empty_like(norms) for _ in range(2))
    launch(
        ratios_kernel,
        (norms.shape[0],),
        norms,
        squares,
        dots,
        weight,
        scales,
        coefficients,
        weight_gradients,
        0 if partial is None else partial.shape[0],
        norms.shape[1],
        eps,
        BLOCK_C=next_power_of_2(norms.shape[1]),
        warps=RATIOS_WARPS,
    )
    return scales, coefficients, weight_gradients


def _apply(
    a: Tensor, a_scale: Tensor, b: Tensor | None = None, b_scale: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    batch, tokens, channels = _sizes(a)
    config, output = APPLY(a, channels), a.new_empty(a.shape)
    launch(
        apply_kernel,
        (batch * -(-tokens // config.tokens), -(-channels // config.channels)),
        a,
        a_scale,
        b,
        b_scale,
        bias,
        output,
        tokens,
        channels,
        BLOCK_T=config.tokens,
        BLOCK_C=config.channels,
        warps=config.warps,
    )
    return output


def scales_and_norms(rows: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The reference's `scales` and the norms, [N, C] in float32, of images in channels-last memory."""
    squares = _partial_sums(rows, rows, 1)[0]
    norms = squares.new_empty(squares.shape[1:])
    return _ratios(norms, weight, eps, squares)[0], norms


def forward(input: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As the reference's `forward`."""
    rows = to_channels_last(input)
    scales, norms = scales_and_norms(rows, weight, eps)
    return from_channels_last(_apply(rows, scales, bias=bias)), norms


def backward(
    grad_output: Tensor, input: Tensor, weight: Tensor, norms: Tensor, eps: float, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference's `backward`."""
    grads, rows = to_channels_last(grad_output), to_channels_last(input)
    grad_input, grad_weight, grad_bias = nothing(input), nothing(input), nothing(input)
    dots, *sums = _partial_sums(grads, rows, 2 if wanted[2] else 1)
    scales, coefficients, weight_gradients = _ratios(norms, weight, eps, dots=dots)
    if wanted[0]:
        grad_input = from_channels_last(_apply(grads, scales, rows, coefficients))
    if wanted[1]:
        grad_weight = weight_gradients.sum(0)
    if wanted[2]:
        grad_bias = sums[0].sum((0, 1))
    return grad_input, grad_weight, grad_bias


def activated_backward(
    grads: Tensor,
    pre_activation: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    activation: str,
    output_factor: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of grn(h), h = activation(pre_activation), both [N, L, C]: output and gradients of weight and bias in float32.

    grads becomes, in place, the gradient of the pre-activation. h is never written. output_factor [N] multiplies the
    output alone.
    """
    batch, tokens, channels = _sizes(grads)
    dots, sums, squares = _partial_sums(grads, pre_activation, 3, activation)
    scales, coefficients, weight_gradients = _ratios(squares.new_empty(squares.shape[1:]), weight, eps, squares, dots)
    output, config = torch.empty_like(grads), ACTIVATED_BACKWARD(grads, channels)
    launch(
        activated_backward_kernel,
        (batch * -(-tokens // config.tokens), -(-channels // config.channels)),
        grads,
        scales,
        pre_activation,
        coefficients,
        bias,
        output_factor,
        output,
        tokens,
        channels,
        ACTIVATION=gelu_form(activation, grads.dtype),
        BLOCK_T=config.tokens,
        BLOCK_C=config.channels,
        warps=config.warps,
    )
    return output, weight_gradients.sum(0), sums.sum((0, 1))
