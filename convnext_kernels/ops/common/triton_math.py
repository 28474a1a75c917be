"""Device functions that several Triton kernels use."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _normal_tail(magnitude):
    """Phi(-a) for 0 <= a <= 5.5 as 2^polynomial, a least-squares fit of log2 Phi(-a)."""
    q = 3.4035391e-5 * magnitude - 7.7407894e-4
    q = q * magnitude + 0.00808540
    q = q * magnitude - 0.05340076
    q = q * magnitude - 0.45879540
    q = q * magnitude - 1.15118706
    q = q * magnitude - 0.99999565
    return tl.math.exp2(q)


@triton.jit
def gelu(x, FORM: tl.constexpr):
    """GELU in float32. NaN stays NaN.

    FORM: "erf", the exact one, for float32 tensors; "fit", also exact but to 2.5e-7 in a third of the instructions, for
    16-bit tensors; "tanh", the approximation some models are trained with.
    """
    if FORM == "tanh":
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    if FORM == "erf":
        return 0.5 * x * (1 + tl.math.erf(x * 0.7071067811865476))
    magnitude = tl.minimum(tl.abs(x), 5.5, propagate_nan=tl.PropagateNan.ALL)
    positive = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return positive - magnitude * _normal_tail(magnitude)


@triton.jit
def gelu_derivative(x, FORM: tl.constexpr):
    """The derivative of `gelu`; "fit" is exact to 1.6e-6. NaN stays NaN."""
    if FORM == "tanh":
        gate = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        return gate + x * gate * (1 - gate) * (1.5957691216057308 + 0.2140644488 * x * x)
    if FORM == "erf":
        density = 0.3989422804014327 * tl.math.exp(-0.5 * x * x)
        return 0.5 * (1 + tl.math.erf(x * 0.7071067811865476)) + x * density
    magnitude = tl.minimum(tl.abs(x), 5.5, propagate_nan=tl.PropagateNan.ALL)
    tail = _normal_tail(magnitude)
    slope = magnitude * 0.3989422804 * tl.math.exp2(-0.7213475204 * magnitude * magnitude)
    return tl.where(x >= 0, 1 - tail + slope, tail - slope)


@triton.jit
def dot(a, b, accumulator, PRECISION: tl.constexpr):
    """accumulator + a b in float32. PRECISION: of float32's products, `launch.product_precision`.

    Operands of TF32 are rounded, as PyTorch's products do it: the instructions cut their last 13 bits off, which makes
    every product smaller, and errors 2.5 to 4 times as large.
    """
    if PRECISION == "tf32" and a.dtype == tl.float32:
        a = tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,r", [a], tl.float32, is_pure=True, pack=1)
        b = tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,r", [b], tl.float32, is_pure=True, pack=1)
    return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def _halves(tile):
    return tl.split(tl.permute(tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def _quarters(tile):
    left, right = _halves(tile)
    first, second = _halves(left)
    third, fourth = _halves(right)
    return first, second, third, fourth


@triton.jit
def in_parts(tile, PARTS: tl.constexpr):
    """A tuple of 1, 2, 4 or 8 tiles: a tile's columns from left to right."""
    tl.static_assert(PARTS == 1 or PARTS == 2 or PARTS == 4 or PARTS == 8)
    # Not by recursion, on which Triton 3.4 does not end.
    if PARTS == 2:
        parts = _halves(tile)
    elif PARTS == 4:
        parts = _quarters(tile)
    elif PARTS == 1:
        parts = (tile,)
    else:
        left, right = _halves(tile)
        a, b, c, d = _quarters(left)
        e, f, g, h = _quarters(right)
        parts = (a, b, c, d, e, f, g, h)
    return parts


@triton.jit
def load_part(ptr, row_offsets, row_mask, first, end, COLUMNS: tl.constexpr):
    """So many columns of rows, from the first on and before the end, if there is one."""
    n = first + tl.arange(0, COLUMNS)
    mask = row_mask[:, None]
    if end is not None:
        mask = mask & (n < end)[None, :]
    return tl.load(ptr + (row_offsets[:, None] + n[None, :]), mask=mask, other=0.0)


def gelu_form(activation: str, dtype: torch.dtype) -> str:
    """The FORM of an operator's activation ("gelu" or "gelu_tanh") for tensors of a dtype."""
    if activation == "gelu_tanh":
        return "tanh"
    return "erf" if dtype == torch.float32 else "fit"
