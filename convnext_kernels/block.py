"""ConvNeXt's block, V1 and V2, on the package's operators."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from convnext_kernels import functional
from convnext_kernels.accelerate.blocks import Structure, change_below
from convnext_kernels.backends import check_backend
from convnext_kernels.parameters import parameter_of
from convnext_kernels.reference import GlobalResponseNorm, ReferenceBlock, drop_path_factor

V1: Structure = (
    ("dwconv", nn.Conv2d, (("stride", (1, 1)), ("padding_mode", "zeros")), ()),
    ("norm", nn.LayerNorm, (), ()),
    ("pwconv1", nn.Linear, (), ()),
    ("pwconv2", nn.Linear, (), ()),
)
V2: Structure = (*V1, ("grn", GlobalResponseNorm, (), ()))


def structure_below(block: nn.Module) -> Structure:
    """The modules that the operator stands for, by `change_below`: those of V1 or V2, or of a subclass that has their
    forward, as parametrised modules are."""
    parts = block._modules
    return tuple(
        (name, type(parts[name]) if getattr(type(parts[name]), "forward", None) is kind.forward else kind, *rest)
        for name, kind, *rest in (V1 if block.grn is None else V2)
    )


@cache
def _warn_published_forward(change: str) -> None:
    warnings.warn(f"a ConvNeXtBlock runs the published forward, in plain PyTorch: {change}", stacklevel=2)


class ConvNeXtBlock(ReferenceBlock):
    """The block of ConvNeXt, V1 and V2, as one operator, `functional.convnext_block`:

        u   = layer_norm(depthwise_conv2d(input))
        out = input + drop_path_factor * gamma * (grn(gelu(u pwconv1' + b1)) pwconv2' + b2)

    Parameters carry the names and shapes of the official checkpoints (`dwconv`, `norm`, `pwconv1`, `grn`, `pwconv2`,
    `gamma`) and are read at every call, so that optimizers, averages of weights and sharding may replace them. While
    hooks sit on one of these modules, or another with a forward of its own is in its place (as LoRA's are), the
    published forward runs, in plain PyTorch, with one warning.

    Args:
        dim: channels, C.
        kernel_size: of the depthwise convolution, odd.
        dilation: of the depthwise convolution.
        mlp_ratio: hidden channels per channel of the input.
        drop_path: probability that a sample skips the block in training (stochastic depth), in [0, 1).
        layer_scale_init_value: the first value of gamma [C]; None or 0: no gamma.
        use_grn: global response normalisation after the activation (V2).
        eps: epsilon of the layer norm.
        activation: "gelu" (exact) or "gelu_tanh".
        conv_bias: whether the depthwise convolution has a bias.
        recompute_hidden: save no pre-activation for backward, which then computes it again; None: where that is
            predicted to be faster, see `functional.convnext_block`.
        float32_residual: under autocast the skip connection and the result are float32; see there too.
        backend: "auto", "cuda", "triton" or "reference"; None takes that of `use_backend` at each call.

    Shapes: [N, C, H, W] to the same, any H and W. Channels-last memory is native, contiguous NCHW is converted, the
    result is channels-last. Input float16, bfloat16, float32 or float64 (reference backend only), parameters float32 or
    the input's dtype. Under autocast the result has autocast's dtype, unless `float32_residual`.

    Raises:
        ValueError: an argument does not fit; the message names it, what was got and what is accepted. Calls raise what
            `functional.convnext_block` raises.

    Source: arXiv 2201.03545, figure 4 (V1); arXiv 2301.00808, section 3.3 (V2).
    """

    def __init__(
        self,
        dim: int,
        *,
        kernel_size: int = 7,
        dilation: int = 1,
        mlp_ratio: float = 4,
        drop_path: float = 0.0,
        layer_scale_init_value: float | None = 1e-6,
        use_grn: bool = False,
        eps: float = 1e-6,
        activation: str = "gelu",
        conv_bias: bool = True,
        recompute_hidden: bool | None = None,
        float32_residual: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__(
            dim,
            kernel_size=kernel_size,
            dilation=dilation,
            mlp_ratio=mlp_ratio,
            drop_path=drop_path,
            layer_scale_init_value=layer_scale_init_value,
            use_grn=use_grn,
            eps=eps,
            activation=activation,
            conv_bias=conv_bias,
        )
        self.recompute_hidden = recompute_hidden
        self.float32_residual = float32_residual
        self.backend = None if backend is None else check_backend(backend)

    def forward(self, input: Tensor) -> Tensor:
        parts: Any = self._modules
        dwconv, norm, pwconv1, pwconv2 = parts["dwconv"], parts["norm"], parts["pwconv1"], parts["pwconv2"]
        grn = self.grn
        # The second look takes longer than the first, and is for the few blocks with subclasses in them.
        if change_below(self, V1 if grn is None else V2) and (change := change_below(self, structure_below(self))):
            if not torch.compiler.is_compiling():  # which cannot trace warnings
                _warn_published_forward(change)
            return super().forward(input.contiguous(memory_format=torch.channels_last))
        drops = self.training and self.drop_path > 0
        return functional.convnext_block(
            input,
            parameter_of(dwconv, "weight"),
            parameter_of(dwconv, "bias"),
            parameter_of(norm, "weight"),
            parameter_of(norm, "bias"),
            parameter_of(pwconv1, "weight"),
            parameter_of(pwconv1, "bias"),
            parameter_of(pwconv2, "weight"),
            parameter_of(pwconv2, "bias"),
            layer_scale=parameter_of(self, "gamma"),
            drop_path_factor=drop_path_factor(input, self.drop_path) if drops else None,
            grn_weight=None if grn is None else grn.gamma.flatten(),
            grn_bias=None if grn is None else grn.beta.flatten(),
            dilation=dwconv.dilation[0],
            eps=norm.eps,
            grn_eps=1e-6 if grn is None else grn.eps,
            activation=self.activation,
            recompute_hidden=self.recompute_hidden,
            float32_residual=self.float32_residual,
            backend=self.backend,
        )
