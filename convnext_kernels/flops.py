"""FLOPs of the operators for `torch.utils.flop_counter.FlopCounterMode`, which counts 0 where it has no formula."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import torch

from convnext_kernels.ops.convnext_block import operator as convnext_block
from convnext_kernels.ops.depthwise_conv import operator as depthwise_conv
from convnext_kernels.ops.depthwise_conv_layer_norm import operator as depthwise_conv_layer_norm
from convnext_kernels.ops.mlp import operator as mlp
from convnext_kernels.ops.patch_linear import operator as patch_linear

Shape = Sequence[int]


def _convolution(weight: Shape, output: Shape, **_: Any) -> int:
    """2 for each weight of the filter that an output value is the sum over."""
    return 2 * prod(output) * prod(weight[1:])


def _convolution_backward(grad_output: Shape, input: Shape, weight: Shape, wanted: Sequence[bool], **_: Any) -> int:
    """What PyTorch counts for its own convolution of these shapes, right or wrong: see `register_flop_formulas`."""
    from torch.utils.flop_counter import flop_registry

    geometry = (None, None, None, False, None)  # stride, padding, dilation, transposed, output_padding
    groups = input[1] // weight[1]
    formula = flop_registry[torch.ops.aten.convolution_backward]
    return formula(grad_output, input, weight, None, *geometry, groups, wanted[:3], out_val=(input, weight))


def _product(input: Shape, weight1: Shape) -> int:
    """2 tokens C hidden: of any of the MLP's matrix products, forward and backward."""
    return 2 * prod(input) * weight1[0]


def _mlp(input: Shape, weight1: Shape, **_: Any) -> int:
    return 2 * _product(input, weight1)


def _mlp_backward(input: Shape, pre_activation: Shape | None, weight1: Shape, wanted: Sequence[bool], **_: Any) -> int:
    """Gradients of hidden activations, input, weight1 and weight2, and the pre-activation where it was not saved."""
    wants_input, wants_weight1, wants_bias1, wants_weight2, _bias2, _layer_scale, *wants_grn = wanted
    wants_hidden = wants_input or wants_weight1 or wants_bias1 or any(wants_grn)
    products = sum((pre_activation is None, wants_hidden, wants_input, wants_weight1, wants_weight2))
    return products * _product(input, weight1)


def _block(input: Shape, conv_weight: Shape, weight1: Shape, output: Shape, **_: Any) -> int:
    return _convolution(conv_weight, output) + _mlp(input, weight1)


def _block_backward(
    grad_output: Shape,
    input: Shape,
    pre_activation: Shape | None,
    conv_weight: Shape,
    weight1: Shape,
    wanted: Sequence[bool],
    **_: Any,
) -> int:
    """As published: the norm's affine, which kernels fold into weight1, takes the gradient of the MLP's input."""
    wanted_of_mlp = [any(wanted[:5]), *wanted[5:]]
    return _convolution_backward(grad_output, input, conv_weight, wanted) + _mlp_backward(
        input, pre_activation, weight1, wanted_of_mlp
    )


FORMULAS: Mapping[torch._ops.OpOverload, Callable[..., int]] = {
    convnext_block.FORWARD: _block,
    convnext_block.BACKWARD: _block_backward,
    depthwise_conv.FORWARD: _convolution,
    depthwise_conv.BACKWARD: _convolution_backward,
    depthwise_conv_layer_norm.FORWARD: _convolution,
    depthwise_conv_layer_norm.BACKWARD: _convolution_backward,
    mlp.FORWARD: _mlp,
    mlp.BACKWARD: _mlp_backward,
    patch_linear.FORWARD: _convolution,
    patch_linear.BACKWARD: _convolution_backward,
}
"""FLOPs by an operator's arguments, under the names of its schema, and its first result, `output`; tensors are shapes.
Norms have no formula, as PyTorch's have none."""


def register_flop_formulas() -> None:
    """Makes every `torch.utils.flop_counter.FlopCounterMode` constructed from now on count our operators.

    The rules are PyTorch's: 2 for each multiply-add of a convolution or matrix product, 0 for all else; of forward all
    of it, as if stochastic depth dropped no image; of backward what the wanted gradients take in PyTorch's own
    operators, and the product that computes a pre-activation again where it was not saved. A model's total is thereby
    that of the same model in plain PyTorch, whatever is frozen, plus 2 tokens C hidden for each block that recomputes.
    Kernels may multiply more or less.

    So is PyTorch's error: 2.8 to 2.14 count the gradient of a depthwise filter of C channels C times over. By that a
    training step of ConvNeXt-T has 8.7 times the FLOPs of its forward; it multiplies three times as much.

    Calls after the first change nothing; formulas that others registered for an operator stay.
    """
    # Not at the top: this imports Triton, which reads TRITON_INTERPRET once.
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    for operator, formula in FORMULAS.items():
        if operator.overloadpacket not in flop_registry:
            register_flop_formula(operator.overloadpacket)(_of_positions(operator, formula))


def _of_positions(operator: torch._ops.OpOverload, formula: Callable[..., int]) -> Callable[..., int]:
    """The formula as `register_flop_formula` takes it: of an operator's arguments by position, and of `out_shape`."""
    names = [argument.name for argument in operator._schema.arguments]

    def flops(*arguments: Any, out_shape: Any) -> int:
        output = out_shape if isinstance(out_shape, torch.Size) else out_shape[0]
        return formula(**dict(zip(names, arguments, strict=True)), output=output)

    return flops
