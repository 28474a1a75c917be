"""The pointwise MLP of a ConvNeXt block with layer scale, stochastic depth and residual."""

from __future__ import annotations

from torch import Tensor

from convnext_kernels.backends import requested_backend
from convnext_kernels.ops.common.checks import (
    autocast,
    check_choice,
    check_input,
    check_parameter,
    check_positive,
    check_tensor,
)
from convnext_kernels.ops.common.layouts import channels
from convnext_kernels.ops.mlp.operator import CALL

ACTIVATIONS = ("gelu", "gelu_tanh")


def _checked_residual(residual: Tensor | None, input: Tensor) -> Tensor | None:
    """The residual in autocast's dtype, if it fits the input, which has that dtype already."""
    if residual is None:
        return None
    check_tensor("residual", residual)
    if residual.shape != input.shape or residual.device != input.device:
        got = f"shape {list(residual.shape)} on {residual.device}"
        raise ValueError(f"residual: got {got}; accepted: the input's {list(input.shape)} on {input.device}")
    residual = autocast(residual)
    if residual.dtype != input.dtype:
        raise TypeError(f"residual: got dtype {residual.dtype}; accepted: the input's {input.dtype}")
    return residual


def check_mlp(
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    layer_scale: Tensor | None,
    drop_path_factor: Tensor | None,
    grn_weight: Tensor | None,
    grn_bias: Tensor | None,
    grn_eps: float,
    activation: str,
) -> None:
    """Checks everything but the residual against the input."""
    check_tensor("weight1", weight1)
    width, hidden = channels(input), weight1.shape[0] if weight1.dim() == 2 else 4 * channels(input)
    check_parameter("weight1", weight1, (hidden, width), input)
    check_parameter("bias1", bias1, (hidden,), input)
    check_tensor("weight2", weight2)
    check_parameter("weight2", weight2, (width, hidden), input)
    check_parameter("bias2", bias2, (width,), input)
    check_parameter("layer_scale", layer_scale, (width,), input)
    check_parameter("drop_path_factor", drop_path_factor, (input.shape[0],), input)
    check_parameter("grn_weight", grn_weight, (hidden,), input)
    check_parameter("grn_bias", grn_bias, (hidden,), input)
    if (grn_weight is None) != (grn_bias is None):
        raise ValueError("grn_weight, grn_bias: got one of the two; accepted: both or neither")
    check_positive("grn_eps", grn_eps)
    check_choice("activation", activation, ACTIVATIONS)


def mlp(
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    *,
    layer_scale: Tensor | None = None,
    drop_path_factor: Tensor | None = None,
    residual: Tensor | None = None,
    grn_weight: Tensor | None = None,
    grn_bias: Tensor | None = None,
    grn_eps: float = 1e-6,
    activation: str = "gelu",
    recompute_hidden: bool = False,
    backend: str | None = None,
) -> Tensor:
    """The second half of a ConvNeXt block, per token (pixel) u of image n:

        out = residual + drop_path_factor[n] * layer_scale * (grn(gelu(u weight1' + bias1)) weight2' + bias2)

    where grn, the `global_response_norm` of ConvNeXt V2, and every term given as None are left out. Products of 16-bit
    tensors accumulate in float32; those of float32 tensors follow PyTorch's TF32 setting
    (`torch.set_float32_matmul_precision`). Saves for backward, when a gradient is asked for, input and pre-activation.
    Where nothing is saved and there is no grn, Triton's kernel for 16-bit tensors of few channels (96 to 192 of
    ConvNeXt's, to 160 on an A100) never writes the hidden activations.
    What is multiplied by a factor of 0 need not be computed, and what it holds then, NaN included, has no effect.

    Args:
        input: images [N, C, H, W] or tokens [N, L, C], float16, bfloat16, float32 (float64: reference only).
            Channels-last memory is native; other strides are copied once. N may be 0.
        weight1: [hidden, C]. bias1: [hidden] or None.
        weight2: [C, hidden]. bias2: [C] or None.
        layer_scale: [C] or None.
        drop_path_factor: [N] or None: the stochastic-depth factor of each image, 0 or 1 / keep probability. It gets no
            gradient.
        residual: shape and dtype of the input, or None.
        grn_weight, grn_bias: [hidden], both or neither. grn_eps: added to the mean norm.
        activation: "gelu" (exact, erf) or "gelu_tanh".
        recompute_hidden: backward computes the pre-activation [tokens, hidden] again, from the input, and it is not
            saved: most of what a block saves, for a sixth more arithmetic forward and backward.
        backend: "auto", "cuda", "triton" or "reference"; None takes that of `use_backend`.

        All parameters: float32 or the input's dtype.

    Returns:
        The input's shape and dtype (autocast's where it is on); images in channels-last memory.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it, what was got and what is accepted.
        BackendError: the backend asked for by name cannot run the call.

    Source: ConvNeXt, arXiv 2201.03545, figure 4; GRN from arXiv 2301.00808; stochastic depth from arXiv 1603.09382.
    """
    check_input(input, (3, 4))
    input = autocast(input)
    check_mlp(
        input, weight1, bias1, weight2, bias2, layer_scale, drop_path_factor, grn_weight, grn_bias, grn_eps, activation
    )
    residual = _checked_residual(residual, input)
    return CALL(
        input,
        weight1,
        bias1,
        weight2,
        bias2,
        layer_scale,
        drop_path_factor,
        residual,
        grn_weight,
        grn_bias,
        grn_eps,
        activation,
        recompute_hidden,
        False,
        requested_backend(backend),
    )[0]
