"""Global response normalisation (GRN) of ConvNeXt V2."""

from __future__ import annotations

from torch import Tensor

from convnext_kernels.backends import requested_backend
from convnext_kernels.ops.common.checks import autocast, check_input, check_parameter, check_positive, check_tensor
from convnext_kernels.ops.common.layouts import channels
from convnext_kernels.ops.response_norm.operator import CALL


def global_response_norm(
    input: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-6, backend: str | None = None
) -> Tensor:
    """Scales every channel of an image by its norm relative to the other channels':

        G[n, c] = ||input[n, c]||_2 over the image's tokens
        out     = weight * (input * G / (mean_c(G) + eps)) + bias + input

    The sums of squares are in float32: in float16 they overflow.

    Args:
        input: images [N, C, H, W] or tokens [N, L, C], float16, bfloat16, float32 (float64: reference only).
            Channels-last memory is native; other strides are copied once. N may be 0.
        weight, bias: [C], float32 or the input's dtype.
        eps: added to the mean norm.
        backend: "auto", "cuda", "triton" or "reference"; None takes that of `use_backend`.

    Returns:
        The input's shape and dtype (autocast's where it is on); images in channels-last memory.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it, what was got and what is accepted.
        BackendError: the backend asked for by name cannot run the call.

    Source: ConvNeXt V2, arXiv 2301.00808, section 3.3.
    """
    check_input(input, (3, 4))
    input = autocast(input)
    for name, parameter in (("weight", weight), ("bias", bias)):
        check_tensor(name, parameter)
        check_parameter(name, parameter, (channels(input),), input)
    check_positive("eps", eps)
    return CALL(input, weight, bias, eps, requested_backend(backend))[0]
