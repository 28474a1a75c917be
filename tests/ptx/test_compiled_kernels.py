"""The operators' own parity tests on what the compilers make of the kernels, in processes of their own.

A process either runs Triton's kernels in its interpreter or compiles them, decided when Triton is imported.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from emulator import emulated
from emulator.emulation import COMPILER, NVCC, needs_compiler, needs_nvcc
from ptx import cuda
from ptx.running import ARCHITECTURE

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]
ALL = "kernel_parity and triton and bfloat16"
TRITON = [
    (90, "test_convnext_block", f"{ALL} and (2x96x5x3 or sliced)", 4),
    (90, "test_mlp", ALL, 12),
    (80, "test_mlp", ALL, 12),
    (90, "test_depthwise_conv", f"{ALL} and (25x41 or 3x40)", 2),
    (80, "test_depthwise_conv_layer_norm", f"{ALL} and 25x41", 1),
    (80, "test_layer_norm", f"{ALL} and (25x41 or 3x40)", 2),
    (80, "test_response_norm", ALL, 6),
    (90, "test_patch_linear", ALL, 5),
    (90, "test_tf32", "tiles", 5),
    (80, "test_tf32", "tiles", 5),
]
"""Architecture, file of tests/ops, which of its tests, and how many of them there are at least."""


def run_tests(names: list[str], which: str, least: int, environment: dict[str, str]) -> None:
    """Runs tests of tests/ops in a process that sees no GPU; at least so many must pass, and all."""
    options = ["-n0", "-q", "-k", which, "-m", "not gpu", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *(f"tests/ops/{name}.py" for name in names), *options]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    passed = re.search(r"\b(\d+) passed\b", result.stdout)
    assert result.returncode == 0 and passed is not None and int(passed[1]) >= least, result.stdout + result.stderr


@pytest.mark.parametrize(("architecture", "name", "which", "least"), TRITON)
def test_triton_kernels(architecture, name, which, least, tmp_path):
    run_tests([name], which, least, {ARCHITECTURE: str(architecture), "TRITON_CACHE_DIR": str(tmp_path)})


@needs_compiler
@needs_nvcc
def test_cuda_kernels(tmp_path):
    library = cuda.build(tmp_path, str(NVCC), COMPILER[0], "80")
    names = ["test_depthwise_conv", "test_layer_norm", "test_depthwise_conv_layer_norm"]
    run_tests(names, "kernel_parity and cuda", 90, {emulated.LIBRARY: str(library), cuda.FOLDER: str(tmp_path)})
