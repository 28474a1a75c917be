"""Depthwise 2-D convolution followed by LayerNorm over channels, as one operator."""

from __future__ import annotations

from torch import Tensor

from convnext_kernels.backends import requested_backend
from convnext_kernels.ops.common.checks import autocast, check_input
from convnext_kernels.ops.depthwise_conv import check_filter
from convnext_kernels.ops.depthwise_conv_layer_norm.operator import CALL
from convnext_kernels.ops.layer_norm import check_norm


def depthwise_conv2d_layer_norm(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    *,
    dilation: int = 1,
    eps: float = 1e-6,
    backend: str | None = None,
) -> Tensor:
    """The first half of a ConvNeXt block:

        out = layer_norm(depthwise_conv2d(input, weight, bias, dilation), norm_weight, norm_bias, eps)

    see `depthwise_conv2d` and `layer_norm`. Sums, mean and variance are in float32. Saves for backward, when a gradient
    is asked for, the convolution's output and mean and rstd of each pixel; nothing otherwise.

    Args:
        input: [N, C, H, W], float16, bfloat16, float32 (float64: reference only). Channels-last memory is native; other
            strides are copied once. N may be 0.
        weight: [C, 1, K, K], K odd; float32 or the input's dtype.
        bias, norm_weight, norm_bias: [C] or None; float32 or the input's dtype.
        dilation: distance between taps in pixels.
        eps: added to the variance.
        backend: "auto", "cuda", "triton" or "reference"; None takes that of `use_backend`.

    Returns:
        [N, C, H, W] in the input's dtype (autocast's where it is on), channels-last memory.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it, what was got and what is accepted.
        BackendError: the backend asked for by name cannot run the call.

    Source: ConvNeXt, arXiv 2201.03545, figure 4.
    """
    check_input(input, (4,))
    input = autocast(input)
    check_filter(input, weight, bias, dilation)
    check_norm(input, norm_weight, norm_bias, eps, prefix="norm_")
    return CALL(input, weight, bias, norm_weight, norm_bias, dilation, eps, False, requested_backend(backend))[0]
