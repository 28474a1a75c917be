"""Finds the compiled library, or builds it in place for this machine's GPUs where there is an nvcc."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.machine_code import ROOT, find_nvcc
from convnext_kernels.build import build_info
from convnext_kernels.cli.errors import command, writable
from convnext_kernels.cli.output import write_json


def architectures() -> str:
    """Those of the visible GPUs, as CONVNEXT_KERNELS_CUDA_ARCHS takes them; sm_90 has instructions of its own."""
    capabilities = {torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())}
    return ";".join(f"{major}{minor}{'a' if major == 9 else ''}" for major, minor in sorted(capabilities))


def build() -> None:
    """Builds in place, so that the processes that start after this one find it."""
    environment = os.environ | {"CONVNEXT_KERNELS_CUDA": "1"}
    if chosen := architectures():
        environment.setdefault("CONVNEXT_KERNELS_CUDA_ARCHS", chosen)
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=sys.stderr)


@command("library")
def main(arguments: list[str] | None = None) -> int:
    """Returns 0 where the library is there or cannot be built for want of an nvcc, which is said; 1 where it fails."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.library", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found")
    options = parser.parse_args(arguments)
    path = writable("--json", options.json)
    info, code = build_info(), 0
    if not info["compiled_library"] and find_nvcc() is not None:
        try:
            build()
            info |= {"compiled_library": True, "reason": None}
        except subprocess.CalledProcessError as error:
            info["reason"], code = f"building it failed: setup.py ended with {error.returncode}", 1
    if path is not None:
        write_json(path, {"results": [], "unmeasured": {}, "library": info})
    print("the compiled library is there" if info["compiled_library"] else info["reason"], file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
