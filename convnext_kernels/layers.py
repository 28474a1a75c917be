"""Layers for Hugging Face's `kernels`: its `kernelize` gives modules of a host library the forward of one of these.

They have no state. `forward` runs with the host's module as `self`, finds once how our operator is wired to it, and
reads its parameters at every call. Which layer belongs to which class is the user's mapping to say; each can stand for
every class whose forward takes one image.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from convnext_kernels.accelerate.blocks import SAME_AS_HOST, change_below, wired_forward
from convnext_kernels.accelerate.examine import find_adapter
from convnext_kernels.accelerate.norms import may_be_norm, normalise
from convnext_kernels.accelerate.plan import Step, is_norm_over_channels, plan_block

_WIRING = f"_{__name__.replace('.', '_')}_wiring"
"""Attribute of a host's module for what was found; other copies of this package have another."""

_DIFFERENCES: dict[Any, float] = {}


def fits(module: nn.Module) -> bool:
    """Whether a layer can take the place of a module's forward, for `condition` of `replace_kernel_forward_from_hub`.

    `kernelize` then leaves alone what a layer would refuse at its first call, and `torch.compile(fullgraph=True)` needs
    no call before.
    """
    try:
        _wiring(module)
    except RuntimeError:
        return False
    return True


def _wiring(module: nn.Module) -> Any:
    wiring = module.__dict__.get(_WIRING)  # a wrapper would pass on the attribute of the block in it
    if wiring is None:
        wiring = module.__dict__[_WIRING] = _examine(module)
    return wiring


@torch.compiler.disable(reason=f"{__name__}: examine blocks before, by `condition=fits` or by one call of the model")
def _examine(module: nn.Module) -> Any:
    """The wiring of a block, True for a norm over channels.

    Raises:
        RuntimeError: our operators compute something else than the module's class does; with the reason.
    """
    host = copy.copy(module)
    host.__dict__.pop("forward", None)  # the layer's, where `kernelize` came first
    adapter = find_adapter(host)
    if adapter is not None:
        step = plan_block(host, adapter, _DIFFERENCES)
        if isinstance(step, Step):
            return step.wiring
        raise _refusal(module, step)
    if not may_be_norm(host):
        raise _refusal(module, "it is neither ConvNeXt's block nor a layer norm with weight and bias")
    if not is_norm_over_channels(host):
        raise _refusal(module, "it computes something else than a layer norm over the channels of images")
    return True


def _refusal(module: nn.Module, reason: str) -> RuntimeError:
    return RuntimeError(
        f"no layer of convnext_kernels can stand for this {type(module).__name__}: {reason}; accepted: modules for"
        " which convnext_kernels.layers.fits(module) is true, see `condition` of replace_kernel_forward_from_hub"
    )


def _run_block(block: nn.Module, input: Tensor) -> Tensor:
    wiring = _wiring(block)
    if change := change_below(block, wiring.structure):
        raise _refusal(block, change)
    return wired_forward(block, wiring, input)


def _run_norm(norm: Any, input: Tensor) -> Tensor:
    _wiring(norm)
    return normalise(input, norm.weight, norm.bias, norm.eps)


class ConvNextLayer(nn.Module):
    """For the block of transformers' ConvNeXT: `functional.convnext_block` with the parameters it has.

    Raises:
        RuntimeError: at the first call, if the block computes something else, and at any call while hooks, other
            modules or other attributes lie in it; with the reason.
    """

    has_backward = True
    can_torch_compile = True

    def forward(self, features: Tensor) -> Tensor:
        return _run_block(self, features)


class ConvNextV2Layer(ConvNextLayer):
    """For the block of transformers' ConvNeXTV2; as `ConvNextLayer`."""


class DINOv3ConvNextLayer(ConvNextLayer):
    """For the block of transformers' DINOv3; as `ConvNextLayer`."""


class ConvNeXtBlock(nn.Module):
    """For timm's block, and the official repositories' `Block`; as `ConvNextLayer`."""

    has_backward = True
    can_torch_compile = True

    def forward(self, x: Tensor) -> Tensor:
        return _run_block(self, x)


class CNBlock(nn.Module):
    """For torchvision's block; as `ConvNextLayer`."""

    has_backward = True
    can_torch_compile = True

    def forward(self, input: Tensor) -> Tensor:
        return _run_block(self, input)


class LayerNorm2d(nn.Module):
    """For timm's and torchvision's layer norm over the channels of images: `functional.layer_norm`.

    Raises:
        RuntimeError: at the first call, if the norm is over something else.
    """

    has_backward = True
    can_torch_compile = True

    def forward(self, x: Tensor) -> Tensor:
        return _run_norm(self, x)


class ConvNextLayerNorm(nn.Module):
    """For transformers' layer norms of data format "channels_first"; as `LayerNorm2d`."""

    has_backward = True
    can_torch_compile = True

    def forward(self, features: Tensor) -> Tensor:
        return _run_norm(self, features)


for _norm in (LayerNorm2d, ConvNextLayerNorm):
    setattr(_norm.forward, SAME_AS_HOST, True)
