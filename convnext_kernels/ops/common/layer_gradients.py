"""From a linear layer's product over tokens to the gradients of what was multiplied into its weight."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

LayerGradients = Callable[..., tuple[Tensor, Tensor, Tensor]]
"""`layer_gradients`, or Triton's."""


def layer_gradients(
    product: Tensor,
    weight: Tensor,
    channel_axis: int,
    scale: Tensor | None,
    shift: Tensor | None = None,
    sums: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of a matrix whose channels c were scaled, with o its other axis:

        grad_weight[c, o] = scale[c] product[c, o] + shift[c] sums[o]
        scale_dots[c]     = sum over o of weight[c, o] product[c, o]
        shift_dots[c]     = sum over o of weight[c, o] sums[o]

    Args:
        product, weight: matrices of one shape, the product in float32.
        channel_axis: which of their axes is c.
        scale, shift: [c] or None, for ones and zeros.
        sums: [o] in float32; None for zeros.

    Returns:
        All three in float32.
    """
    by_channel, weight = product.movedim(channel_axis, 0), weight.movedim(channel_axis, 0).to(product.dtype)
    grad_weight = by_channel if scale is None else by_channel * scale[:, None]
    if shift is not None and sums is not None:
        grad_weight = grad_weight + shift[:, None] * sums
    shift_dots = product.new_zeros(len(weight)) if sums is None else (weight * sums).sum(1)
    return grad_weight.movedim(0, channel_axis), (weight * by_channel).sum(1), shift_dots
