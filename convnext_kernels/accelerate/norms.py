"""Layer norms over the channels of images, as hosts have them beside the stem's and the downsampling convolutions."""

# Without postponed annotations: TorchScript cannot read those of `normalise`.

from typing import Any

import torch
from torch import Tensor, nn

from convnext_kernels import functional
from convnext_kernels.accelerate.swap import Swapped, as_host

CLASS_NAMES = ("LayerNorm", "LayerNorm2d", "LN2d")
"""Endings of the names of classes that may be a layer norm over channels; which are is then examined."""


class AcceleratedNorm(Swapped):
    """A host's layer norm over channels with `functional.layer_norm` as its forward."""

    weight: Tensor
    bias: Tensor
    eps: float

    def forward(self, input: Tensor | None = None, **named: Any) -> Tensor:
        if input is None:
            (input,) = named.values()
        return normalise(input, self.weight, self.bias, self.eps, self.chained)


@torch.jit.ignore
@torch.fx.wrap
def normalise(input: Tensor, weight: Tensor, bias: Tensor, eps: float, chained: bool = False) -> Tensor:
    """`functional.layer_norm` in the dtype of a host's result."""
    return as_host(functional.layer_norm(input, weight, bias, eps=eps), input, chained)


def may_be_norm(module: nn.Module) -> bool:
    """Whether a module's class and parameters are those of such a norm."""
    return (
        type(module).__name__.endswith(CLASS_NAMES)
        and type(module) is not nn.LayerNorm
        and {name for name, parameter in module.named_parameters()} == {"weight", "bias"}
        and all(parameter.dim() == 1 for parameter in module.parameters())
        and isinstance(getattr(module, "eps", None), float)
    )


def beside_convolution(parent: nn.Module) -> bool:
    """Whether the children of a module have the place of such norms."""
    return any(isinstance(child, nn.Conv2d) for child in parent.children())
