"""The definition of the depthwise convolution and its gradients in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from convnext_kernels.ops.common.layouts import from_channels_last, nothing, statistics_dtype, to_channels_last


def _convolve(input: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    padding = dilation * (weight.shape[-1] // 2)
    bias = None if bias is None else bias.to(input.dtype)
    images = input.contiguous(memory_format=torch.channels_last)
    output = F.conv2d(images, weight.to(input.dtype), bias, padding=padding, dilation=dilation, groups=input.shape[1])
    return from_channels_last(to_channels_last(output))


def forward(
    input: Tensor, weight: Tensor, bias: Tensor | None, dilation: int, drop_path_factor: Tensor | None = None
) -> Tensor:
    """The convolution; see `depthwise_conv2d`. Kernels give zeros for images whose drop_path_factor is 0."""
    return _convolve(input, weight, bias, dilation)


def backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    dilation: int,
    wanted: list[bool],
    drop_path_factor: Tensor | None = None,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, weight and bias, the parameters' in float32.

    The input's gradient is the convolution of the output's with the filter flipped in both axes; the filter's is

        grad_weight[c, 0, i, j] = sum_nhw grad_output[n, c, h, w] * input[n, c, h + d (i - r), w + d (j - r)]

    Where the input also went around the convolution, `residual` is that gradient, added to its other one. Where
    drop_path_factor [N] is 0, grad_output must be; kernels then skip the image.
    """
    grad_input, grad_weight, grad_bias = nothing(weight), nothing(weight), nothing(weight)
    if wanted[0]:
        grad_input = _convolve(grad_output, weight.flip(2, 3), None, dilation)
        if residual is not None:
            grad_input = grad_input.add_(residual)
    if wanted[1]:
        padding = dilation * (weight.shape[-1] // 2)
        _, grad_weight, _ = torch.ops.aten.convolution_backward(
            grad_output.contiguous(memory_format=torch.channels_last),
            input.contiguous(memory_format=torch.channels_last),
            weight.to(input.dtype),
            None,
            [1, 1],
            [padding, padding],
            [dilation, dilation],
            False,
            [0, 0],
            input.shape[1],
            [False, True, False],
        )
        # DDP wants the parameter's strides, of dimensions of size 1 too; contiguous() leaves those as they are.
        grad_weight = grad_weight.to(statistics_dtype(input)).flatten(1).view(grad_weight.shape)
    if wanted[2]:
        grad_bias = grad_output.sum((0, 2, 3), dtype=statistics_dtype(input))
    return grad_input, grad_weight, grad_bias
