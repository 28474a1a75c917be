"""LayerNorm over channels in Triton: a program holds whole tokens."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from convnext_kernels.ops.common.launch import launch
from convnext_kernels.ops.common.layouts import (
    empty_statistic,
    from_channels_last,
    nothing,
    to_channels_last,
    tokens_per_image,
)
from convnext_kernels.ops.layer_norm.configs import BACKWARD, BACKWARD_PROGRAMS, FORWARD


@triton.jit
def normalize(tile, c_mask, channels, eps):
    """(tile - mean) * rstd over the last dimension, mean and rstd; variance from differences, not from squares."""
    mean = tl.sum(tile, axis=1) / channels
    centered = tl.where(c_mask[None, :], tile - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centered * centered, axis=1) / channels + eps)
    return centered * rstd[:, None], mean, rstd


@triton.jit
def affine(tile, weight_ptr, bias_ptr, c, c_mask):
    """tile * weight + bias over the last dimension; either may be None."""
    if weight_ptr is not None:
        tile *= tl.load(weight_ptr + c, mask=c_mask, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        tile += tl.load(bias_ptr + c, mask=c_mask, other=0.0).to(tl.float32)[None, :]
    return tile


@triton.jit
def _kept(drop_path_factor_ptr, t, t_mask, tokens_per_image):
    """Which tokens exist and are not of a dropped image."""
    if drop_path_factor_ptr is not None:
        factor = tl.load(drop_path_factor_ptr + t // tokens_per_image, mask=t_mask, other=0.0)
        t_mask &= factor.to(tl.float32) != 0
    return t_mask


@triton.jit(do_not_specialize=["tokens", "tokens_per_image"])
def forward_kernel(
    input_ptr,
    weight_ptr,
    bias_ptr,
    drop_path_factor_ptr,
    out_ptr,
    mean_ptr,
    rstd_ptr,
    tokens,
    tokens_per_image,
    channels,
    eps,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.arange(0, BLOCK_C)
    t_mask, c_mask = t < tokens, c < channels
    offsets, mask = t[:, None] * channels + c[None, :], t_mask[:, None] & c_mask[None, :]
    kept = _kept(drop_path_factor_ptr, t, t_mask, tokens_per_image)
    tile = tl.load(input_ptr + offsets, mask=mask & kept[:, None], other=0.0).to(tl.float32)
    normalized, mean, rstd = normalize(tile, c_mask, channels, eps)
    out = tl.where(kept[:, None], affine(normalized, weight_ptr, bias_ptr, c, c_mask), 0.0)
    tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=mask)
    if mean_ptr is not None:
        tl.store(mean_ptr + t, mean, mask=t_mask)
        tl.store(rstd_ptr + t, rstd, mask=t_mask)


@triton.jit(do_not_specialize=["tokens", "tokens_per_program", "tokens_per_image"])
def backward_kernel(
    grad_ptr,
    input_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    drop_path_factor_ptr,
    grad_input_ptr,
    grad_weight_ptr,
    grad_bias_ptr,
    tokens,
    tokens_per_program,
    tokens_per_image,
    channels,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    c = tl.arange(0, BLOCK_C)
    c_mask = c < channels
    program = tl.program_id(0).to(tl.int64)
    grad_weight = tl.zeros((BLOCK_T, BLOCK_C), dtype=tl.float32)
    grad_bias = tl.zeros((BLOCK_T, BLOCK_C), dtype=tl.float32)
    for start in range(0, tokens_per_program, BLOCK_T):
        t = program * tokens_per_program + start + tl.arange(0, BLOCK_T)
        t_mask = t < tokens
        offsets, mask = t[:, None] * channels + c[None, :], t_mask[:, None] & c_mask[None, :]
        kept = _kept(drop_path_factor_ptr, t, t_mask, tokens_per_image)
        grad = tl.load(grad_ptr + offsets, mask=mask & kept[:, None], other=0.0).to(tl.float32)
        tile = tl.load(input_ptr + offsets, mask=mask & kept[:, None], other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + t, mask=kept, other=0.0)
        normalized = tile
        if mean_ptr is not None:
            mean = tl.load(mean_ptr + t, mask=kept, other=0.0)
            normalized = tl.where(c_mask[None, :], (tile - mean[:, None]) * rstd[:, None], 0.0)
        if grad_weight_ptr is not None:
            grad_weight += grad * normalized
            grad_bias += grad
        if grad_input_ptr is not None:
            grad = affine(grad, weight_ptr, None, c, c_mask)
            mean_grad = tl.sum(grad, axis=1) / channels
            mean_product = tl.sum(grad * normalized, axis=1) / channels
            grad_input = rstd[:, None] * (grad - mean_grad[:, None] - normalized * mean_product[:, None])
            tl.store(grad_input_ptr + offsets, grad_input.to(grad_input_ptr.dtype.element_ty), mask=mask)
    if grad_weight_ptr is not None:
        tl.store(grad_weight_ptr + program * channels + c, tl.sum(grad_weight, axis=0), mask=c_mask)
        tl.store(grad_bias_ptr + program * channels + c, tl.sum(grad_bias, axis=0), mask=c_mask)


def forward(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    save: bool,
    drop_path_factor: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference's `forward`."""
    rows = to_channels_last(input)
    channels = rows.shape[-1]
    tokens, config = rows.numel() // channels, FORWARD(rows, channels)
    output = rows.new_empty(rows.shape)
    mean, rstd = (empty_statistic(rows) if save else None for _ in range(2))
    launch(
        forward_kernel,
        (-(-tokens // config.tokens),),
        rows,
        weight,
        bias,
        drop_path_factor,
        output,
        mean,
        rstd,
        tokens,
        tokens_per_image(rows),
        channels,
        eps,
        BLOCK_T=config.tokens,
        BLOCK_C=config.channels,
        warps=config.warps,
    )
    if mean is None or rstd is None:
        return from_channels_last(output), nothing(rows), nothing(rows)
    return from_channels_last(output), mean, rstd


def backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    wanted: list[bool],
    drop_path_factor: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference's `backward`."""
    grads, rows = to_channels_last(grad_output), to_channels_last(input)
    channels = rows.shape[-1]
    tokens, config = rows.numel() // channels, BACKWARD(rows, channels)
    per_program = config.tokens * max(1, -(-tokens // (config.tokens * BACKWARD_PROGRAMS)))
    programs = max(1, -(-tokens // per_program))
    grad_input = rows.new_empty(rows.shape) if wanted[0] else None
    partials: tuple[Tensor, ...] | tuple[None, None] = (None, None)
    if wanted[1] or wanted[2]:
        partials = torch.empty((2, programs, channels), dtype=torch.float32, device=rows.device).unbind()
    launch(
        backward_kernel,
        (programs,),
        grads,
        rows,
        weight,
        mean,
        rstd,
        drop_path_factor,
        grad_input,
        *partials,
        tokens,
        per_program,
        tokens_per_image(rows),
        channels,
        BLOCK_T=config.tokens,
        BLOCK_C=config.channels,
        warps=config.warps,
    )
    grad_weight, grad_bias = (
        partial.sum(0) if want and partial is not None else nothing(input)
        for partial, want in zip(partials, wanted[1:], strict=True)
    )
    return nothing(input) if grad_input is None else from_channels_last(grad_input), grad_weight, grad_bias
