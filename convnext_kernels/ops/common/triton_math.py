"""Device functions that several Triton kernels use."""

from __future__ import annotations

import triton
import triton.language as tl

from convnext_kernels.backends import interpreting

# Triton's interpreter multiplies bfloat16 operands as raw integers; there products are made of float32 copies.
_UPCAST_OPERANDS = tl.constexpr(interpreting())


@triton.jit
def dot(a, b, accumulator, PRECISION: tl.constexpr):
    """accumulator + a b in float32. PRECISION ("ieee", "tf32") matters for float32 operands only."""
    if _UPCAST_OPERANDS:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision=PRECISION)


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
def gelu(x, TANH: tl.constexpr):
    """GELU in float32: exact to 2.5e-7 (PyTorch's own erf form: 1.2e-6), or its tanh form. NaN stays NaN."""
    if TANH:
        inner = 1.5957691216057308 * (x + 0.044715 * x * x * x)
        return x * tl.sigmoid(inner)
    magnitude = tl.minimum(tl.abs(x), 5.5, propagate_nan=tl.PropagateNan.ALL)
    positive = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return positive - magnitude * _normal_tail(magnitude)


@triton.jit
def gelu_derivative(x, TANH: tl.constexpr):
    """The derivative of `gelu`, exact to 1.6e-6 in its erf form. NaN stays NaN."""
    if TANH:
        inner = 1.5957691216057308 * (x + 0.044715 * x * x * x)
        gate = tl.sigmoid(inner)
        return gate + x * gate * (1 - gate) * (1.5957691216057308 + 0.2140644488 * x * x)
    magnitude = tl.minimum(tl.abs(x), 5.5, propagate_nan=tl.PropagateNan.ALL)
    tail = _normal_tail(magnitude)
    slope = magnitude * 0.3989422804 * tl.math.exp2(-0.7213475204 * magnitude * magnitude)
    return tl.where(x >= 0, 1 - tail + slope, tail - slope)
