"""compare every operator and gradient with float64, beside PyTorch's own error

An operator passes where its error is within the limit that PyTorch's error in the same dtype sets. Without a GPU the
Triton kernels run in Triton's interpreter, on small shapes.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from convnext_kernels.backends import BACKENDS
from convnext_kernels.cli.errors import names, writable
from convnext_kernels.cli.machine import device_name, find_device, provenance
from convnext_kernels.cli.output import console, write_json

if TYPE_CHECKING:
    from convnext_kernels.parity import Case, Comparison

INTERPRETED_BACKENDS = ("triton", "reference")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's options."""
    parser.add_argument("--operator", nargs="+", action="extend", metavar="NAME", help="only these (all)")
    parser.add_argument("--dtype", nargs="+", action="extend", metavar="NAME", help="float32, float16, bfloat16 (all)")
    parser.add_argument(
        "--backend", nargs="+", action="extend", metavar="NAME", help=f"{', '.join(BACKENDS)} (all that the device has)"
    )
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda or cuda:N (the GPU if there is one)")
    parser.add_argument("--all", action="store_true", help="print every comparison, not only the worst")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every comparison")


@dataclass
class Group:
    """All cases of one operator, dtype and backend."""

    operator: str
    dtype: str
    backend: str
    comparisons: list[Comparison] = field(default_factory=list)
    not_run: dict[str, list[str]] = field(default_factory=dict)
    raised: dict[str, str] = field(default_factory=dict)

    @property
    def ran(self) -> bool:
        return bool(self.comparisons or self.raised)

    @property
    def passed(self) -> bool:
        return not self.raised and all(comparison.passed for comparison in self.comparisons)

    @property
    def worst(self) -> Comparison | None:
        return max(self.comparisons, key=_severity, default=None)


def _severity(comparison: Comparison) -> float:
    """Error over limit; a NaN is worse than any number."""
    if math.isnan(comparison.error) or (comparison.error and not comparison.limit):
        return math.inf
    return comparison.error / comparison.limit if comparison.limit else 0.0


@dataclass(frozen=True)
class Selection:
    """What was asked for; `small` where kernels are interpreted."""

    operators: list[str]
    dtypes: list[str]
    backends: list[str]
    device: torch.device
    small: bool

    def groups(self) -> Iterator[Group]:
        for operator in self.operators:
            for dtype in self.dtypes:
                for backend in self.backends:
                    yield Group(operator, dtype, backend)


def _select(arguments: argparse.Namespace, parity: ModuleType) -> Selection:
    device = find_device(arguments.device)
    on_gpu = device.type == "cuda"
    return Selection(
        operators=names("--operator", arguments.operator, parity.OPERATORS, parity.OPERATORS),
        dtypes=names("--dtype", arguments.dtype, parity.DTYPES, list(parity.DTYPES)),
        backends=names("--backend", arguments.backend, BACKENDS, BACKENDS if on_gpu else INTERPRETED_BACKENDS),
        device=device,
        small=not on_gpu,
    )


def _run_case(group: Group, case: Case, device: torch.device, parity: ModuleType) -> None:
    dtype = parity.DTYPES[group.dtype]
    reasons = parity.unsupported(case, dtype, device, group.backend)
    if reasons:
        group.not_run[case.name] = list(reasons)
        return
    try:
        group.comparisons += parity.compare(case, dtype, device, group.backend)
    except Exception as error:  # a kernel that raises fails its case, and the others still run
        group.raised[case.name] = f"{type(error).__name__}: {error}"


def compare_all(selection: Selection, parity: ModuleType) -> list[Group]:
    """Runs every case, with a progress bar on stderr."""
    cases = {operator: parity.cases(operator, selection.small) for operator in selection.operators}
    groups = list(selection.groups())
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console(stderr=True)) as progress:
        bar = progress.add_task("", total=sum(len(cases[group.operator]) for group in groups))
        for group in groups:
            progress.update(bar, description=f"{group.operator}, {group.dtype}, {group.backend}")
            for case in cases[group.operator]:
                _run_case(group, case, selection.device, parity)
                progress.advance(bar)
    return groups


def _unrun_backends(groups: Sequence[Group], asked: Sequence[str] | None) -> list[str]:
    """The backends asked for by name of which nothing could run."""
    if asked is None:
        return []
    ran = {group.backend for group in groups if group.ran}
    return [backend for backend in dict.fromkeys(group.backend for group in groups) if backend not in ran]


def _outcome(passed: bool) -> str:
    return "[green]pass[/green]" if passed else "[bold red]FAIL[/bold red]"


def _numbers(comparison: Comparison) -> list[str]:
    return [
        f"{comparison.error:.1e}",
        f"{comparison.torch_error:.1e}",
        f"{_severity(comparison):.2f}",
        comparison.tensor,
        comparison.case,
    ]


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in ("operator", "dtype", "backend", "result"):
        table.add_column(column)
    for column in ("error", "PyTorch's", "error / limit"):
        table.add_column(column, justify="right")
    table.add_column("tensor")
    table.add_column("case", overflow="fold")
    return table


def _show_group(table: Table, group: Group, every: bool) -> None:
    head = [group.operator, group.dtype, group.backend]
    worst = group.worst
    if every:
        for comparison in group.comparisons:
            table.add_row(*head, _outcome(comparison.passed), *_numbers(comparison))
    elif worst is not None and not group.raised:
        table.add_row(*head, _outcome(group.passed), *_numbers(worst))
    if group.raised:
        table.add_row(*head, _outcome(False), "", "", "", "", f"{len(group.raised)} cases raised")
    if not group.ran:
        table.add_row(*head, "[yellow]not run[/yellow]")


def _notes(groups: Sequence[Group]) -> Iterator[str]:
    """Why cases raised or were not run, each message once with all that it concerns."""
    concerned: dict[str, dict[str, None]] = {}
    for group in groups:
        for case, message in group.raised.items():
            concerned.setdefault(f"raised {message}", {})[f"{group.operator} {group.dtype} {group.backend} {case}"] = (
                None
            )
        for reason in (reason for reasons in group.not_run.values() for reason in reasons):
            concerned.setdefault(f"not run: {reason}", {})[f"{group.operator} {group.dtype} {group.backend}"] = None
    for message, where in concerned.items():
        yield f"{message} ({', '.join(where)})"


def show(groups: Sequence[Group], selection: Selection, every: bool, target: Console) -> None:
    """Prints the worst comparison of each operator, dtype and backend, or every one, then a summary."""
    table = _table(f"Errors against float64 on {device_name(selection.device)}: the worst of each")
    if every:
        table.title = f"Errors against float64 on {device_name(selection.device)}"
    for group in groups:
        _show_group(table, group, every)
    target.print(table)
    for note in _notes(groups):
        target.print(note, markup=False)
    comparisons = sum(len(group.comparisons) for group in groups)
    failed = sum(not comparison.passed for group in groups for comparison in group.comparisons)
    raised = sum(len(group.raised) for group in groups)
    skipped = sum(len(group.not_run) for group in groups)
    target.print(f"{comparisons} comparisons: {failed} failed; {raised} cases raised, {skipped} not run")


def _report(groups: Sequence[Group], selection: Selection, passed: bool) -> dict[str, Any]:
    described = {"operator", "dtype", "backend"}
    return {
        "device": device_name(selection.device),
        **provenance(),
        "comparisons": [asdict(comparison) for group in groups for comparison in group.comparisons],
        "raised": [_described(group, described) | {"cases": group.raised} for group in groups if group.raised],
        "not_run": [_described(group, described) | {"cases": group.not_run} for group in groups if group.not_run],
        "passed": passed,
    }


def _described(group: Group, keys: set[str]) -> dict[str, Any]:
    return {key: value for key, value in vars(group).items() if key in keys}


def run(arguments: argparse.Namespace) -> int:
    """Runs the comparisons; 1 where one fails or where nothing of a backend asked for by name could run."""
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")  # read once, when Triton is imported by the first kernel
    from convnext_kernels import parity

    selection = _select(arguments, parity)
    writable("--json", arguments.json)
    groups = compare_all(selection, parity)
    target = console()
    show(groups, selection, arguments.all, target)
    unrun = _unrun_backends(groups, arguments.backend)
    for backend in unrun:
        target.print(f"[bold red]{backend} was asked for and could not run[/bold red]")
    passed = not unrun and all(group.passed for group in groups)
    if arguments.json is not None:
        write_json(arguments.json, _report(groups, selection, passed))
    return 0 if passed else 1
