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

TESTS = {
    "test_cuda_library": 70,
    "test_depthwise_conv": 80,
    "test_depthwise_conv_layer_norm": 70,
    "test_layer_norm": 130,
}
"""Files of tests/ops, and how many tests of CUDA kernels each has at least."""


@needs_compiler
@pytest.mark.parametrize(("name", "least"), TESTS.items())
def test_cuda_kernels_pass_in_the_emulator(library: Path, name: str, least: int) -> None:
    # Reports are written to the file descriptor that pytest would capture, just before the process ends.
    options = ["-n0", "-v", "-k", "cuda", "-m", "not gpu", "-p", "no:cacheprovider", "--capture=sys"]
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
