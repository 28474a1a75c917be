"""Swapping a module's class for a subclass with another forward, and back."""

from __future__ import annotations

import types
import warnings
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from convnext_kernels.ops.common.checks import autocast_dtype


class Swapped(nn.Module):
    """A module of a host library whose forward is ours. All else stays the host's: the module tree, parameters and
    their names, the class for isinstance and its name, attributes, hooks on the module itself.

    Attributes:
        kind: the class here that has the forward.
        host_class: the class that the module had.
        wiring: what the forward needs to know of the host.
        chained: under autocast the result keeps the 16-bit dtype, because another of our modules or a convolution
            takes it next; otherwise it is float32, as the host's is.
        float32_residual: a block's skip connection and result are float32 under autocast, chained or not.
        folded: the parameters have been folded; the host's forward would compute something else with them.
    """

    kind: ClassVar[type[Swapped]]
    host_class: ClassVar[type[nn.Module]]
    wiring: Any
    chained: bool
    float32_residual: bool
    folded: bool = False

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        return _empty, (self.kind, self.host_class), *reduced[2:]

    def __prepare_scriptable__(self) -> nn.Module:
        """What torch.jit.script compiles, and puts in this one's place: it can read the host's forward alone.

        PyTorch asks one module after the other and names no model: what it asked before a refusal has been restored.
        """
        name = type(self).__name__
        if obstacle := restore_obstacle(self):
            raise RuntimeError(
                f"torch.jit.script cannot read the forward of an accelerated {name}, and its host's cannot be given"
                f" back: it {obstacle}; modules before it in the model have been, and `accelerate` converts them again;"
                " accepted: torch.jit.trace, torch.export, torch.compile"
            )
        warnings.warn(
            f"torch.jit.script cannot read the forward of an accelerated {name}: it compiles the host's, and the model"
            " has that one from now on; accepted to keep ours: torch.jit.trace, torch.export, torch.compile, or to"
            " accelerate the model again",
            stacklevel=2,
        )
        unswap(self)
        return self


_CLASSES: dict[Any, type[Swapped]] = {}


def swapped_class(kind: type[Swapped], host_class: type[nn.Module]) -> type[Swapped]:
    """The host's class, under its own name, with the forward of `kind` in front; one for each pair."""
    if (kind, host_class) not in _CLASSES:
        copied = {name: getattr(host_class, name) for name in ("__module__", "__qualname__", "__doc__")}
        body = {**copied, "kind": kind, "host_class": host_class}
        _CLASSES[kind, host_class] = types.new_class(
            host_class.__name__, (kind, host_class), exec_body=lambda names: names.update(body)
        )
    return _CLASSES[kind, host_class]


def _empty(kind: type[Swapped], host_class: type[nn.Module]) -> Swapped:
    """A swapped module without state, for copies and pickles to fill."""
    return swapped_class(kind, host_class).__new__(swapped_class(kind, host_class))


def swap(module: nn.Module, kind: type[Swapped], wiring: Any = None) -> Swapped:
    """Gives a module the forward of `kind`; returns the module."""
    swapped = cast(Swapped, module)
    swapped.__class__ = swapped_class(kind, type(module))
    swapped.__dict__.update(wiring=wiring, chained=False, float32_residual=False)
    return swapped


def unswap(module: Swapped) -> None:
    """Gives a module its own class back, whose forward and attributes it then has."""
    module.__class__ = module.host_class  # type: ignore[assignment]
    for name in ("wiring", "chained", "float32_residual"):
        del module.__dict__[name]


def restore_obstacle(module: Swapped) -> str | None:
    """What keeps a module from getting its own class back, as what follows "it"."""
    cls = type(module)
    if module.folded:
        return "has been folded by fold_, and its host's forward needs its parameters as they were"
    if cls is not swapped_class(cls.kind, cls.host_class):
        return f"has been made a {cls.__name__} since"
    return None


def as_host(output: Tensor, input: Tensor, chained: bool) -> Tensor:
    """The result in the dtype in which the host has it under autocast, unless ours follow."""
    return output if chained or autocast_dtype(input) is None else output.float()
