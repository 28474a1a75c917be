"""Compiles the Triton kernels of blocks for this GPU, on all cores at once, so that what measures them need not wait.

They go into Triton's cache on disk, of which every later process takes them; nothing is launched.
"""

from __future__ import annotations

import argparse
import os
import sys
from concurrent.futures import Executor, ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import torch

from benchmarks.block import BACKWARD, DTYPES, FORWARD, SIZES, Case, run
from benchmarks.timing import failure_of, find_gpu
from convnext_kernels.cli.compile_ahead import compiling
from convnext_kernels.cli.errors import command, writable
from convnext_kernels.cli.output import write_json
from convnext_kernels.ops.common.launch import architecture

IMAGES = 16
"""Kernels are specialised for numbers that 16 divides, as it does every batch that is measured."""


def cases() -> list[Case]:
    """Blocks of every width, those that take longest first."""
    sizes = product(DTYPES, (BACKWARD, FORWARD), SIZES.items())
    return [Case(mode, dtype, IMAGES, channels, size, False) for dtype, mode, (channels, size) in sizes]


def compile_case(case: Case, target: int) -> int:
    """Compiles what our block launches on an architecture; returns how many kernels that is."""
    device = torch.device("cpu")
    torch.set_num_threads(1)
    with compiling(target) as compiled:
        modules, tensors = case.modules(device), case.draw(device, seed=0)
        for contender in case.ours:
            run(case, modules[contender], tensors)
    return len(compiled)


def compile_all(target: int, pool: Executor) -> dict[str, str]:
    """Compiles every case; returns why some could not be."""
    jobs = {str(case): pool.submit(compile_case, case, target) for case in cases()}
    failures = {}
    for name, job in jobs.items():
        try:
            print(f"{name}: {job.result()} kernels", file=sys.stderr, flush=True)
        except Exception as error:  # they are compiled where they are launched, and fail there
            failures[name] = failure_of(error)
    return failures


@command("kernels")
def main(arguments: list[str] | None = None) -> int:
    """Returns 0; 2 where the arguments do not fit."""
    description = (__doc__ or "").split("\n\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=description)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what could not be compiled")
    options = parser.parse_args(arguments)
    path, device = writable("--json", options.json), find_gpu()
    failures: dict[str, str] = {}
    if device is None:
        print("there is no NVIDIA GPU that PyTorch can use, to compile for", file=sys.stderr)
    else:
        with ProcessPoolExecutor(max(1, (os.cpu_count() or 1) - 1), get_context("spawn")) as pool:
            failures = compile_all(architecture(device), pool)
    if path is not None:
        write_json(path, {"results": [], "unmeasured": failures})
    return 0


if __name__ == "__main__":
    sys.exit(main())
