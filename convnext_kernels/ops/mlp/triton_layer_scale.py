"""What layer scale asks of the MLP's backward, in Triton: the scaled weight2 and, from sums over tokens, gradients."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from convnext_kernels.ops.common.launch import launch, next_power_of_2
from convnext_kernels.ops.common.layouts import nothing

# 16 elements a thread. A program of the gradients' sums over all hidden channels, and so writes no partial sums.
BLOCK_CHANNELS = 8
SCALE_HIDDEN, SCALE_WARPS = 256, 4
GRADIENTS_HIDDEN, GRADIENTS_WARPS = 1024, 16


@triton.jit
def scale_kernel(
    weight_ptr,
    layer_scale_ptr,
    scaled_ptr,
    power_ptr,
    channels,
    hidden,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    c_mask, h_mask = c < channels, h < hidden
    layer_scale = tl.load(layer_scale_ptr + c, mask=c_mask, other=0.0).to(tl.float32)
    if power_ptr is not None:
        exponents = tl.zeros((BLOCK_H,), dtype=tl.int32)
        for start in range(0, channels, BLOCK_H):
            every = start + tl.arange(0, BLOCK_H)
            value = tl.load(layer_scale_ptr + every, mask=every < channels, other=0.0).to(tl.float32)
            exponents = tl.maximum(exponents, value.to(tl.int32, bitcast=True) & 0x7F800000)
        exponent = tl.max(exponents, axis=0)
        power = tl.where(exponent == 0, 0x3F800000, exponent).to(tl.float32, bitcast=True)
        layer_scale = tl.div_rn(layer_scale, power)
        if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
            tl.store(power_ptr, power)
    offsets, mask = c.to(tl.int64)[:, None] * hidden + h[None, :], c_mask[:, None] & h_mask[None, :]
    weight = tl.load(weight_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(scaled_ptr + offsets, (layer_scale[:, None] * weight).to(scaled_ptr.dtype.element_ty), mask=mask)


def scaled_weight2(weight2: Tensor, layer_scale: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """As the reference's, in one kernel."""
    if layer_scale is None:
        return weight2.to(dtype), None
    weight2 = weight2.contiguous()
    scaled = torch.empty_like(weight2, dtype=dtype)
    power = weight2.new_empty(1, dtype=torch.float32) if dtype == torch.float16 else None
    channels, hidden = weight2.shape
    launch(
        scale_kernel,
        (-(-channels // BLOCK_CHANNELS), -(-hidden // SCALE_HIDDEN)),
        weight2,
        layer_scale,
        scaled,
        power,
        channels,
        hidden,
        BLOCK_C=BLOCK_CHANNELS,
        BLOCK_H=SCALE_HIDDEN,
        warps=SCALE_WARPS,
    )
    return scaled, power


@triton.jit
def parameter_gradients_kernel(
    products_ptr,
    grad_sums_ptr,
    weight_ptr,
    bias_ptr,
    layer_scale_ptr,
    grad_weight_ptr,
    grad_bias_ptr,
    grad_layer_scale_ptr,
    channels,
    hidden,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_mask = c < channels
    layer_scale = tl.load(layer_scale_ptr + c, mask=c_mask, other=0.0).to(tl.float32)
    dots = tl.zeros((BLOCK_C, BLOCK_H), dtype=tl.float32)
    for start in range(0, hidden, BLOCK_H):
        h = start + tl.arange(0, BLOCK_H)
        offsets, mask = c.to(tl.int64)[:, None] * hidden + h[None, :], c_mask[:, None] & (h < hidden)[None, :]
        product = tl.load(products_ptr + offsets, mask=mask, other=0.0)
        dots += product * tl.load(weight_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad_weight_ptr + offsets, layer_scale[:, None] * product, mask=mask)
    grad_layer_scale = tl.sum(dots, axis=1)
    grad_sum = tl.load(grad_sums_ptr + c, mask=c_mask, other=0.0)
    if bias_ptr is not None:
        grad_layer_scale += tl.load(bias_ptr + c, mask=c_mask, other=0.0).to(tl.float32) * grad_sum
    tl.store(grad_bias_ptr + c, layer_scale * grad_sum, mask=c_mask)
    tl.store(grad_layer_scale_ptr + c, grad_layer_scale, mask=c_mask)


def parameter_gradients(
    products: Tensor, grad_sums: Tensor, weight2: Tensor, bias2: Tensor | None, layer_scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference's, in one kernel; sums in an order that the shape fixes."""
    if layer_scale is None:
        return products, grad_sums, nothing(products)
    channels, hidden = weight2.shape
    grad_weight, grad_bias, grad_layer_scale = (torch.empty_like(t) for t in (products, grad_sums, grad_sums))
    launch(
        parameter_gradients_kernel,
        (-(-channels // BLOCK_CHANNELS),),
        products,
        grad_sums,
        weight2.contiguous(),
        bias2,
        layer_scale,
        grad_weight,
        grad_bias,
        grad_layer_scale,
        channels,
        hidden,
        BLOCK_C=BLOCK_CHANNELS,
        BLOCK_H=min(GRADIENTS_HIDDEN, next_power_of_2(hidden)),
        warps=GRADIENTS_WARPS,
    )
    return grad_weight, grad_bias, grad_layer_scale
