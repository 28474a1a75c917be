"""Results of the benchmarks: figures beside their targets, a file that holds them as they come, and tables."""

from __future__ import annotations

import argparse
import faulthandler
import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.box import SIMPLE
from rich.table import Table

from benchmarks.timing import PARITY_FAILED, Measured, failure_of, fair, find_gpu, header
from convnext_kernels.cli.errors import at_least, positive, writable
from convnext_kernels.cli.output import console, save_json, write_json

Case = TypeVar("Case")


@dataclass(frozen=True)
class Target:
    """What a figure should be at least, or at most."""

    value: float
    at_most: bool = False

    def met(self, measured: float) -> bool:
        """Whether a measured value reaches it; NaN does not."""
        return measured <= self.value if self.at_most else measured >= self.value

    def __str__(self) -> str:
        return f"{'≤' if self.at_most else '≥'} {self.value:g}"


@dataclass(frozen=True)
class Figure:
    """A number by its name, None where it was not measured, and its target, None where there is none."""

    name: str
    value: float | None
    target: Target | None = None

    @property
    def met(self) -> bool | None:
        return None if self.value is None or self.target is None else self.target.met(self.value)

    def __str__(self) -> str:
        value = "" if self.value is None else f"{self.value:.2f}"
        if self.met is not None:
            value = f"[{'green' if self.met else 'red'}]{value}[/]"
        return f"{value} ({self.target})" if self.target else value


@dataclass(frozen=True)
class Row:
    """What was measured of one contender at one case; `failure` says why there is no time."""

    shape: str
    case: dict[str, Any]
    contender: str
    figures: Sequence[Figure] = ()
    milliseconds: float | None = None
    quartiles: tuple[float, float] | None = None
    samples: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    no_graphs: str | None = None
    clocks: dict[str, str] | None = None
    failure: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the case's entries beside the others, the figures by name with value, target and verdict."""
        entries = asdict(self)
        figures = {figure.name: {**asdict(figure), "met": figure.met} for figure in self.figures}
        for figure in figures.values():
            del figure["name"]
        del entries["shape"]
        return {**entries.pop("case"), **entries, "figures": figures}


def row_of(shape: str, case: dict[str, Any], contender: str, measured: Measured, figures: Sequence[Figure]) -> Row:
    """A row of what was measured of a contender; a failure has no figures."""
    failure = measured.failures.get(contender)
    if failure is not None:
        return Row(shape, case, contender, failure=failure)
    timing = measured.timings[contender]
    return Row(
        shape,
        case,
        contender,
        figures,
        timing.median,
        timing.quartiles,
        timing.samples,
        measured.peaks.get(contender),
        measured.no_graphs,
        measured.clocks,
    )


def add_arguments(parser: argparse.ArgumentParser, rounds: int, minutes: float) -> None:
    """Declares what the benchmarks have in common."""
    parser.add_argument("--rounds", type=int, default=rounds, metavar="N", help="samples of each (%(default)d)")
    parser.add_argument(
        "--minutes", type=float, default=minutes, metavar="N", help="begin nothing that would end later (%(default)g)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number, the machine and the versions")


def content(
    head: dict[str, Any], rows: Sequence[Any], unmeasured: dict[str, str], as_dict: Callable[[Any], dict[str, Any]]
) -> dict[str, Any]:
    """All results as plain data for JSON."""
    return {**head, "results": [as_dict(row) for row in rows], "unmeasured": unmeasured}


def measure_all(
    cases: Sequence[Case],
    measure: Callable[[Case], Sequence[Any]],
    as_dict: Callable[[Any], dict[str, Any]],
    head: dict[str, Any],
    path: Path | None,
    seconds: Callable[[Case], float] = lambda case: 0,
    minutes: float = float("inf"),
) -> tuple[list[Any], dict[str, str]]:
    """Measures case after case; after each the file holds what there is.

    Args:
        measure: the rows of a case. as_dict: a row for JSON.
        seconds: what a case is expected to take; it is left out where that is more than is left of `minutes`.

    Returns:
        All rows; and by case why it has none.
    """
    rows: list[Any] = []
    unmeasured: dict[str, str] = {}
    start = time.monotonic()
    with fair():
        for case in cases:
            elapsed = time.monotonic() - start
            if elapsed + seconds(case) > 60 * minutes:
                unmeasured[str(case)] = f"left out for the time: {minutes:g} minutes"
                continue
            print(f"{elapsed:4.0f} s  {case}", file=sys.stderr, flush=True)
            try:
                rows += measure(case)
            except Exception as error:  # the other cases' results count all the same
                unmeasured[str(case)] = failure_of(error)
            gc.collect()
            torch.cuda.empty_cache()  # what this case held is room for the next one
            if path is not None:
                save_json(path, content(head, rows, unmeasured, as_dict))
    if path is not None:
        write_json(path, content(head, rows, unmeasured, as_dict))
    return rows, unmeasured


def _cells(row: Row, names: Sequence[str]) -> list[str]:
    if row.failure is not None:
        return [row.shape, row.contender, "[red]none[/red]"]
    times = ["", ""]
    if row.milliseconds is not None and row.quartiles is not None:
        lower, upper = row.quartiles
        times = [f"{row.milliseconds:.4g}", f"{lower:.4g}-{upper:.4g}"]
    figures = {figure.name: str(figure) for figure in row.figures}
    return [row.shape, row.contender, *times, *(figures.get(name, "") for name in names)]


def tables(rows: Sequence[Row]) -> Iterator[Table]:
    """One table for each mode, of the contenders that have figures or failed; the others' times are in the JSON."""
    for (mode, dtype), of_mode in groupby(rows, key=lambda row: (row.case["mode"], row.case["dtype"])):
        shown = [row for row in of_mode if row.figures or row.failure]
        names = list(dict.fromkeys(figure.name for row in shown for figure in row.figures))
        table = Table(title=f"{mode}, {dtype}", box=SIMPLE)
        table.add_column("shape", no_wrap=True)
        table.add_column("contender", no_wrap=True)
        for column in ("ms", "quartiles, ms", *names):
            table.add_column(column, justify="right")
        for row in shown:
            table.add_row(*_cells(row, names))
        yield table


def report(rows: Sequence[Row], unmeasured: dict[str, str]) -> int:
    """Prints the tables, what failed and what was left out; 1 where one of ours is wrong."""
    out = console()
    out.print(*tables(rows))
    for row in rows:
        if row.failure is not None:
            out.print(f"{row.case['mode']}, {row.shape}, {row.contender}: {row.failure}", style="red", markup=False)
    for case, reason in unmeasured.items():
        out.print(f"{case}: {reason}", style="yellow", markup=False)
    return 1 if any((row.failure or "").startswith(PARITY_FAILED) for row in rows) else 0


@contextmanager
def ends_within(minutes: float) -> Iterator[None]:
    """Ends the process after that time: a GPU that hangs cannot be interrupted otherwise, and the file is written."""
    faulthandler.dump_traceback_later(60 * minutes, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def run_cases(
    options: argparse.Namespace,
    cases: Sequence[Case],
    measure: Callable[[Case, torch.device, int], Sequence[Row]],
    plan: Callable[[Case], Sequence[Row]],
    seconds: Callable[[Case], float],
) -> int:
    """Says what will be done, does it and reports; returns the exit code.

    Args:
        options: of `add_arguments`.
        measure: the rows of a case on a GPU, with so many rounds.
        plan: the rows of a case where there is no GPU: counts and targets.
        seconds: what a case is expected to take.
    """
    path, device = writable("--json", options.json), find_gpu()
    rounds = at_least("--rounds", options.rounds, 1)
    head = header(device, rounds=rounds, minutes=positive("--minutes", options.minutes))
    if device is None:
        print("there is no NVIDIA GPU that PyTorch can use: nothing is timed; the counts, and the targets:")
        rows, unmeasured = [row for case in cases for row in plan(case)], {}
        if path is not None:
            write_json(path, content(head, rows, unmeasured, Row.as_dict))
    else:
        total, limit = sum(map(seconds, cases)), f"none is begun that would end after {options.minutes:g} minutes"
        print(f"{len(cases)} cases on {head['device']}, about {total:.0f} s by estimate; {limit}", flush=True)
        with ends_within(2 * options.minutes):
            rows, unmeasured = measure_all(
                *(cases, lambda case: measure(case, device, rounds), Row.as_dict, head, path, seconds, options.minutes)
            )
    return report(rows, unmeasured)
