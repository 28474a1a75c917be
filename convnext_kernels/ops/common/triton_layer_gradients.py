"""`layer_gradients` in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from convnext_kernels.ops.common.launch import launch

# Four warps with 32 elements a thread; rows of 64 float32 load well whichever axis is dense.
BLOCK = 64
WARPS = 4


@triton.jit
def layer_gradients_kernel(
    product_ptr,
    weight_ptr,
    scale_ptr,
    shift_ptr,
    sums_ptr,
    grad_ptr,
    scale_dots_ptr,
    shift_dots_ptr,
    channels,
    others,
    stride_c,
    stride_o,
    BLOCK_C: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    c_mask, o_mask = c < channels, o < others
    offsets = c.to(tl.int64)[:, None] * stride_c + o.to(tl.int64)[None, :] * stride_o
    mask = c_mask[:, None] & o_mask[None, :]
    product = tl.load(product_ptr + offsets, mask=mask, other=0.0)
    grad = product
    if scale_ptr is not None:
        grad *= tl.load(scale_ptr + c, mask=c_mask, other=0.0).to(tl.float32)[:, None]
    weight = tl.load(weight_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    dots = tl.program_id(1) * channels + c
    sums = tl.zeros((BLOCK_O,), dtype=tl.float32)
    if sums_ptr is not None:
        sums = tl.load(sums_ptr + o, mask=o_mask, other=0.0)
    if shift_ptr is not None:
        grad += tl.load(shift_ptr + c, mask=c_mask, other=0.0).to(tl.float32)[:, None] * sums[None, :]
    tl.store(shift_dots_ptr + dots, tl.sum(weight * sums[None, :], axis=1), mask=c_mask)
    tl.store(scale_dots_ptr + dots, tl.sum(weight * product, axis=1), mask=c_mask)
    tl.store(grad_ptr + offsets, grad, mask=mask)


def layer_gradients(
    product: Tensor,
    weight: Tensor,
    channel_axis: int,
    scale: Tensor | None,
    shift: Tensor | None = None,
    sums: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As PyTorch's in layer_gradients.py, in one pass; sums in an order that the shape fixes."""
    weight, grad = weight.contiguous(), torch.empty_like(product, memory_format=torch.contiguous_format)
    channels, others = product.shape[channel_axis], product.shape[1 - channel_axis]
    tiles = -(-channels // BLOCK), -(-others // BLOCK)
    scale_dots, shift_dots = (product.new_empty((tiles[1], channels)) for _ in range(2))
    launch(
        layer_gradients_kernel,
        tiles,
        product.contiguous(),
        weight,
        scale,
        shift,
        sums,
        grad,
        scale_dots,
        shift_dots,
        channels,
        others,
        grad.stride(channel_axis),
        grad.stride(1 - channel_axis),
        BLOCK_C=BLOCK,
        BLOCK_O=BLOCK,
        warps=WARPS,
    )
    return grad, scale_dots.sum(0), shift_dots.sum(0)
