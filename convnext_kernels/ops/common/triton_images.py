"""Scales of a product's operand [tokens, inner] that are each image's own."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class ImageScale(NamedTuple):
    """Every token is multiplied by its image's scale [N, inner], in float32, and bias [inner] is added."""

    scale: Tensor
    bias: Tensor


@triton.jit
def image_at(place, order_ptr, tokens):
    """The image that comes at a place, in the order of stochastic depth if there is one."""
    if order_ptr is not None:
        place = tl.load(order_ptr + place * tokens) // tokens
    return place.to(tl.int64)


@triton.jit
def images_of_tile(first_row, rows, order_ptr, tokens, BLOCK: tl.constexpr):
    """The two images of a tile, which are the same in the last one, and which of its rows are the first's."""
    place = first_row // tokens
    first = image_at(place, order_ptr, tokens)
    second = image_at(min(place + 1, rows // tokens - 1), order_ptr, tokens)
    return first, second, first_row + tl.arange(0, BLOCK) < (place + 1) * tokens


@triton.jit
def scale_images(a, scale_ptr, bias_ptr, first, second, in_first, k, k_mask, inner):
    """The operand's tile scaled, and rounded as if it had been stored."""
    of_first = tl.load(scale_ptr + first * inner + k, mask=k_mask, other=0.0)[None, :]
    of_second = tl.load(scale_ptr + second * inner + k, mask=k_mask, other=0.0)[None, :]
    bias = tl.load(bias_ptr + k, mask=k_mask, other=0.0).to(tl.float32)[None, :]
    return (a.to(tl.float32) * tl.where(in_first[:, None], of_first, of_second) + bias).to(a.dtype)
