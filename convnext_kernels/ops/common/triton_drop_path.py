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
    """The factor [N] of each image, and on the device the order in which kernels take the images.

    order [N] holds the images' numbers, those whose factor is not 0 first and both parts ascending; kept [1] is how
    many they are; int32. An image has tokens_per_image rows.
    """

    factor: Tensor
    order: Tensor
    kept: Tensor
    tokens_per_image: int


@triton.jit
def _kept(factor_ptr, image, images):
    return (tl.load(factor_ptr + image, mask=image < images, other=0.0) != 0).to(tl.int32)


@triton.jit(do_not_specialize=["images"])
def order_kernel(factor_ptr, order_ptr, kept_ptr, images, BLOCK: tl.constexpr):
    """One program: counts the kept images, then gives every image its place."""
    total = tl.zeros((BLOCK,), dtype=tl.int32)
    for start in range(0, images, BLOCK):
        total += _kept(factor_ptr, start + tl.arange(0, BLOCK), images)
    count, before = tl.sum(total), tl.sum(tl.zeros((BLOCK,), dtype=tl.int32))
    tl.store(kept_ptr, count)
    for start in range(0, images, BLOCK):
        image = start + tl.arange(0, BLOCK)
        kept = _kept(factor_ptr, image, images)
        kept_before = before + tl.cumsum(kept) - kept
        place = tl.where(kept != 0, kept_before, count + image - kept_before)
        tl.store(order_ptr + place, image, mask=image < images)
        before += tl.sum(kept)


@triton.jit
def in_order(t, mask, order_ptr, tokens_per_image):
    """Image and row of tokens that are numbered in the order of the work."""
    image = tl.load(order_ptr + t // tokens_per_image, mask=mask, other=0)
    return image, image * tokens_per_image + t % tokens_per_image


def drop_path(factor: Tensor | None, tokens_per_image: int) -> DropPath | None:
    """The order for a factor [N], found without a synchronisation; None for None."""
    if factor is None:
        return None
    order = torch.empty(factor.shape, dtype=torch.int32, device=factor.device)
    kept = order.new_empty(1)
    launch(order_kernel, (1,), factor, order, kept, factor.shape[0], BLOCK=BLOCK, warps=4)
    return DropPath(factor, order, kept, tokens_per_image)
