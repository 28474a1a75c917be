"""A ConvNeXt block in Triton: the kernels of its operators; of few channels, the MLP's also normalises its input."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from convnext_kernels.ops.common.launch import launch, next_power_of_2
from convnext_kernels.ops.convnext_block.steps import Steps
from convnext_kernels.ops.depthwise_conv import triton_kernel as depthwise_conv
from convnext_kernels.ops.depthwise_conv_layer_norm import triton_kernel as depthwise_conv_layer_norm
from convnext_kernels.ops.layer_norm import triton_kernel as layer_norm
from convnext_kernels.ops.mlp import triton_kernel as mlp

# Four warps with 32 elements a thread at each step.
FOLD_HIDDEN = 32
FOLD_CHANNELS = 128
FOLD_WARPS = 4
# A program sums over all hidden channels: 16 elements a thread at each step, in sectors of 32 bytes.
UNFOLD_HIDDEN = 1024
UNFOLD_CHANNELS = 8
UNFOLD_WARPS = 16


@triton.jit
def fold_kernel(
    weight_ptr,
    bias_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    folded_weight_ptr,
    folded_bias_ptr,
    hidden,
    channels,
    BLOCK_H: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    h = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    h_mask = h < hidden
    folded_bias = tl.zeros((BLOCK_H,), dtype=tl.float32)
    if bias_ptr is not None:
        folded_bias += tl.load(bias_ptr + h, mask=h_mask, other=0.0).to(tl.float32)
    for start in range(0, channels, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        c_mask = c < channels
        offsets, mask = h.to(tl.int64)[:, None] * channels + c[None, :], h_mask[:, None] & c_mask[None, :]
        weight = tl.load(weight_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        if norm_bias_ptr is not None:
            norm_bias = tl.load(norm_bias_ptr + c, mask=c_mask, other=0.0).to(tl.float32)
            folded_bias += tl.sum(weight * norm_bias[None, :], axis=1)
        if norm_weight_ptr is not None:
            weight *= tl.load(norm_weight_ptr + c, mask=c_mask, other=0.0).to(tl.float32)[None, :]
        tl.store(folded_weight_ptr + offsets, weight.to(folded_weight_ptr.dtype.element_ty), mask=mask)
    tl.store(folded_bias_ptr + h, folded_bias, mask=h_mask)


def fold(
    weight: Tensor, bias: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None, input: Tensor
) -> tuple[Tensor, Tensor]:
    """As PyTorch's in steps.py, in one pass over the weight."""
    weight = weight.contiguous()
    folded_weight = torch.empty_like(weight, dtype=input.dtype)
    folded_bias = weight.new_empty(weight.shape[0], dtype=torch.float32)
    launch(
        fold_kernel,
        (-(-weight.shape[0] // FOLD_HIDDEN),),
        weight,
        bias,
        norm_weight,
        norm_bias,
        folded_weight,
        folded_bias,
        *weight.shape,
        BLOCK_H=FOLD_HIDDEN,
        BLOCK_C=FOLD_CHANNELS,
        warps=FOLD_WARPS,
    )
    return folded_weight, folded_bias


@triton.jit
def unfold_kernel(
    grad_folded_weight_ptr,
    grad_folded_bias_ptr,
    weight_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    grad_norm_weight_ptr,
    grad_norm_bias_ptr,
    grad_weight_ptr,
    hidden,
    channels,
    BLOCK_H: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_mask = c < channels
    weight_dots = tl.zeros((BLOCK_C, BLOCK_H), dtype=tl.float32)
    bias_dots = tl.zeros((BLOCK_C, BLOCK_H), dtype=tl.float32)
    for start in range(0, hidden, BLOCK_H):
        h = start + tl.arange(0, BLOCK_H)
        h_mask = h < hidden
        offsets, mask = c[:, None] + h.to(tl.int64)[None, :] * channels, c_mask[:, None] & h_mask[None, :]
        grad = tl.load(grad_folded_weight_ptr + offsets, mask=mask, other=0.0)
        grad_bias = tl.load(grad_folded_bias_ptr + h, mask=h_mask, other=0.0)[None, :]
        weight = tl.load(weight_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        weight_dots += weight * grad
        bias_dots += weight * grad_bias
        if norm_weight_ptr is not None:
            grad *= tl.load(norm_weight_ptr + c, mask=c_mask, other=0.0).to(tl.float32)[:, None]
        if norm_bias_ptr is not None:
            grad += grad_bias * tl.load(norm_bias_ptr + c, mask=c_mask, other=0.0).to(tl.float32)[:, None]
        tl.store(grad_weight_ptr + offsets, grad, mask=mask)
    tl.store(grad_norm_weight_ptr + c, tl.sum(weight_dots, axis=1), mask=c_mask)
    tl.store(grad_norm_bias_ptr + c, tl.sum(bias_dots, axis=1), mask=c_mask)


def unfold(
    grad_weight: Tensor, grad_bias: Tensor, weight: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """As PyTorch's in steps.py, in one pass; sums in an order that the shape fixes."""
    hidden, channels = weight.shape
    grad_norm_weight, grad_norm_bias = (grad_bias.new_empty(channels) for _ in range(2))
    unfolded = torch.empty_like(grad_weight)
    launch(
        unfold_kernel,
        (-(-channels // UNFOLD_CHANNELS),),
        grad_weight,
        grad_bias,
        weight.contiguous(),
        norm_weight,
        norm_bias,
        grad_norm_weight,
        grad_norm_bias,
        unfolded,
        hidden,
        channels,
        BLOCK_H=min(UNFOLD_HIDDEN, next_power_of_2(hidden)),
        BLOCK_C=UNFOLD_CHANNELS,
        warps=UNFOLD_WARPS,
    )
    return grad_norm_weight, grad_norm_bias, unfolded


_steps = Steps(depthwise_conv_layer_norm, depthwise_conv, layer_norm, mlp, mlp.takes_one_kernel, fold, unfold)
forward, backward = _steps.forward, _steps.backward
