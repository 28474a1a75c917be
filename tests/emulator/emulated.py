"""Makes the compiled library of the emulator the "cuda" backend of CPU tensors, in a process of its own."""

import os
import subprocess
import sys
from contextlib import nullcontext
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

import torch

from convnext_kernels import backends, build
from convnext_kernels.ops.common import cuda_launch

LIBRARY = "CONVNEXT_KERNELS_EMULATED_LIBRARY"
"""The environment variable with the path of the emulator's library."""

COMPILER_LIBRARIES = ("libasan.so", "libstdc++.so")
"""What must be loaded before Python: the address sanitizer, and the one whose functions it stands in for."""


def environment(library: Path, compiler: str) -> dict[str, str]:
    """Of a process that is to use the library. It sees no GPU, whose memory the emulator could not read."""

    def path(name: str) -> str:
        command = [compiler, f"-print-file-name={name}"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    return {
        **os.environ,
        LIBRARY: str(library),
        "CUDA_VISIBLE_DEVICES": "",
        "LD_PRELOAD": " ".join(map(path, COMPILER_LIBRARIES)),
        "ASAN_OPTIONS": "detect_leaks=0",  # looking for leaks needs to trace processes, and Python leaks by design
    }


def install() -> None:
    """Loads the library that the environment names and lets the "cuda" backend run it on CPU tensors."""
    name, path = "convnext_kernels._C", os.environ[LIBRARY]
    loader = ExtensionFileLoader(name, path)
    spec = spec_from_loader(name, loader, origin=path)
    assert spec is not None
    sys.modules[name] = module_from_spec(spec)
    loader.exec_module(sys.modules[name])
    build._load.cache_clear()
    backends.machine_reasons.cache_clear()
    backends._cuda_reasons = lambda _, dtype: ["float64 has no CUDA kernels"] if dtype == torch.float64 else []
    cuda_launch._device_and_stream = lambda device: (nullcontext(), 0)
