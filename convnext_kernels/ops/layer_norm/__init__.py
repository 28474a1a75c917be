"""LayerNorm over the channels of images or tokens."""

from __future__ import annotations

from torch import Tensor

from convnext_kernels.backends import requested_backend
from convnext_kernels.ops.common.checks import autocast, check_input, check_parameter, check_positive
from convnext_kernels.ops.common.layouts import channels
from convnext_kernels.ops.layer_norm.operator import CALL


def check_norm(input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, prefix: str = "") -> None:
    """Checks the parameters of a norm over the input's channels."""
    shape = (channels(input),)
    check_parameter(f"{prefix}weight", weight, shape, input)
    check_parameter(f"{prefix}bias", bias, shape, input)
    check_positive("eps", eps)


def layer_norm(
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-6,
    backend: str | None = None,
) -> Tensor:
    """Normalises the channels of every token (pixel) on its own:

        out = (input - mean) / sqrt(variance + eps) * weight + bias

    with mean and (biased) variance over the channels, in float32.

    Args:
        input: images [N, C, H, W] or tokens [N, L, C], float16, bfloat16, float32 (float64: reference only).
            Channels-last memory is native; other strides are copied once. N may be 0.
        weight, bias: [C] or None; float32 or the input's dtype.
        eps: added to the variance.
        backend: "auto", "cuda", "triton" or "reference"; None takes that of `use_backend`.

    Returns:
        The input's shape and dtype (autocast's where it is on, unlike `torch.nn.functional.layer_norm`, which returns
        float32 there); images in channels-last memory.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it, what was got and what is accepted.
        BackendError: the backend asked for by name cannot run the call.

    Source: Ba, Kiros and Hinton, arXiv 1607.06450; in ConvNeXt arXiv 2201.03545, section 2.6.
    """
    check_input(input, (3, 4))
    input = autocast(input)
    check_norm(input, weight, bias, eps)
    return CALL(input, weight, bias, eps, False, requested_backend(backend))[0]
