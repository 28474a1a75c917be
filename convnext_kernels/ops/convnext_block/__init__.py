"""The whole ConvNeXt block, V1 and V2, as one operator."""

from __future__ import annotations

from torch import Tensor

from convnext_kernels.backends import requested_backend
from convnext_kernels.ops.common.checks import autocast, autocast_dtype, check_input
from convnext_kernels.ops.convnext_block.operator import CALL
from convnext_kernels.ops.depthwise_conv import check_filter
from convnext_kernels.ops.layer_norm import check_norm
from convnext_kernels.ops.mlp import check_mlp


def convnext_block(
    input: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    *,
    layer_scale: Tensor | None = None,
    drop_path_factor: Tensor | None = None,
    grn_weight: Tensor | None = None,
    grn_bias: Tensor | None = None,
    dilation: int = 1,
    eps: float = 1e-6,
    grn_eps: float = 1e-6,
    activation: str = "gelu",
    recompute_hidden: bool | None = None,
    float32_residual: bool = False,
    backend: str | None = None,
) -> Tensor:
    """A ConvNeXt block with its skip connection, for image n:

        u   = layer_norm(depthwise_conv2d(input, conv_weight, conv_bias, dilation), norm_weight, norm_bias, eps)
        out = input + drop_path_factor[n] * layer_scale * (grn(gelu(u weight1' + bias1)) weight2' + bias2)

    see `depthwise_conv2d`, `layer_norm` and `mlp`; every term given as None is left out. Saves for backward, when a
    gradient is asked for, the normalised convolution and its rstd, the pre-activation unless `recompute_hidden`, and
    weight1 with the norm's weight in it, [hidden, C]; all gradients of the norm follow from that of weight1. An image
    whose factor is 0 is not computed, forward or backward, by the kernels; what its branch would hold, NaN included,
    has no effect then.

    Args:
        input: images [N, C, H, W], float16, bfloat16, float32 (float64: reference only). Channels-last memory is
            native; other strides are copied once. N may be 0.
        conv_weight: [C, 1, K, K], K odd. conv_bias: [C] or None.
        norm_weight, norm_bias: [C] or None.
        weight1: [hidden, C]. bias1: [hidden] or None.
        weight2: [C, hidden]. bias2: [C] or None.
        layer_scale: [C] or None.
        drop_path_factor: [N] or None: the stochastic-depth factor of each image, 0 or 1 / keep probability. It gets no
            gradient.
        grn_weight, grn_bias: [hidden], both or neither. grn_eps: added to the mean norm.
        dilation: of the convolution, distance between taps in pixels.
        eps: added to the variance.
        activation: "gelu" (exact, erf) or "gelu_tanh".
        recompute_hidden: backward computes the pre-activation [pixels, hidden] again and it is not saved. None: on a
            GPU, without grn, up to 256 channels and not for float32 without TF32, where that is predicted to be faster.
        float32_residual: under autocast the skip connection and the result are float32, as PyTorch has them where the
            layer scale is. Without it blocks that follow each other round their sums to 16 bits, one after the other;
            with it they move 10 bytes more for each element of the input forward, and 14 backward.
        backend: "auto", "cuda" (convolution and norm in CUDA C++, products in Triton), "triton" or "reference"; None
            takes that of `use_backend`.

        All parameters: float32 or the input's dtype.

    Returns:
        The input's shape and dtype (autocast's where it is on, unless `float32_residual`), channels-last memory.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it, what was got and what is accepted.
        BackendError: the backend asked for by name cannot run the call.

    Source: ConvNeXt, arXiv 2201.03545, figure 4; GRN from arXiv 2301.00808; stochastic depth from arXiv 1603.09382.
    """
    check_input(input, (4,))
    residual = input.float() if float32_residual and autocast_dtype(input) else None
    # Its gradient is then the residual's.
    input = autocast(input) if residual is None else autocast(input.detach())
    check_filter(input, conv_weight, conv_bias, dilation, prefix="conv_")
    check_norm(input, norm_weight, norm_bias, eps, prefix="norm_")
    check_mlp(
        input, weight1, bias1, weight2, bias2, layer_scale, drop_path_factor, grn_weight, grn_bias, grn_eps, activation
    )
    return CALL(
        input,
        conv_weight,
        conv_bias,
        norm_weight,
        norm_bias,
        weight1,
        bias1,
        weight2,
        bias2,
        layer_scale,
        drop_path_factor,
        grn_weight,
        grn_bias,
        residual,
        dilation,
        eps,
        grn_eps,
        activation,
        recompute_hidden,
        False,
        requested_backend(backend),
    )[0]
