"""The operators' own tests with the emulator's library as the "cuda" backend, each file in a process of its own.

The emulator ends the process where it finds a fault, and the sanitizers must be loaded before Python.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from emulated import environment
from emulation import COMPILER, ROOT, needs_compiler

from convnext_kernels import backends

TESTS = {
    "test_convnext_block": (20, "cuda and (dropped or alone or 3x40)"),  # glue, and slow: its products are interpreted
    "test_cuda_library": (70, "cuda"),
    "test_depthwise_conv": (80, "cuda"),
    "test_depthwise_conv_layer_norm": (70, "cuda"),
    "test_layer_norm": (130, "cuda"),
}
"""Files of tests/ops, how many tests of CUDA kernels are run of each at least, and which."""


@needs_compiler
@pytest.mark.parametrize(("name", "least", "which"), [(name, *values) for name, values in TESTS.items()])
def test_cuda_kernels_pass_in_the_emulator(library: Path, name: str, least: int, which: str) -> None:
    if name == "test_convnext_block" and (broken := backends.broken_interpreter()):
        pytest.skip(broken)
    # Reports are written to the file descriptor that pytest would capture, just before the process ends.
    options = ["-n0", "-v", "-k", which, "-m", "not gpu", "-p", "no:cacheprovider", "--capture=sys"]
    command = [sys.executable, "-m", "pytest", f"tests/ops/{name}.py", *options]
    result = subprocess.run(
        command,
        cwd=ROOT,
        env=environment(library, COMPILER[0]),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    passed = re.search(r"=+ (\d+) passed\b", result.stdout)
    assert result.returncode == 0 and passed is not None and int(passed[1]) >= least, result.stdout
