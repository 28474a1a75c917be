"""The operators' own parity tests on what Triton compiles for A100 and H200, each file in a process of its own.

A process either runs Triton's kernels in its interpreter or compiles them, decided when Triton is imported.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ptx.running import ARCHITECTURE

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]
ALL = "kernel_parity and triton and bfloat16"
TESTS = [
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


@pytest.mark.parametrize(("architecture", "name", "which", "least"), TESTS)
def test_compiled_kernels_pass_on_the_machine(architecture, name, which, least, tmp_path):
    options = ["-n0", "-q", "-k", which, "-m", "not gpu", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", f"tests/ops/{name}.py", *options]
    environment = {
        **os.environ,
        ARCHITECTURE: str(architecture),
        "TRITON_CACHE_DIR": str(tmp_path),
        "CUDA_VISIBLE_DEVICES": "",
    }
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    passed = re.search(r"\b(\d+) passed\b", result.stdout)
    assert result.returncode == 0 and passed is not None and int(passed[1]) >= least, result.stdout + result.stderr
