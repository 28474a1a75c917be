"""Whether a host's block computes what our operator does: the reasons against it, or how it is wired."""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convnext_kernels.accelerate.adapters import ADAPTERS, OUTSIDE, BlockAdapter
from convnext_kernels.accelerate.blocks import Parts, Wiring, change_below, structure_of
from convnext_kernels.reference import GELU_APPROXIMATIONS

PASSIVE = ("Identity", "Permute")
"""Modules that a host's block may have besides its parts: they compute nothing."""

ACTIVATION_TOLERANCE = 1e-5
"""Of values in float64: some hosts have constants of seven digits; GELU by tanh differs from GELU by 5e-4."""


def find_adapter(module: nn.Module) -> BlockAdapter | None:
    """The adapter with whose paths a module agrees."""
    return next((adapter for adapter in ADAPTERS if _agrees(module, adapter)), None)


def _agrees(module: nn.Module, adapter: BlockAdapter) -> bool:
    names = {base.__name__ for base in type(module).__mro__}
    if adapter.class_name is not None and adapter.class_name not in names:
        return False
    required = (adapter.conv, adapter.norm, adapter.linear1, adapter.linear2)
    found = all(_part(module, path) is not None for path in required)
    return found and _attribute(module, adapter.activation) is not None


def _part(module: nn.Module, path: str) -> Any:
    """The module at a path of children; None: there is none.

    Attributes will not do: a wrapper passes on those of the block in it, which is found by itself, and some raise.
    """
    return reduce(_child, path.split("."), module)


def _child(module: Any, name: str) -> Any:
    return module._modules[name] if module is not None and name in module._modules else None


def _attribute(module: nn.Module, path: str) -> Any:
    """A child or attribute of a module or, at a path, of one below it; None: nothing."""
    parent, _, name = path.rpartition(".")
    return getattr(_part(module, parent) if parent else module, name, None)


def outside_reason(module: nn.Module) -> str | None:
    """Why a block that has ConvNeXt in its name is another."""
    return OUTSIDE.get(type(module).__name__)


def examine_block(block: nn.Module, adapter: BlockAdapter) -> Wiring | str:
    """How to run a host's block, or the reason why ours cannot take its place."""
    roles = (getattr(adapter, role) for role in Parts._fields)
    paths = tuple(tuple(path.split(".")) if path and _part(block, path) is not None else None for path in roles)
    activation = activation_name(_attribute(block, adapter.activation))
    wiring = Wiring(adapter, paths, structure_of(block), activation or "unknown")
    return next(_reasons(block, wiring), wiring)


def _reasons(block: nn.Module, wiring: Wiring) -> Iterator[str]:
    adapter, parts = wiring.adapter, wiring.parts(block)
    if isinstance(block, torch.jit.ScriptModule):
        yield "TorchScript has compiled it; accelerate a model before"
    for name, parameter in block.named_parameters():
        if type(parameter) not in (nn.Parameter, Tensor):
            yield f"its `{name}` is a {type(parameter).__name__}; accelerate a model before it is sharded or quantised"
    if "forward" in block.__dict__:
        yield "its forward has been replaced"
    if change := change_below(block, wiring.structure):
        yield change
    yield from _conv_reasons(adapter.conv, parts.conv)
    yield from _linear_reasons(adapter.linear1, parts.linear1)
    yield from _linear_reasons(adapter.linear2, parts.linear2)
    if not isinstance(getattr(parts.norm, "eps", None), float) or not hasattr(parts.norm, "bias"):
        yield f"its `{adapter.norm}` is a {type(parts.norm).__name__}; accepted: a layer norm"
    if wiring.activation not in GELU_APPROXIMATIONS:
        kind = type(_attribute(block, adapter.activation)).__name__
        yield f"its `{adapter.activation}` is a {kind}; accepted: GELU, exact or by tanh"
    if parts.drop_path is not None and not _is_drop_path(parts.drop_path):
        yield f"its `{adapter.drop_path}` is a {type(parts.drop_path).__name__}; accepted: stochastic depth by sample"
    for path, part in ((adapter.grn, parts.grn), (adapter.drop_path, parts.drop_path)):
        if path is not None and part is None and (other := _attribute(block, path)) is not None:
            yield f"its `{path}` is a {type(other).__name__}; accepted: a module or none"
    yield from _surplus(block, wiring)


def _conv_reasons(name: str, conv: nn.Module) -> Iterator[str]:
    if type(conv) is not nn.Conv2d:
        yield f"its `{name}` is a {type(conv).__name__}; accepted: Conv2d"
        return
    size, channels = conv.kernel_size[0], conv.in_channels
    if conv.groups != channels or conv.out_channels != channels:
        yield f"its `{name}` is not depthwise: {channels} to {conv.out_channels} channels in {conv.groups} groups"
    if conv.stride != (1, 1):
        yield f"its `{name}` has stride {conv.stride}; accepted: 1"
    if conv.kernel_size != (size, size) or size % 2 == 0 or conv.dilation[0] != conv.dilation[1]:
        yield f"its `{name}` has size {conv.kernel_size}, dilation {conv.dilation}; accepted: odd and square"
    padding = conv.dilation[0] * (size // 2)
    if conv.padding not in ((padding, padding), "same") or conv.padding_mode != "zeros":
        yield f"its `{name}` pads {conv.padding} with {conv.padding_mode}; accepted: {padding} with zeros"


def _linear_reasons(name: str, linear: nn.Module) -> Iterator[str]:
    if type(linear) is nn.Conv2d:
        padded = linear.padding not in ((0, 0), "same", "valid")
        if padded or (linear.kernel_size, linear.stride, linear.groups) != ((1, 1), (1, 1), 1):
            yield f"its `{name}` is a convolution {linear.kernel_size}; accepted: 1x1, stride 1, one group, no padding"
    elif type(linear) is not nn.Linear:
        yield f"its `{name}` is a {type(linear).__name__}; accepted: Linear or a 1x1 Conv2d"


def activation_name(activation: Any) -> str | None:
    """Which GELU an activation is, by its values; None: another function."""
    # Dense near zero, and as far as float16 goes: some activations are GELU but for a bound, such as 10.
    x = torch.linspace(-12, 12, 961, dtype=torch.float64, device="cpu").sinh()
    try:
        with torch.no_grad():
            got = activation(x.clone())
    except (RuntimeError, TypeError):  # one with parameters for channels, or elsewhere
        return None
    for name, approximate in GELU_APPROXIMATIONS.items():
        if got.shape == x.shape and (got - F.gelu(x, approximate=approximate)).abs().max() < ACTIVATION_TOLERANCE:
            return name
    return None


def _is_drop_path(module: nn.Module) -> bool:
    name = type(module).__name__.lower()
    return isinstance(module, nn.Identity) or name.endswith("droppath") or name == "stochasticdepth"


def _surplus(block: nn.Module, wiring: Wiring) -> Iterator[str]:
    """Modules and parameters of a block that our operator would pass over."""
    used = [".".join(path) for path in wiring.paths if path is not None]
    used.append(wiring.adapter.activation)
    for name, module in block.named_modules():
        related = any(f"{name}.".startswith(f"{path}.") or f"{path}.".startswith(f"{name}.") for path in used)
        idle = type(module).__name__ in PASSIVE or (isinstance(module, nn.Dropout) and module.p == 0)
        if name and not related and not idle:
            yield f"it has `{name}`, a {type(module).__name__}, which ConvNeXt's block has not"
    names = {"weight", "bias", *wiring.adapter.grn_parameters}
    known = {f"{path}.{name}" for path in used for name in names} | {wiring.adapter.layer_scale}
    tensors = [name for name, _ in (*block.named_parameters(), *block.named_buffers())]
    if surplus := [name for name in tensors if name not in known]:
        yield f"it has `{surplus[0]}`, which ConvNeXt's block has not"
