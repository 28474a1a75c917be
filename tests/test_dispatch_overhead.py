"""What a call costs before and after its kernels: checks, choice of backend, registration and autograd.

The kernels are out of it: the reference's function returns at once what it returned the first time. How long the rest
takes `pytest -n0 tests/test_dispatch_overhead.py` prints; what is held to a limit is how many calls the package's own
Python code makes, which is the same on every machine and under every load.
"""

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from support import arguments_of, randomise
from torch import Tensor

import convnext_kernels
from convnext_kernels import ConvNeXtBlock, parity
from convnext_kernels.functional import OPERATORS

PACKAGE = str(Path(convnext_kernels.__file__).parent)

CALLS = {
    "ConvNeXtBlock": (137, 154),
    "convnext_block": (117, 127),
    "depthwise_conv2d": (47, 55),
    "depthwise_conv2d_layer_norm": (68, 78),
    "global_response_norm": (52, 62),
    "layer_norm": (51, 61),
    "mlp": (89, 99),
    "patch_linear": (45, 53),
}
"""How many calls, of Python's and C's functions, the package makes, without and with autograd."""

SPARE = 4
"""For other versions of Python and PyTorch; one more parameter to check makes more calls."""


def returning_at_once(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, of which only the first call computes: later ones return the same tensors."""
    results: list[Any] = []

    def run(*arguments: Any) -> Any:
        if not results:
            results.append(function(*arguments))
        return results[0]

    return run


def count_calls(function: Callable[[], Any]) -> int:
    """How many calls the package's Python code makes, or gets, while the function runs.

    Of PyTorch's own Python, whose calls change with its version, only what the package calls is counted.
    """
    count = 0

    def note(frame: FrameType, event: str, _: Any) -> None:
        nonlocal count
        ends = {"call": (frame, frame.f_back), "c_call": (frame,)}.get(event, ())
        count += any(end is not None and end.f_code.co_filename.startswith(PACKAGE) for end in ends)

    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


@pytest.fixture
def call(name: str, autograd: bool, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Tensor]:
    """A call of a small tensor that has been made once, without the computation."""
    for path in (Path(PACKAGE) / "ops").glob("*/reference.py"):
        module = import_module(f"convnext_kernels.ops.{path.parent.name}.reference")
        monkeypatch.setattr(module, "forward", returning_at_once(module.forward))
    if name == "ConvNeXtBlock":
        block, input = ConvNeXtBlock(24), torch.randn(2, 24, 3, 3)
        randomise(block)

        def run() -> Tensor:
            return block(input)
    else:
        function, arguments = OPERATORS[name], arguments_of(parity.cases(name, small=True)[0])

        def run() -> Tensor:
            return function(**arguments)

    with torch.set_grad_enabled(autograd):
        assert run().requires_grad == autograd
        yield run


@pytest.mark.parametrize("autograd", [False, True], ids=["no_grad", "autograd"])
@pytest.mark.parametrize("name", CALLS)
class TestHostSide:
    def test_calls(self, name, autograd, call):
        assert count_calls(call) <= CALLS[name][autograd] + SPARE

    @pytest.mark.benchmark(group="host side of a call", max_time=0.5)
    def test_time(self, name, autograd, call, benchmark):
        benchmark(call)


def test_every_operator_is_held_to_a_limit():
    assert CALLS.keys() == {"ConvNeXtBlock", *OPERATORS}


def test_calls_are_counted():
    """Calls from here into the package and within it, but none of the test's own."""
    assert count_calls(lambda: convnext_kernels.backends.check_backend("cuda")) == 1
    assert count_calls(lambda: convnext_kernels.backends.requested_backend("cuda")) == 2
    assert count_calls(lambda: len([])) == 0
