"""Without a GPU Triton's kernels run in its interpreter, which must be chosen before Triton is imported.

In a process that tests/ptx started they are compiled, and what comes out is run.
"""

import os
from collections.abc import Iterator

import interpreter
import pytest
import torch
from emulator import emulated
from ptx import cuda, running

from convnext_kernels import parity

EMULATED = emulated.LIBRARY in os.environ
"""Whether this process was started by tests/emulator, to run the CUDA kernels there."""

if running.chosen():
    running.install()
elif not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    interpreter.quicken()
torch.set_num_threads(1)
pytest.register_assert_rewrite("support", "contract", "legible", "small")

if EMULATED:
    emulated.install()
    if cuda.FOLDER in os.environ:
        cuda.install()
elif not torch.cuda.is_available():
    collect_ignore = ["ops/test_cuda_library.py"]


@pytest.fixture(autouse=EMULATED)
def poisoned_memory() -> Iterator[None]:
    """What a kernel is given to write holds NaN."""
    with parity.poisoned_memory():
        yield


def pytest_runtest_logfinish() -> None:
    """An illegal access of a kernel spoils its process: every later test would fail there."""
    if not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)  # xdist names the test that has just failed, and starts another process
        pytest.exit(f"this process can use the GPU no more: {error}", returncode=1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
