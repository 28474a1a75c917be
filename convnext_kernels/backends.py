"""What can run here and, if not, why not: one list of reasons serves the choice, `explain` and the error text."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec

import torch
from torch import Tensor

from convnext_kernels import build

BACKENDS = ("cuda", "triton", "reference")
"""Every backend, the preferred one first."""

MINIMUM_CAPABILITY = (8, 0)

# The backends of the enclosing `use_backend` contexts, of the whole process like PyTorch's own flags: torch.compile
# guards on a list, but not on a thread's local, and PyTorch 2.11 cannot trace a context variable.
_requested = ["auto"]
_explaining: ContextVar[bool] = ContextVar("convnext_kernels_explaining", default=False)


@dataclass(frozen=True)
class Explanation:
    """Which backend a call takes (None: the one asked for cannot run), what speaks against each, what slows it down."""

    operator: str
    requested: str
    backend: str | None
    reasons: Mapping[str, Sequence[str]]
    notes: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.operator}: {self.backend or 'cannot run'} (asked for: {self.requested})"]
        for backend, reasons in self.reasons.items():
            lines.append(f"  {backend}: {'; '.join(reasons or ['can run', *self.notes.get(backend, ())])}")
        return "\n".join(lines)


class ExplanationReached(Exception):
    """Carries the explanation out of a call that `explain` stops where its backend is chosen."""

    def __init__(self, explanation: Explanation) -> None:
        super().__init__(str(explanation))
        self.explanation = explanation


class BackendError(RuntimeError):
    """The backend asked for by name cannot run this call; the message says why."""


def check_backend(backend: str) -> str:
    """Returns `backend` if it is a known name, else raises ValueError."""
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}; accepted: 'auto', {', '.join(map(repr, BACKENDS))}")
    return backend


def requested_backend(backend: str | None) -> str:
    """The backend of a call: its own argument, else that of the enclosing `use_backend`, else "auto"."""
    return _requested[-1] if backend is None else check_backend(backend)


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Within the context, every operator called without a `backend` of its own uses this one.

    It holds for the whole process, not for one thread.

    Args:
        backend: "auto", "cuda", "triton" or "reference". A named backend that cannot run a call raises there.
    """
    _requested.append(check_backend(backend))
    try:
        yield
    finally:
        _requested.pop()


@contextmanager
def explaining() -> Iterator[None]:
    """Within the context, `choose` raises `ExplanationReached` instead of letting the operator run."""
    token = _explaining.set(True)
    try:
        yield
    finally:
        _explaining.reset(token)


def interpreting() -> bool:
    """Whether Triton's kernels run in its CPU interpreter, decided by the environment when Triton is imported."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@cache
def release(package: str) -> tuple[int, ...]:
    """Major and minor version of an installed package."""
    return tuple(int(number) for number in version(package).split(".")[:2])


def broken_interpreter() -> str | None:
    """Why the interpreter of the installed Triton cannot run our kernels, or None."""
    if release("triton") < (3, 7) and release("numpy") >= (2, 4):
        return "the interpreter of Triton before 3.7 fails in loops with NumPy 2.4 or newer"
    return None


def _interpreter_reasons(dtype: torch.dtype, by_name: bool) -> list[str]:
    if not interpreting():
        return ["the tensors are on the CPU and Triton's interpreter is off (TRITON_INTERPRET=1 turns it on)"]
    reasons = []
    if dtype == torch.bfloat16:
        reasons.append("Triton's interpreter rounds bfloat16 toward zero and multiplies it as integers")
    if broken := broken_interpreter():
        reasons.append(broken)
    if not by_name:
        reasons.append("Triton's interpreter checks kernels and is slow; it is used only when asked for by name")
    return reasons


def _triton_reasons(device: torch.device, dtype: torch.dtype, by_name: bool) -> list[str]:
    if find_spec("triton") is None:
        return ["triton is not installed"]
    reasons = _interpreter_reasons(dtype, by_name) if device.type == "cpu" else []
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < MINIMUM_CAPABILITY:
            reasons.append(f"the GPU has compute capability {capability[0]}.{capability[1]}; 8.0 or newer is needed")
    elif device.type != "cpu":
        reasons.append(f"the tensors are on {device.type}; Triton's kernels are for CUDA")
    if dtype == torch.float64:
        reasons.append("float64 has no Triton kernels")
    return reasons


def _cuda_reasons(device: torch.device, dtype: torch.dtype) -> list[str]:
    reasons = list(build.missing_reasons())
    if device.type != "cuda":
        reasons.append(f"the tensors are on {device.type}")
    elif not reasons:
        code = build.device_code(torch.cuda.current_device() if device.index is None else device.index)
        if not code.startswith(("machine code", "PTX")):
            reasons.append(f"what the compiled library has for the GPU is {code}")
    if dtype == torch.float64:
        reasons.append("float64 has no CUDA kernels")
    return reasons


@cache
def machine_reasons(backend: str, device: torch.device, dtype: torch.dtype, by_name: bool) -> tuple[str, ...]:
    """What on this machine and in this build speaks against a backend, whatever the operator."""
    if backend == "triton":
        return tuple(_triton_reasons(device, dtype, by_name))
    if backend == "cuda":
        return tuple(_cuda_reasons(device, dtype))
    return ()


@cache
def _warn_slow_path(operator: str, reasons: str) -> None:
    warnings.warn(f"{operator} runs the plain PyTorch reference on a GPU: {reasons}", stacklevel=2)


def choose(
    operator: str,
    requested: str,
    input: Tensor,
    limits: Mapping[str, Sequence[str]],
    notes: Callable[[], Mapping[str, Sequence[str]]],
) -> str:
    """The backend that runs this call: the one asked for, or for "auto" the first with nothing against it.

    Args:
        operator: the operator's public name, for messages.
        requested: "auto" or a backend's name.
        input: the tensor whose device and dtype decide.
        limits: for each backend that the operator has, what in this call speaks against it.
        notes: tells for each backend what makes it take a slow path; called for an explanation alone.

    Raises:
        BackendError: the backend asked for by name cannot run the call.
    """
    device, dtype = input.device, input.dtype

    def reasons_against(backend: str) -> tuple[str, ...]:
        if backend not in limits:
            return (f"no {backend} kernels yet",)
        return (*machine_reasons(backend, device, dtype, requested == backend), *limits[backend])

    chosen = None
    for backend in BACKENDS if requested == "auto" else (requested,):
        # The reasons themselves are put together only for a message.
        if not limits.get(backend, True) and not machine_reasons(backend, device, dtype, requested == backend):
            chosen = backend
            break
    if _explaining.get():
        reasons = {backend: reasons_against(backend) for backend in BACKENDS}
        raise ExplanationReached(Explanation(operator, requested, chosen, reasons, notes()))
    if chosen is None:
        raise BackendError(f"{operator}: backend {requested!r} cannot run: {'; '.join(reasons_against(requested))}")
    if chosen == "reference" and requested == "auto" and device.type == "cuda":
        _warn_slow_path(operator, "; ".join(f"{name}: {', '.join(reasons_against(name))}" for name in BACKENDS[:-1]))
    return chosen
