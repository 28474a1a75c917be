"""Stochastic depth that saves the work: tokens in an order in which those of kept images come first."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from convnext_kernels.ops.common.launch import launch

BLOCK = 1024


class DropPath(NamedTuple):
    """On the device: the order in which kernels take tokens, and their factors.

    order [tokens], int32, holds the tokens' rows: images whose factor is not 0 come first, and both parts ascend.
    factor [tokens], float32, is that of each token in this order; kept [1], int32, is how many come first.
    """

    order: Tensor
    factor: Tensor
    kept: Tensor


@triton.jit(do_not_specialize=["images", "tokens"])
def order_kernel(image_factor_ptr, order_ptr, factor_ptr, kept_ptr, images, tokens, BLOCK: tl.constexpr):
    """A program finds the place of one image, of so many tokens, and writes those there."""
    image = tl.program_id(0)
    kept = tl.zeros((BLOCK,), dtype=tl.int32)
    kept_before = tl.zeros((BLOCK,), dtype=tl.int32)
    for start in range(0, images, BLOCK):
        other = start + tl.arange(0, BLOCK)
        is_kept = tl.load(image_factor_ptr + other, mask=other < images, other=0.0) != 0
        kept += is_kept.to(tl.int32)
        kept_before += (is_kept & (other < image)).to(tl.int32)
    count, before, factor = tl.sum(kept), tl.sum(kept_before), tl.load(image_factor_ptr + image).to(tl.float32)
    if image == 0:
        tl.store(kept_ptr, count * tokens)
    place = tl.where(factor != 0, before, count + image - before) * tokens
    for start in range(0, tokens, BLOCK):
        t = start + tl.arange(0, BLOCK)
        tl.store(order_ptr + place + t, image * tokens + t, mask=t < tokens)
        tl.store(factor_ptr + place + t, tl.zeros((BLOCK,), dtype=tl.float32) + factor, mask=t < tokens)


def drop_path(image_factor: Tensor | None, tokens_per_image: int) -> DropPath | None:
    """The order for factors [N], found without a synchronisation; None for None."""
    if image_factor is None:
        return None
    images = image_factor.shape[0]
    order = torch.empty(images * tokens_per_image, dtype=torch.int32, device=image_factor.device)
    factor = torch.empty_like(order, dtype=torch.float32)
    kept = order.new_empty(1) if images else order.new_zeros(1)  # no program says so of no image
    launch(order_kernel, (images,), image_factor, order, factor, kept, images, tokens_per_image, BLOCK=BLOCK, warps=4)
    return DropPath(order, factor, kept)
