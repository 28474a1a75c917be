"""Times what bounds every kernel on this GPU: a large copy in its memory and a large product on its matrix units.

Both take turns, from CUDA graphs, on random data.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, dataclass
from functools import partial

import torch

from benchmarks.mlp import COPY, COPY_BYTES, LARGE_PRODUCT, PRODUCT_SIZE, ceilings
from benchmarks.reporting import Figure, Row, add_arguments, row_of, run_cases
from benchmarks.timing import Measured, Tensors, measure_calls
from convnext_kernels.cli.errors import command, names
from convnext_kernels.cli.measure import SAMPLE_MILLISECONDS
from convnext_kernels.parity import DTYPES

ROUNDS, SETUP_SECONDS = 12, 2
UNITS = {COPY: ("TB/s", 2 * COPY_BYTES), LARGE_PRODUCT: ("TFLOP/s", 2 * PRODUCT_SIZE**3)}
"""What each does: bytes read and written, operations of two factors."""


@dataclass(frozen=True)
class Case:
    """Both, the product's factors of a dtype."""

    dtype: str
    mode = "ceilings"

    def __str__(self) -> str:
        return f"{self.mode}, {self.dtype}"

    @property
    def entries(self) -> dict[str, str]:
        """What a row says of it."""
        return {"mode": self.mode, **asdict(self)}


def run(contender: str, tensors: Tensors) -> object:
    """One call."""
    if contender == COPY:
        return tensors["destination"].copy_(tensors["source"])
    return torch.mm(tensors["left"], tensors["right"])


def rows_of(case: Case, measured: Measured) -> list[Row]:
    """A row for each, with its rate; without one where nothing was measured."""
    rows = []
    for contender, (unit, amount) in UNITS.items():
        timing = measured.timings.get(contender)
        rate = Figure(unit, amount / timing.median / 1e9) if timing else Figure(unit, None)
        rows.append(row_of(case.dtype, case.entries, contender, measured, [rate]))
    return rows


def measure(case: Case, device: torch.device, rounds: int) -> list[Row]:
    """Both in turn; each is larger than the L2 cache by itself."""
    inputs = [ceilings(DTYPES[case.dtype], device)]
    return rows_of(case, measure_calls({name: partial(run, name) for name in UNITS}, inputs, device, rounds))


def plan(case: Case) -> list[Row]:
    """What would be measured."""
    return [Row(case.dtype, case.entries, name, [Figure(unit, None)]) for name, (unit, _) in UNITS.items()]


@command("ceilings")
def main(arguments: list[str] | None = None) -> int:
    """Returns 0; 2 where the arguments do not fit."""
    description = (__doc__ or "").split("\n\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ceilings", description=description)
    parser.add_argument("--dtype", nargs="+", metavar="NAME", help=f"{', '.join(DTYPES)} (bfloat16 float16)")
    add_arguments(parser, ROUNDS, minutes=1)
    options = parser.parse_args(arguments)
    cases = [Case(dtype) for dtype in names("--dtype", options.dtype, DTYPES, ["bfloat16", "float16"])]
    seconds = SETUP_SECONDS + options.rounds * len(UNITS) * SAMPLE_MILLISECONDS / 1e3
    return run_cases(options, cases, measure, plan, lambda case: seconds)


if __name__ == "__main__":
    sys.exit(main())
