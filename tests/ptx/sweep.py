"""Runs all calls that `benchmarks.ahead_of_time` compiles and compares them with float64, as parity tests do.

Too much for every run of the tests, but not for a new Triton, a new kernel or new tiles. From the repository's root:

    PYTHONPATH=tests python -m ptx.sweep [--architecture 80 90] [--dtype bfloat16 tf32] [--operator mlp] [--few]
"""

from __future__ import annotations

import argparse
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from itertools import product
from multiprocessing import get_context
from unittest.mock import patch

import torch
from ptx import tf32
from ptx.running import running

from benchmarks.ahead_of_time import PRODUCTS, cases
from convnext_kernels import parity
from convnext_kernels.cli.workloads import PRECISIONS
from convnext_kernels.functional import OPERATORS
from convnext_kernels.ops.common import matmul_configs


def check(architecture: int, precision: str, case: parity.Case, few: bool) -> str:
    """What is wrong with a call, or nothing."""
    dtype, float32_precision = PRECISIONS[precision]
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision(float32_precision)
    with (
        running(architecture),
        tf32.rounded() if precision == "tf32" else nullcontext(),
        patch.object(matmul_configs, "MULTIPROCESSORS", sys.maxsize if few else 0),
    ):
        try:
            comparisons = parity.compare(case, dtype, "cpu", "triton")
        except Exception as error:  # every other call is still to be checked
            return f"{type(error).__name__}: {error}"
    return "; ".join(str(comparison) for comparison in comparisons if not comparison.passed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--architecture", nargs="+", type=int, default=[80, 90], metavar="SM")
    parser.add_argument("--dtype", nargs="+", choices=PRECISIONS, default=list(PRECISIONS), metavar="NAME")
    parser.add_argument("--operator", nargs="+", choices=OPERATORS, default=list(OPERATORS), metavar="NAME")
    parser.add_argument("--few", action="store_true", help="products in the tiles that few tokens have")
    parser.add_argument("--processes", type=int, default=2, metavar="N")
    options = parser.parse_args()
    calls = [
        (architecture, precision, case, options.few)
        for architecture, precision, operator in product(options.architecture, options.dtype, options.operator)
        if precision != "tf32" or operator in PRODUCTS
        for case in cases(operator, quick=False)
    ]
    wrong, start = 0, time.perf_counter()
    with ProcessPoolExecutor(options.processes, get_context("spawn")) as pool:
        futures = [pool.submit(check, *call) for call in calls]
        for (architecture, precision, case, _), future in zip(calls, futures, strict=True):
            found = future.result()
            wrong += bool(found)
            name = f"sm_{architecture} {precision} {case.operator}, {case.name}"
            print(f"{time.perf_counter() - start:6.0f} s  {name}: {found or 'passed'}", flush=True)
    print(f"{len(calls) - wrong} passed, {wrong} failed")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
