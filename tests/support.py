"""What the tests share: random values, errors, calls with every gradient, and a record of the operators that ran."""

import fcntl
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import pytest
import torch
from emulator import emulated
from ptx import running
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from convnext_kernels import parity
from convnext_kernels.backends import machine_reasons

DTYPES = list(parity.DTYPES.values())
INTERPRETED_DTYPES = tuple(DTYPES) if running.chosen() else (torch.float32, torch.float16)
"""Triton's interpreter multiplies bfloat16 as integers; what it compiles to is run for all."""
ACTIVATIONS = ("input", "residual")
"""Arguments that lie in memory as images or tokens; all other tensors are parameters."""

INTERPRETED = not torch.cuda.is_available()
CUDA_KERNELS_RUN = emulated.LIBRARY in os.environ or not INTERPRETED
"""On a GPU, or in a process that tests/emulator started."""
BACKENDS = ("reference", "triton", "cuda") if CUDA_KERNELS_RUN else ("reference", "triton")


def refusal(main: Callable[[list[str]], int], arguments: list[str], capsys: Any) -> str:
    """What a command says that cannot start as it was asked to: one line on stderr alone, and exit code 2."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    return captured.err


def randomise(module: nn.Module, seed: int = 0) -> None:
    """Seeds PyTorch and draws every parameter: norms and layer scale near 1, GRN near 0.5, weights by their fan-in."""
    torch.manual_seed(seed)
    for name, parameter in module.named_parameters():
        draw = torch.randn(parameter.shape, dtype=torch.float64)
        if "grn" in name:
            draw = 0.5 + 0.2 * draw
        elif parameter.dim() == 1 and not name.endswith("bias"):
            draw = 1 + 0.2 * draw
        elif parameter.dim() == 1:
            draw = 0.2 * draw
        else:
            draw = draw / math.sqrt(parameter[0].numel())
        parameter.data.copy_(draw)


def relative_error(got: Tensor, expected: Tensor) -> float:
    """max|got - expected| / max|expected|"""
    return ((got.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


def assert_same(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """The same tensors, bit for bit, of the same dtype."""
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].dtype == value.dtype and torch.equal(got[name], value), name


def assert_accurate(
    ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], exact: Mapping[str, Tensor], dtype: torch.dtype
) -> None:
    """Our error is at most 1.5 times theirs plus one unit of rounding, in both measures of `parity`."""
    assert ours.keys() == theirs.keys() == exact.keys()
    for name, truth in exact.items():
        our_errors, their_errors = parity.errors(ours[name], truth), parity.errors(theirs[name], truth)
        for our_error, their_error in zip(our_errors, their_errors, strict=True):
            assert our_error <= parity.FACTOR * their_error + torch.finfo(dtype).eps / 2, name


def assert_parity(case: parity.Case, dtype: torch.dtype, device: str, backend: str) -> None:
    """The operator's output and every gradient pass `parity.compare`."""
    comparisons = parity.compare(case, dtype, device, backend)
    failed = [comparison for comparison in comparisons if not comparison.passed]
    assert comparisons and not failed, "\n".join(map(str, failed))


def device_of(backend: str) -> str:
    """Where a backend runs on this machine; skips the test if it runs nowhere."""
    if backend == "reference":
        return "cpu"
    device = "cpu" if INTERPRETED else "cuda"
    reasons = machine_reasons(backend, torch.device(device), torch.float32, by_name=True)
    if reasons:
        pytest.skip("; ".join(reasons))
    return device


def arguments_of(
    case: parity.Case,
    dtype: torch.dtype = torch.float32,
    *,
    parameters: torch.dtype | None = None,
    layout: str | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """A case's arguments, drawn; all that can requires a gradient.

    Args:
        parameters: the parameters' dtype, if not the activations'; activations then have the values `dtype` can hold.
        layout: the activations' layout, if not the case's.
    """
    tensors = case.draw(parameters or dtype, device, seed=1)
    for name, tensor in tensors.items():
        if name in ACTIVATIONS:
            tensor = parity.LAYOUTS[layout or case.layout](tensor).to(dtype)
        tensors[name] = tensor.requires_grad_(name != "drop_path_factor")
    return {**tensors, **case.options}


def with_dtype(arguments: Mapping[str, Any], dtype: torch.dtype, only: tuple[str, ...] = ()) -> dict[str, Any]:
    """The arguments as new leaves with the tensors (or only those named) in another dtype."""
    return {
        name: value.detach().to(value.dtype if only and name not in only else dtype).requires_grad_(value.requires_grad)
        if isinstance(value, Tensor)
        else value
        for name, value in arguments.items()
    }


def without_gradients(arguments: Mapping[str, Any], names: tuple[str, ...] | None = None) -> dict[str, Any]:
    """The arguments, detached: all of them or those named."""
    return {
        name: value.detach() if isinstance(value, Tensor) and (names is None or name in names) else value
        for name, value in arguments.items()
    }


def leaves_of(arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors among the arguments that require a gradient."""
    return {name: value for name, value in arguments.items() if isinstance(value, Tensor) and value.requires_grad}


def random_like(tensor: Tensor, seed: int = 2) -> Tensor:
    """Random values that bfloat16 can hold, so that they are the same in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tensor.shape, generator=generator).bfloat16().to(tensor.dtype).to(tensor.device)


def evaluate(
    function: Callable[..., Tensor], arguments: Mapping[str, Any], grad_output: Tensor | None = None
) -> dict[str, Tensor]:
    """The output of a call, and the gradient of every argument that requires one."""
    output, leaves = function(**arguments), leaves_of(arguments)
    gradients: tuple[Tensor, ...] = ()
    if leaves:
        grad_output = random_like(output) if grad_output is None else grad_output
        gradients = torch.autograd.grad(output, list(leaves.values()), grad_output)
    return {"output": output.detach(), **{f"grad {n}": g for n, g in zip(leaves, gradients, strict=True)}}


@contextmanager
def all_gpu_memory() -> Iterator[None]:
    """Within the context no other process of the tests is in it; afterwards what it took is free for them."""
    with open(Path(gettempdir()) / "convnext_kernels_gpu_memory", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            torch.cuda.empty_cache()


@all_gpu_memory()
def assert_far_images_are_right(
    function: Callable[..., Tensor], shape: tuple[int, ...], parameters: Mapping[str, tuple[int, ...]], tensors: int
) -> None:
    """On a GPU: of so many images that they have over 2^31 elements of float16, the last gives what it gives alone.

    All others have gradients of zeros, so that those of the parameters are its own.

    Args:
        shape: of one image [C, H, W] or of its tokens [L, C].
        tensors: how many tensors of that size are alive at once; the test is skipped where they do not fit.
    """
    batch = 2**31 // math.prod(shape) + 2
    needed, free = 2 * tensors * batch * math.prod(shape), torch.cuda.mem_get_info()[0]
    if free < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free GPU memory, there are {free / 2**30:.0f}")
    generator = torch.Generator("cuda").manual_seed(0)
    draw = {
        name: (torch.randn(size, device="cuda", generator=generator) / size[-1] ** 0.5).requires_grad_()
        for name, size in parameters.items()
    }
    memory = torch.channels_last if len(shape) == 3 else torch.contiguous_format
    alone = torch.randn(1, *shape, device="cuda", generator=generator).half().to(memory_format=memory)
    far = torch.empty(batch, *shape, device="cuda", dtype=torch.float16, memory_format=memory).zero_()
    far[-1:] = alone
    results = []
    for input in (far, alone):
        output = function(input=input.requires_grad_(), **draw)
        grad = torch.zeros_like(output)
        grad[-1:] = random_like(output[-1:])
        grad_input, *grad_parameters = torch.autograd.grad(output, [input, *draw.values()], grad)
        results.append(([output[-1:], grad_input[-1:]], grad_parameters))
    (images, sums), (expected_images, expected_sums) = results
    for result, expected in zip(images, expected_images, strict=True):
        assert expected.any() and torch.equal(result, expected)
    for result, expected in zip(sums, expected_sums, strict=True):
        assert relative_error(result, expected) < 1e-4


class OperatorCalls(TorchDispatchMode):
    """Within the context, notes every call of the package's registered operators, below autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[torch._ops.OpOverload, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "convnext_kernels" in function.namespace:  # or a copy's, see ops/common/registration.py
            self.calls.append((function, args))
        return function(*args, **(kwargs or {}))


class LiveMemory(TorchDispatchMode):
    """Within the context, notes the memory of every tensor that an operator returns."""

    def __init__(self) -> None:
        super().__init__()
        self.memories: dict[StorageWeakRef, int] = {}

    def bytes(self) -> int:
        """How much of that memory is still in use."""
        return sum(size for memory, size in self.memories.items() if not memory.expired())

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                memory = tensor.untyped_storage()
                self.memories[StorageWeakRef(memory)] = memory.nbytes()
        return result
