"""The public operators, gathered: what `torch.nn.functional` is to torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from convnext_kernels.backends import Explanation, ExplanationReached, explaining
from convnext_kernels.ops.convnext_block import convnext_block
from convnext_kernels.ops.depthwise_conv import depthwise_conv2d
from convnext_kernels.ops.depthwise_conv_layer_norm import depthwise_conv2d_layer_norm
from convnext_kernels.ops.layer_norm import layer_norm
from convnext_kernels.ops.mlp import mlp
from convnext_kernels.ops.patch_linear import patch_linear
from convnext_kernels.ops.response_norm import global_response_norm

OPERATORS: dict[str, Callable[..., Tensor]] = {
    function.__name__: function
    for function in (
        convnext_block,
        depthwise_conv2d,
        depthwise_conv2d_layer_norm,
        global_response_norm,
        layer_norm,
        mlp,
        patch_linear,
    )
}
"""Every public operator by its name."""

__all__ = ["OPERATORS", "explain", *OPERATORS]


def explain(operator: str | Callable[..., Tensor], *args: Any, **kwargs: Any) -> Explanation:
    """Says which backend a call would take and what speaks against the others; nothing is computed.

    The answer is that of the call itself, made with the same arguments and stopped where its backend is chosen.

    Args:
        operator: a public operator or its name.
        args, kwargs: the call's arguments.

    Raises:
        ValueError: no operator has that name, an argument does not fit, or tensors have no values (meta, fake), whose
            call gives a shape and needs no backend.
    """
    names = (name for name, function in OPERATORS.items() if operator in (name, function))
    name = next(names, repr(operator))
    if name not in OPERATORS:
        raise ValueError(f"operator: got {name}; accepted: {', '.join(OPERATORS)}")
    try:
        with explaining(), torch.no_grad():
            OPERATORS[name](*args, **kwargs)
    except ExplanationReached as reached:
        return reached.explanation
    raise ValueError(f"{name}: got tensors without values; accepted: tensors on a device that computes")
