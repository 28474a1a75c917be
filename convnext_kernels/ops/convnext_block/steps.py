"""A ConvNeXt block by the operators' own kernels, whichever backend's, and what they leave for backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from convnext_kernels.ops.common.layouts import from_channels_last, nothing, statistics_dtype, to_channels_last


def fold(
    weight: Tensor, bias: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None, input: Tensor
) -> tuple[Tensor, Tensor]:
    """The norm's affine in the layer behind it, which then takes normalised tokens x^ as they are:

        (x^ norm_weight + norm_bias) weight' + bias = x^ folded_weight' + folded_bias
        folded_weight = weight diag(norm_weight),  folded_bias = bias + weight norm_bias

    The weight is rounded once, to the input's dtype; the bias stays in float32.
    """
    dtype = statistics_dtype(input)
    exact = weight.to(dtype)
    folded_weight = exact.new_empty(exact.shape, dtype=input.dtype)
    torch.mul(exact, 1 if norm_weight is None else norm_weight, out=folded_weight)
    folded_bias = exact.new_zeros(weight.shape[0]) if bias is None else bias.to(dtype, copy=True)
    if norm_bias is not None:
        folded_bias += (exact * norm_bias).sum(1)
    return folded_weight, folded_bias


def unfold(
    grad_weight: Tensor, grad_bias: Tensor, weight: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of norm_weight, norm_bias and weight from those of `fold`'s results; no pass over tokens:

    grad_norm_weight[c] = sum over h of weight[h, c] grad_folded_weight[h, c]
    grad_norm_bias      = weight' grad_folded_bias
    grad_weight         = grad_folded_weight diag(norm_weight) + grad_folded_bias norm_bias'
    """
    exact = weight.to(grad_weight.dtype)
    unfolded = grad_weight if norm_weight is None else grad_weight * norm_weight
    if norm_bias is not None:
        unfolded = unfolded + grad_bias[:, None] * norm_bias
    return (exact * grad_weight).sum(0), (exact * grad_bias[:, None]).sum(0), unfolded


def _never(input: Tensor, grn_weight: Tensor | None) -> bool:
    return False


@dataclass(frozen=True)
class Steps:
    """The steps of a block, each by the module of one backend.

    Args:
        takes_one_kernel: whether mlp has a kernel for a call that also normalises its input, `forward_normalizing`.
        fold, unfold: PyTorch's, or kernels for them.
    """

    conv_layer_norm: ModuleType
    depthwise_conv: ModuleType
    layer_norm: ModuleType
    mlp: ModuleType
    takes_one_kernel: Callable[[Tensor, Tensor | None], bool] = _never
    fold: Callable[..., tuple[Tensor, Tensor]] = fold
    unfold: Callable[..., tuple[Tensor, Tensor, Tensor]] = unfold

    def forward(
        self,
        input: Tensor,
        conv_weight: Tensor,
        conv_bias: Tensor | None,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        weight1: Tensor,
        bias1: Tensor | None,
        weight2: Tensor,
        bias2: Tensor | None,
        layer_scale: Tensor | None,
        drop_path_factor: Tensor | None,
        grn_weight: Tensor | None,
        grn_bias: Tensor | None,
        residual: Tensor | None,
        dilation: int,
        eps: float,
        grn_eps: float,
        activation: str,
        recompute_hidden: bool | None,
        save: bool,
    ) -> tuple[Tensor, ...]:
        """Output, and where `save` asks for them x^, rstd, folded weight1, folded bias1 and the pre-activation.

        The branch is added to the residual, in its dtype, or where there is none to the input. Without `save` the
        norm's affine is not folded: at batch 1 that would be most of the traffic. The pre-activation is not saved where
        `recompute_hidden` says so.
        """
        norm: tuple[Tensor | None, Tensor | None] = (norm_weight, norm_bias)
        layer1: tuple[Tensor, Tensor | None] = (weight1, bias1)
        folded = nothing(input), nothing(input)
        if save:
            folded = self.fold(weight1, bias1, *norm, input)
            norm, layer1 = (None, None), folded
        skip = input if residual is None else residual
        layer2, grn = (weight2, bias2, layer_scale, drop_path_factor, skip), (grn_weight, grn_bias, grn_eps)
        saves_hidden = save and not recompute_hidden
        normalized, rstd, pre_activation = nothing(input), nothing(input), nothing(input)
        if not saves_hidden and self.takes_one_kernel(input, grn_weight):
            convolved = self.depthwise_conv.forward(input, conv_weight, conv_bias, dilation, drop_path_factor)
            output, normalized, rstd = self.mlp.forward_normalizing(
                convolved, *norm, eps, *layer1, *layer2, activation, save
            )
        elif save:
            normalized, rstd = self.conv_layer_norm.forward_normalized(
                input, conv_weight, conv_bias, dilation, eps, drop_path_factor
            )
            output, pre_activation = self.mlp.forward(
                normalized, *layer1, *layer2, *grn, activation, not saves_hidden, saves_hidden
            )
        else:
            u = self.conv_layer_norm.forward(input, conv_weight, conv_bias, *norm, dilation, eps, False)[0]
            output = self.mlp.forward(u, *layer1, *layer2, *grn, activation, True, False)[0]
        return output, normalized, rstd, *folded, pre_activation

    def backward(
        self,
        grad_output: Tensor,
        input: Tensor,
        normalized: Tensor,
        rstd: Tensor,
        folded_weight1: Tensor,
        folded_bias1: Tensor,
        pre_activation: Tensor | None,
        conv_weight: Tensor,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        weight1: Tensor,
        weight2: Tensor,
        bias2: Tensor | None,
        layer_scale: Tensor | None,
        drop_path_factor: Tensor | None,
        grn_weight: Tensor | None,
        grn_bias: Tensor | None,
        dilation: int,
        grn_eps: float,
        activation: str,
        skips: bool,
        wanted: list[bool],
    ) -> tuple[Tensor, ...]:
        """Gradients of input, conv_weight, conv_bias, norm_weight, norm_bias, weight1, bias1, weight2, bias2,
        layer_scale, grn_weight and grn_bias, the parameters' in float32; `mlp`'s backward, `unfold`, that of the norm
        of x^ and that of the convolution, which also adds the gradient that came past the block where the input `skips`
        it.
        """
        grad_output = from_channels_last(to_channels_last(grad_output.to(input.dtype)))  # once for all that read it
        wants_input, wants_fold = any(wanted[:3]), any(wanted[3:6])
        wants_mlp = [wants_input, wants_fold, wants_fold or wanted[6], *wanted[7:]]
        grad_normalized, grad_weight1, grad_bias1, *others = self.mlp.backward(
            grad_output, normalized, pre_activation, folded_weight1, folded_bias1, weight2, bias2, layer_scale,
            drop_path_factor, grn_weight, grn_bias, grn_eps, activation, wants_mlp,
        )  # fmt: skip
        grad_fold: tuple[Tensor, ...] = (nothing(input),) * 3
        if wants_fold:
            grad_fold = self.unfold(grad_weight1, grad_bias1, weight1, norm_weight, norm_bias)
        grad_conv: tuple[Tensor, ...] = (nothing(input),) * 3
        if wants_input:
            grad_convolved, *_ = self.layer_norm.backward(
                grad_normalized, normalized, None, None, rstd, [True, False, False], drop_path_factor
            )
            past = grad_output if skips else None
            grad_conv = self.depthwise_conv.backward(
                grad_convolved, input, conv_weight, dilation, wanted[:3], drop_path_factor, past
            )
        gradients = (*grad_conv, *grad_fold, grad_bias1, *others)
        return tuple(g if want else nothing(input) for g, want in zip(gradients, wanted, strict=True))
