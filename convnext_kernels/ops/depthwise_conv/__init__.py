"""Depthwise 2-D convolution, stride 1, "same" zero padding."""

from __future__ import annotations

from torch import Tensor

from convnext_kernels.backends import requested_backend
from convnext_kernels.ops.common.checks import autocast, check_input, check_parameter, check_tensor
from convnext_kernels.ops.depthwise_conv.operator import CALL


def check_filter(input: Tensor, weight: Tensor, bias: Tensor | None, dilation: int, prefix: str = "") -> None:
    """Checks a depthwise filter, its bias and dilation against images [N, C, H, W]."""
    check_tensor(f"{prefix}weight", weight)
    channels, size = input.shape[1], weight.shape[-1] if weight.dim() == 4 else 0
    if size % 2 == 0 or weight.shape != (channels, 1, size, size):
        accepted = f"[{channels}, 1, K, K] with K odd, for an input of {channels} channels"
        raise ValueError(f"{prefix}weight: got shape {list(weight.shape)}; accepted: {accepted}")
    check_parameter(f"{prefix}weight", weight, (channels, 1, size, size), input)
    check_parameter(f"{prefix}bias", bias, (channels,), input)
    if not isinstance(dilation, int) or dilation < 1:
        raise ValueError(f"dilation: got {dilation}; accepted: an integer of at least 1")


def depthwise_conv2d(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, *, dilation: int = 1, backend: str | None = None
) -> Tensor:
    """Convolves each channel with its own filter:

        out[n, c, h, w] = bias[c] + sum_ij weight[c, 0, i, j] * input[n, c, h + d (i - r), w + d (j - r)]

    with K = 2r + 1 the filter's size, d the dilation, and zeros outside the image: the `conv2d` with groups = C and
    padding = d r of PyTorch. Sums are in float32.

    Args:
        input: [N, C, H, W], float16, bfloat16, float32 (float64: reference only). Channels-last memory is native; other
            strides are copied once. N may be 0.
        weight: [C, 1, K, K], K odd; float32 or the input's dtype.
        bias: [C] or None; float32 or the input's dtype.
        dilation: distance between taps in pixels.
        backend: "auto", "cuda", "triton" or "reference"; None takes that of `use_backend`.

    Returns:
        [N, C, H, W] in the input's dtype (autocast's where it is on), channels-last memory.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it, what was got and what is accepted.
        BackendError: the backend asked for by name cannot run the call.

    Source: the depthwise layer of ConvNeXt, arXiv 2201.03545, section 2.4.
    """
    check_input(input, (4,))
    input = autocast(input)
    check_filter(input, weight, bias, dilation)
    return CALL(input, weight, bias, dilation, requested_backend(backend))
