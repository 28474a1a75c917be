"""Folding layer scale and the norm's affine into the MLP of ConvNeXt blocks, for inference."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from convnext_kernels import functional
from convnext_kernels.accelerate.adapters import official
from convnext_kernels.accelerate.blocks import (
    AcceleratedBlock,
    Parts,
    Wiring,
    block_arguments,
    change_below,
    flattened,
)
from convnext_kernels.backends import use_backend
from convnext_kernels.block import ConvNeXtBlock, structure_below
from convnext_kernels.ops.common.checks import check_eval_mode
from convnext_kernels.ops.convnext_block.steps import fold

FOLDED = ("norm_weight", "norm_bias", "layer_scale")
"""Arguments of `functional.convnext_block` that are None after folding."""

CHANGED = ("weight1", "bias1", "weight2", "bias2")
"""Those that take them up."""


@dataclass(frozen=True)
class FoldReport:
    """What `fold_` did.

    Attributes:
        before: by a block's name, the relative error of its branch (what it adds to its input) against float64 on
            random images, in the parameters' dtype, as it was.
        after: the same, as it is now, against the block as it was.
    """

    before: Mapping[str, float]
    after: Mapping[str, float]

    @property
    def worst(self) -> str | None:
        """The name of the block whose error is largest now; None where nothing was folded."""
        return max(self.after, key=lambda name: self.after[name], default=None)

    def __str__(self) -> str:
        lines = [f"{len(self.after)} blocks folded; error of a branch against float64 before, and after"]
        if self.worst is not None:
            lines.append(f"  worst: {self._line(self.worst)}")
        return "\n".join([*lines, *(f"  {self._line(name)}" for name in self.after)])

    def _line(self, name: str) -> str:
        return f"{name or 'the model itself'}: {self.before[name]:.1e} {self.after[name]:.1e}"


def fold_(model: nn.Module) -> FoldReport:
    """Folds layer scale and the norm's affine into both linear layers of every ConvNeXtBlock and accelerated block of a
    model, in place, for inference:

        weight1 <- weight1 diag(norm.weight),   bias1 <- bias1 + weight1 norm.bias
        weight2 <- diag(layer_scale) weight2,   bias2 <- layer_scale bias2

    computed in float64, rounded once to the parameters' dtypes. norm.weight, norm.bias and the layer scale are None
    from then on, and their keys missing from the state dict; checkpoints are loaded before. All blocks are folded or,
    with an error, none. Accelerated blocks that are folded cannot be restored. In float16 a layer scale near 1e-6, as
    it starts, underflows; the report shows such losses.

    Args:
        model: any module that has such blocks, or is one, in eval mode. Folding it again changes nothing.

    Raises:
        ValueError: a module is in training mode; the model has no such block; a block cannot be folded: its parameters
            are shared, sharded, quantised or parametrised, its first linear layer has no bias to take that of the norm
            up, or hooks or modules of others lie in it.
    """
    check_eval_mode(model)
    blocks = {n: block for n, block in model.named_modules() if isinstance(block, ConvNeXtBlock | AcceleratedBlock)}
    if not blocks:
        raise ValueError("fold_: the model has no ConvNeXtBlock and no accelerated block; accepted: one that has any")
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    users = Counter(id(slot.parameter) for block in blocks.values() for slot in _slots(block).values())
    reasons = [
        f"`{name}`: {reason}"
        for name, block in blocks.items()
        for reason in _reasons(block, shared={key for key, count in (owners | users).items() if count > 1})
    ]
    if reasons:
        raise ValueError("fold_: nothing was folded. " + "; ".join(reasons))
    with torch.no_grad():
        plans = {name: _plan(block) for name, block in blocks.items() if _has_any(block)}
        for name, plan in plans.items():
            _carry_out(blocks[name], plan.values)
    before, after = ({name: getattr(plan, when) for name, plan in plans.items()} for when in ("before", "after"))
    return FoldReport(before, after)


@dataclass(frozen=True)
class _Slot:
    """Where a block keeps a parameter."""

    owner: nn.Module
    name: str
    path: str

    @property
    def parameter(self) -> Any:
        return getattr(self.owner, self.name, None)


@dataclass(frozen=True)
class _Plan:
    """New values of a block's parameters, and the errors with the old and the new ones."""

    values: Mapping[str, Tensor]
    before: float
    after: float


def _wiring(block: nn.Module) -> Wiring:
    if isinstance(block, AcceleratedBlock):
        return block.wiring
    own = official.ADAPTER
    paths = Parts(own.conv, own.norm, own.linear1, own.linear2, own.grn if block.grn is not None else None)
    return Wiring(own, tuple(path and (path,) for path in paths), structure_below(block), str(block.activation))


def _slots(block: nn.Module) -> dict[str, _Slot]:
    """Where the arguments in FOLDED and CHANGED lie; those that the block has."""
    wiring = _wiring(block)
    parts, adapter = wiring.parts(block), wiring.adapter
    slots = {
        f"{kind}{number}": _Slot(layer, kind, f"{path}.{kind}")
        for number, layer, path in ((1, parts.linear1, adapter.linear1), (2, parts.linear2, adapter.linear2))
        for kind in ("weight", "bias")
    }
    slots |= {f"norm_{kind}": _Slot(parts.norm, kind, f"{adapter.norm}.{kind}") for kind in ("weight", "bias")}
    if adapter.layer_scale is not None:
        slots["layer_scale"] = _Slot(block, adapter.layer_scale, adapter.layer_scale)
    return {role: slot for role, slot in slots.items() if slot.parameter is not None}


def _has_any(block: nn.Module) -> bool:
    return not _slots(block).keys().isdisjoint(FOLDED)


def _reasons(block: nn.Module, shared: set[int]) -> Iterator[str]:
    """What speaks against folding a block."""
    slots = _slots(block)
    for slot in slots.values():
        parameter = slot.parameter
        if type(parameter) is not nn.Parameter or not parameter.is_floating_point():
            yield f"its `{slot.path}` is a {type(parameter).__name__}; accepted: floating-point parameters"
        elif id(parameter) in shared:
            yield f"its `{slot.path}` is shared with another module"
    if "norm_bias" in slots and "bias1" not in slots and slots["norm_bias"].parameter.any():
        yield f"its `{_wiring(block).adapter.linear1}` has no bias that could take that of its norm up"
    if change := change_below(block, _wiring(block).structure):
        yield change


def _plan(block: nn.Module) -> _Plan:
    conv_weight = _wiring(block).parts(block).conv.weight
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, conv_weight.shape[0], 14, 14, generator=generator)
    images = images.to(conv_weight, memory_format=torch.channels_last)
    arguments = flattened(block_arguments(block, _wiring(block), images))
    values = {name: value.to(arguments[name].dtype) for name, value in _folded(arguments).items()}
    size = _size(arguments["layer_scale"])
    unfolded = _enlarged(arguments, ("layer_scale",), size)
    folded = _enlarged({**arguments, **dict.fromkeys(FOLDED), **values}, ("weight2", "bias2"), size)
    with torch.autocast(images.device.type, enabled=False):
        with use_backend("reference"):
            truth = _branch(images.double(), {name: _exact(value) for name, value in unfolded.items()})
        branches = [_branch(images, unfolded), _branch(images, folded)]
    norm = truth.norm().clamp_min(torch.finfo(torch.float64).tiny)
    before, after = (((branch - truth).norm() / norm).item() for branch in branches)
    return _Plan(values, before, after)


def _size(layer_scale: Tensor | None) -> float:
    """A power of two near the largest layer scale."""
    largest = 0.0 if layer_scale is None or not layer_scale.numel() else layer_scale.abs().max().item()
    return 2.0 ** math.frexp(largest)[1]


def _enlarged(arguments: Mapping[str, Any], names: tuple[str, ...], size: float) -> dict[str, Any]:
    """The arguments for a branch that is larger by a power of two, which rounds nothing: alone, and not added to the
    input, a small branch would underflow in float16."""
    return {**arguments, **{name: arguments[name] / size for name in names if arguments[name] is not None}}


def _exact(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) else value


def _folded(arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """The new values of CHANGED in float64, of those that there are."""
    exact = {name: _exact(arguments[name]) for name in (*CHANGED, *FOLDED)}
    norm = exact["norm_weight"], exact["norm_bias"]
    exact["weight1"], bias1 = fold(exact["weight1"], exact["bias1"], *norm, exact["weight1"])
    exact["bias1"] = None if exact["bias1"] is None else bias1
    if (scale := exact["layer_scale"]) is not None:
        exact["weight2"] = scale[:, None] * exact["weight2"]
        exact["bias2"] = None if exact["bias2"] is None else scale * exact["bias2"]
    return {name: exact[name] for name in CHANGED if exact[name] is not None}


def _branch(images: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    """What a block adds to its input, which would hide it in 16 bits."""
    conv = ("conv_weight", "conv_bias", "norm_weight", "norm_bias")
    tokens = functional.depthwise_conv2d_layer_norm(
        images, *(arguments[name] for name in conv), dilation=arguments["dilation"], eps=arguments["eps"]
    )
    options = ("layer_scale", "grn_weight", "grn_bias", "grn_eps", "activation")
    return functional.mlp(tokens, *(arguments[name] for name in CHANGED), **{name: arguments[name] for name in options})


def _carry_out(block: nn.Module, values: Mapping[str, Tensor]) -> None:
    slots = _slots(block)
    for role, value in values.items():
        slots[role].parameter.copy_(value.view_as(slots[role].parameter))
    for role in slots.keys() & set(FOLDED):
        setattr(slots[role].owner, slots[role].name, None)
    norm = _wiring(block).parts(block).norm
    if isinstance(norm, nn.LayerNorm):
        norm.elementwise_affine = False
    if isinstance(block, AcceleratedBlock):
        block.folded = True
