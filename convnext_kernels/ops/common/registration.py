"""How an operator becomes known to PyTorch: schema, fake, choice of backend, gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, wraps
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from convnext_kernels.backends import choose

NAMESPACE = __name__.partition(".")[0]
"""The package under the name it was imported by, so that a copy of it under another registers operators of its own."""

LIBRARY = torch.library.Library(NAMESPACE, "DEF")

MODULES = {"reference": "reference", "triton": "triton_kernel", "cuda": "cuda_kernel"}

ForBackends = Callable[..., Mapping[str, Sequence[str]]]
"""From a call's arguments, something about backends."""


def _nothing_to_note(*_: Any) -> Mapping[str, Sequence[str]]:
    return {}


@cache
def _backend_module(folder: str, backend: str) -> ModuleType:
    """The module of a backend, imported when it is first used: Triton may not be installed."""
    return import_module(f"{NAMESPACE}.ops.{folder}.{MODULES[backend]}")


def define(
    folder: str,
    name: str,
    function: str,
    schema: str,
    *,
    fake: Callable[..., Any],
    limits: ForBackends,
    notes: ForBackends = _nothing_to_note,
) -> torch._ops.OpOverload:
    """Registers `NAMESPACE::NAME`, run by `function` in the module of the backend chosen for each call.

    Args:
        folder: the operator's folder under `ops`.
        name: the registered name; also the one in messages.
        function: which function of the backend's module is called, with the schema's arguments but the last.
        schema: arguments and results, without defaults. The first argument decides device and dtype, the last is
            `str backend`.
        fake: the results' shapes, dtypes, strides and devices, from the same arguments.
        limits: what in the call's arguments speaks against each backend that the operator has.
        notes: what in the call's arguments makes a backend take a slow path; only `explain` asks.
    """

    def implementation(*arguments: Any) -> Any:
        # Kernels, oneDNN's linear layer among them, read biases and other vectors without a stride.
        arguments_but_backend = [
            a.contiguous() if isinstance(a, Tensor) and a.dim() == 1 else a for a in arguments[:-1]
        ]
        input, backend = arguments[0], arguments[-1]
        chosen = choose(name, backend, input, limits(*arguments_but_backend), lambda: notes(*arguments_but_backend))
        run = getattr(_backend_module(folder, chosen), function)
        if torch.is_autocast_enabled(input.device.type):
            with torch.autocast(input.device.type, enabled=False):
                return run(*arguments_but_backend)
        return run(*arguments_but_backend)

    LIBRARY.define(f"{name}{schema}")
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def below_autograd(operator: torch._ops.OpOverload, *arguments: Any) -> Any:
    """Calls an operator from inside its own autograd function.

    Its results are then no views that autograd knows of, so that users may change them in place.
    """
    with torch._C._AutoDispatchBelowADInplaceOrView():
        return operator(*arguments)


def _any_tangent(arguments: Sequence[Any]) -> bool:
    """Whether forward-mode differentiation goes through the call; outside of it that costs one comparison."""
    return forward_ad._current_level >= 0 and any(
        isinstance(a, Tensor) and forward_ad.unpack_dual(a).tangent is not None for a in arguments
    )


def differentiate(operator: torch._ops.OpOverload, function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """Makes `function` the operator's gradient; calls that need none go straight to the kernels.

    Derivatives that `function` lacks, those of forward mode among them, are PyTorch's error to raise.

    Returns:
        The operator as Python calls it. The dispatcher, which would only come back here, is asked where something lies
        above autograd: a compiler, a tracer or a transform of `torch.func`. What lies below, modes among them, sees
        every call.
    """

    def autograd(*arguments: Any) -> Any:
        wanted = torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments)
        if wanted or _any_tangent(arguments):
            return function.apply(*arguments)
        return below_autograd(operator, *arguments)

    def call(*arguments: Any) -> Any:
        if torch.compiler.is_compiling() or torch._C._is_tracing() or torch._C._are_functorch_transforms_active():
            return operator(*arguments)
        return autograd(*arguments)

    LIBRARY.impl(operator._schema.name.split("::")[1], autograd, "Autograd")
    return call


def gradient_of_output(
    backward: Callable[[Any, Tensor], tuple[Tensor | None, ...]],
) -> Callable[..., tuple[Tensor | None, ...]]:
    """The backward of an autograd function that differentiates its first output alone, and only once.

    Its other outputs are what it saved. With `ctx.set_materialize_grads(False)` in its forward, PyTorch makes no zeros
    of their size for gradients that do not exist.
    """

    @once_differentiable
    @wraps(backward)
    def run(ctx: Any, grad_output: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return (None,) * len(ctx.needs_input_grad)
        return backward(ctx, grad_output)

    return run


def requested_gradients(
    gradients: Sequence[Tensor], wanted: Sequence[bool], dtypes: Sequence[torch.dtype | None]
) -> tuple[Tensor | None, ...]:
    """What an autograd function returns: each wanted gradient in its tensor's dtype, None in place of the others.

    Backward operators return parameters' gradients in float32 and an empty tensor for what is not wanted.
    """
    return tuple(
        gradient.to(dtype) if want else None for gradient, want, dtype in zip(gradients, wanted, dtypes, strict=True)
    )


def in_strides_of(filter: Tensor, gradient: Tensor | None) -> Tensor | None:
    """A contiguous gradient [C, 1, k, k] with the strides of its filter: those of channels-last memory differ in the
    dimension of size 1, which DDP compares too."""
    if gradient is None or gradient.stride() == filter.stride() or not filter.is_contiguous():
        return gradient
    return gradient.as_strided(filter.shape, filter.stride())


def dtypes_of(*tensors: Tensor | None) -> list[torch.dtype | None]:
    """The tensors' dtypes, None for those that are None."""
    return [None if tensor is None else tensor.dtype for tensor in tensors]
