"""Depthwise convolution and then LayerNorm by the two operators' own kernels, whichever backend's."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

from torch import Tensor

from convnext_kernels.ops.common.layouts import nothing


@dataclass(frozen=True)
class TwoSteps:
    """One operator after the other, each by its module of one backend."""

    depthwise_conv: ModuleType
    layer_norm: ModuleType

    def forward(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        dilation: int,
        eps: float,
        save: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Output, and where `save` asks for them the convolution, mean and rstd; see `depthwise_conv2d_layer_norm`."""
        convolved = self.depthwise_conv.forward(input, weight, bias, dilation)
        output, mean, rstd = self.layer_norm.forward(convolved, norm_weight, norm_bias, eps, save)
        return output, convolved if save else nothing(input), mean, rstd

    def forward_normalized(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        dilation: int,
        eps: float,
        drop_path_factor: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Output without norm_weight and norm_bias, and rstd [pixels]: what a block saves.

        Kernels give zeros for images whose drop_path_factor [N] is 0, and do not read them.
        """
        convolved = self.depthwise_conv.forward(input, weight, bias, dilation, drop_path_factor)
        normalized, _, rstd = self.layer_norm.forward(convolved, None, None, eps, True, drop_path_factor)
        return normalized, rstd

    def backward(
        self,
        grad_output: Tensor,
        input: Tensor,
        weight: Tensor,
        norm_weight: Tensor | None,
        convolved: Tensor,
        mean: Tensor,
        rstd: Tensor,
        dilation: int,
        wanted: list[bool],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Gradients of input, weight, bias, norm_weight and norm_bias, the parameters' in float32."""
        wanted_norm = [any(wanted[:3]), *wanted[3:]]
        grad_convolved, grad_norm_weight, grad_norm_bias = self.layer_norm.backward(
            grad_output, convolved, norm_weight, mean, rstd, wanted_norm
        )
        grads = self.depthwise_conv.backward(grad_convolved, input, weight, dilation, wanted[:3])
        return (*grads, grad_norm_weight, grad_norm_bias)
