"""The definition of LayerNorm over channels and its gradients in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from convnext_kernels.ops.common.layouts import (
    at_least_float32,
    from_channels_last,
    nothing,
    statistics_dtype,
    to_channels_last,
)


def forward(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    save: bool,
    drop_path_factor: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, and where `save` asks for them mean and rstd [tokens], in float32; see `layer_norm`.

    Kernels give zeros for images whose drop_path_factor is 0.
    """
    rows = to_channels_last(input)
    shape = [rows.shape[-1]]
    weight = None if weight is None else weight.to(rows.dtype)
    bias = None if bias is None else bias.to(rows.dtype)
    if not save:
        output = F.layer_norm(rows, shape, weight, bias, eps)
        return from_channels_last(output), nothing(rows), nothing(rows)
    output, mean, rstd = torch.native_layer_norm(rows, shape, weight, bias, eps)
    dtype = statistics_dtype(input)
    return from_channels_last(output), mean.to(dtype).flatten(), rstd.to(dtype).flatten()


def backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    wanted: list[bool],
    drop_path_factor: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, weight and bias (both in float32), with x^ the normalised input and g = grad_output weight:

    grad_input  = rstd (g - mean_c(g) - x^ mean_c(g x^))
    grad_weight = sum over tokens of grad_output x^
    grad_bias   = sum over tokens of grad_output

    Where mean is None the input is x^ itself. Where drop_path_factor [N] is 0, grad_output must be; kernels then skip
    the image.
    """
    grad_rows, rows = to_channels_last(grad_output), to_channels_last(input)
    shape = [rows.shape[-1]]
    grad_rows, rows = at_least_float32(grad_rows), at_least_float32(rows)
    statistics = [s.view(*rows.shape[:-1], 1) for s in (torch.zeros_like(rstd) if mean is None else mean, rstd)]
    if mean is None:
        rows = rows / statistics[1]
    unit = torch.ones(shape, dtype=rows.dtype, device=rows.device) if weight is None else weight.to(rows.dtype)
    grad_input, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
        grad_rows, rows, shape, *statistics, unit, unit, wanted
    )
    return (
        from_channels_last(grad_input.to(input.dtype)) if wanted[0] else nothing(input),
        at_least_float32(grad_weight) if wanted[1] else nothing(input),
        at_least_float32(grad_bias) if wanted[2] else nothing(input),
    )
