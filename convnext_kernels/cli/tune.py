"""measure launch configurations on this GPU and write the table that the library reads

Each candidate of a kernel must give the results of the rule's configuration before it is timed, in turn with that one,
and must be faster by more than the times spread to get into the table.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

from convnext_kernels import parity
from convnext_kernels.backends import interpreting
from convnext_kernels.cli.compile_ahead import compiled_ahead
from convnext_kernels.cli.errors import CommandError, at_least, first_line, names, positive, writable
from convnext_kernels.cli.machine import device_name, find_device, versions
from convnext_kernels.cli.measure import Timing, captured, measure_over, over, rotation, warm_up
from convnext_kernels.cli.output import console, save_json
from convnext_kernels.cli.tune_plan import Stage, planned, stages_of, stages_of_width
from convnext_kernels.cli.workloads import PRECISIONS, Workload
from convnext_kernels.model import list_models
from convnext_kernels.ops.common.launch import architecture
from convnext_kernels.ops.common.tuning import (
    FOLDER_VARIABLE,
    Entry,
    Name,
    file_name,
    forget_tables,
    read_table,
    table_content,
    trying,
    user_folder,
)

ROUNDS, FIRST_ROUNDS = 9, 2
HOPELESS = 1.15
"""What takes so many times as long as the fastest in the first rounds is not timed further."""

MINIMUM_GAIN = 0.02
"""Less is not worth an entry, however small the spread."""

ROUNDING = {2: 2, 4: 64}
"""By bytes of a result's element: how many eps two orders of summation may differ by."""

PREDICTED_SECONDS = 1.0
"""For a configuration to be checked and timed; it is compiled before, while others are timed."""

Compiler = Callable[[Sequence[Workload]], AbstractContextManager[Callable[[Workload], None]]]
"""A context within which a plan's kernels are compiled; what waits for one of them."""

Timer = Callable[[Mapping[Any, Callable[[Any], object]], Sequence[Any], torch.device], Mapping[Any, Timing]]
"""Of configurations, what launches each on an input; the inputs; the GPU: times of each, a sample for every round."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's options."""
    parser.add_argument(
        "--model", action="append", metavar="NAME", help="its widths; repeat or separate by commas (all)"
    )
    parser.add_argument("--widths", action="append", metavar="N", help="channels of a block, in place of models'")
    parser.add_argument("--dtype", action="append", metavar="NAME", help=f"{', '.join(PRECISIONS)} (bfloat16)")
    parser.add_argument("--minutes", type=float, default=30.0, metavar="N", help="begin no kernel after (%(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where to write (where the library reads)")
    parser.add_argument("--dry-run", action="store_true", help="print what would be measured; needs no GPU")
    parser.add_argument("--device", metavar="NAME", help="cuda or cuda:N (the current GPU)")


@dataclass(frozen=True)
class Options:
    """The command's arguments, checked and with their defaults."""

    networks: Sequence[Sequence[Stage]]
    precisions: list[str]
    minutes: float
    device: torch.device
    output: Path | None
    dry_run: bool


@dataclass(frozen=True)
class Outcome:
    """Of one kernel: the entry, if a candidate won, and the candidates that gave other results or could not run."""

    workload: Workload
    entry: Entry | None
    wrong: dict[Any, str] = field(default_factory=dict)
    failed: dict[Any, str] = field(default_factory=dict)


def _chosen_networks(arguments: argparse.Namespace) -> list[list[Stage]]:
    models = names("--model", arguments.model, list_models(), list_models())
    if arguments.widths is None:
        return [stages_of(model) for model in models]
    chosen = []
    for text in (text for item in arguments.widths for text in item.split(",")):
        if not text.strip().isdecimal():
            raise CommandError(f"--widths: got {text!r}; accepted: numbers of channels")
        chosen.append(stages_of_width(at_least("--widths", int(text), 1)))
    return chosen


def check_options(arguments: argparse.Namespace) -> Options:
    """Checks every argument, and that there is what to measure on, before any work."""
    networks, precisions = _chosen_networks(arguments), names("--dtype", arguments.dtype, PRECISIONS, ["bfloat16"])
    positive("--minutes", arguments.minutes)
    output, device = writable("--output", arguments.output), find_device(arguments.device)
    if not arguments.dry_run:
        if device.type != "cuda":
            raise CommandError("there is no GPU to measure on; --dry-run shows what would be measured")
        if find_spec("triton") is None:
            raise CommandError("triton is not installed: there is nothing to tune")
        if interpreting():
            raise CommandError("TRITON_INTERPRET=1 is set: Triton's interpreter has no launch configurations to time")
        if torch.cuda.is_current_stream_capturing():
            raise CommandError("the current stream is captured into a CUDA graph; measuring would become part of it")
    return Options(networks, precisions, arguments.minutes, device, output, arguments.dry_run)


def disagreement(results: Sequence[Tensor], expected: Sequence[Tensor]) -> str | None:
    """What differs by more than rounding, None where nothing does."""
    for index, (result, right) in enumerate(zip(results, expected, strict=True)):
        limit = ROUNDING[right.element_size()] * torch.finfo(right.dtype).eps
        error = max(parity.errors(result, right.double()))
        if not error <= limit:  # a NaN, which is in both errors, is not
            return f"result {index} off by {error:.1e}, limit {limit:.1e}"
    return None


def time_in_turn(
    calls: Mapping[Any, Callable[[Any], object]], inputs: Sequence[Any], device: torch.device
) -> dict[Any, Timing]:
    """Times CUDA graphs of calls over all inputs, one configuration after the other in every round.

    The first is that of the rule. Of the others only those are timed in all rounds that a few show to be promising.
    """
    works = {}
    for config, call in calls.items():
        warm_up(work := over(call, inputs), device)
        works[config] = captured(work)
    first = measure_over(works, [None], device, FIRST_ROUNDS, lambda: None)
    limit = HOPELESS * min(timing.median for timing in first.values())
    rule = next(iter(works))
    promising = {config: work for config, work in works.items() if config == rule or first[config].median < limit}
    return measure_over(promising, [None], device, ROUNDS, lambda: None)


def fastest(timings: Mapping[Any, Timing], rule: Any) -> tuple[Any, float] | None:
    """The configuration that gains most over the rule's, and how many times faster; None if all are within the spread.

    The spread is that of the ratio over rounds, between its quartiles.
    """
    found: list[tuple[float, Any]] = []
    for config, timing in timings.items():
        pairs = zip(timings[rule].samples, timing.samples, strict=True)
        ratios = Timing([theirs / ours for theirs, ours in pairs])
        lower, upper = ratios.quartiles
        if ratios.median - 1 > max(upper - lower, MINIMUM_GAIN):
            found.append((ratios.median, config))
    speedup, config = max(found, key=lambda pair: pair[0], default=(1.0, None))
    return None if config is None else (config, speedup)


def tune_kernel(workload: Workload, device: torch.device, timer: Timer = time_in_turn) -> Outcome:
    """Checks and times every candidate of a kernel."""
    first = workload.draw(device, seed=0)
    size = sum(tensor.nbytes for tensor in first.values())
    inputs = [first, *(workload.draw(device, seed) for seed in range(1, rotation(size, device)))]

    def launching(config: Any) -> Callable[[Any], list[Tensor]]:
        def call(tensors: Any) -> list[Tensor]:
            with trying(workload.tunable, config):
                return workload.run(tensors)

        return call

    rule, *others = workload.tunable.candidates(workload.key)
    calls, outcome = {rule: launching(rule)}, Outcome(workload, None)
    with parity.poisoned_memory():
        expected = calls[rule](first)
        for config in others:
            call = launching(config)
            try:
                difference = disagreement(call(first), expected)
            except Exception as error:  # such as too much shared memory: a result, not the end
                outcome.failed[config] = first_line(error)
                continue
            if difference is None:
                calls[config] = call
            else:
                outcome.wrong[config] = difference
    best = fastest(timer(calls, inputs, device), rule)
    if best is None:
        return outcome
    return replace(outcome, entry=Entry(*workload.name, best[0], round(best[1], 3)))


def launched_first(plan: Sequence[Workload]) -> AbstractContextManager[Callable[[Workload], None]]:
    """Nothing is compiled before it is launched."""
    return nullcontext(lambda workload: None)


def write_table(path: Path, gpu: str, entries: Iterable[Entry]) -> None:
    """Writes a table in one step; from now on launches read it."""
    save_json(path, table_content(gpu, entries, versions()))
    forget_tables()


def tune(
    plan: Sequence[Workload],
    options: Options,
    path: Path,
    timer: Timer = time_in_turn,
    clock: Callable[[], float] = time.monotonic,
    compiler: Compiler = launched_first,
) -> list[Outcome]:
    """Measures kernel after kernel until the time is over; the table is written after each of them.

    What the file has for kernels that are not measured now stays.
    """
    gpu, end = device_name(options.device), clock() + 60 * options.minutes
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    messages, outcomes = console(stderr=True), []
    before = read_table(path, gpu)
    entries: dict[Name, Entry] = dict(before.entries)
    for problem in before.problems:
        messages.print(f"not kept: {problem}", style="yellow", markup=False)
    with Progress(*columns, console=messages) as progress, compiler(plan) as wait_for:
        bar = progress.add_task("", total=len(plan))
        for workload in plan:
            if clock() >= end:
                break
            progress.update(bar, description=str(workload))
            wait_for(workload)
            try:
                outcome = tune_kernel(workload, options.device, timer)
            except RuntimeError as error:  # such as too little memory: not the end for the other kernels
                rule = workload.tunable.rule(*workload.key)
                outcomes.append(Outcome(workload, None, failed={rule: first_line(error)}))
            else:
                outcomes.append(outcome)
                entries.pop(workload.name, None)
                if outcome.entry is not None:
                    entries[workload.name] = outcome.entry
                write_table(path, gpu, entries.values())
            progress.advance(bar)
    return outcomes


def _settings(config: Any) -> str:
    return ", ".join(f"{name} {value}" for name, value in asdict(config).items())


def _show(outcomes: Sequence[Outcome], plan: Sequence[Any], target: Console) -> None:
    """Prints what won, and what was refused."""
    table = Table(title="Faster than the rule's configuration", title_justify="left")
    table.add_column("kernel")
    table.add_column("configuration")
    table.add_column("speedup", justify="right")
    for outcome in outcomes:
        if outcome.entry is not None:
            table.add_row(str(outcome.workload), _settings(outcome.entry.config), f"{outcome.entry.speedup:.2f}x")
        for config, reason in {**outcome.failed, **outcome.wrong}.items():
            target.print(f"refused: {outcome.workload}: {_settings(config)}: {reason}", style="yellow", markup=False)
    if table.row_count:
        target.print(table)
    target.print(f"{len(outcomes)} of {len(plan)} kernels measured, {table.row_count} faster than by the rule")


def _show_plan(plan: Sequence[Workload], options: Options, target: Console) -> None:
    """Prints how much of each kernel would be measured, and how long that is predicted to take."""
    table = Table(title="What would be measured", title_justify="left")
    table.add_column("kernel")
    table.add_column("dtype")
    table.add_column("keys", justify="right")
    table.add_column("configurations", justify="right")
    keys: Counter[tuple[str, str]] = Counter()
    configurations: Counter[tuple[str, str]] = Counter()
    for workload in plan:
        row = workload.tunable.name, workload.precision
        keys[row] += 1
        configurations[row] += len(workload.tunable.candidates(workload.key))
    for row, count in keys.items():
        table.add_row(*row, str(count), str(configurations[row]))
    target.print(table)
    minutes = configurations.total() * PREDICTED_SECONDS / 60
    target.print(
        f"{configurations.total()} configurations of {len(plan)} kernels: {minutes:.0f} minutes predicted, "
        f"of which --minutes allows {options.minutes:g}"
    )


def run(arguments: argparse.Namespace) -> int:
    """Measures and writes; 1 where a candidate gave other results than the rule's configuration."""
    options = check_options(arguments)
    plan = planned(options.networks, options.precisions, options.device)
    if options.dry_run:
        _show_plan(plan, options, console())
        return 0
    read = user_folder() / file_name(device_name(options.device))
    path = options.output or read
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error}; --output names another file") from error
    torch.cuda.set_device(options.device)
    ahead = partial(compiled_ahead, architecture=architecture(options.device))
    outcomes = tune(plan, options, path, compiler=ahead)
    _show(outcomes, plan, console())
    messages = console(stderr=True)
    messages.print(f"wrote {path}", markup=False)
    if path.absolute() != read.absolute():
        messages.print(
            f"it is read where {FOLDER_VARIABLE} names its folder and it is called {read.name}", markup=False
        )
    return 1 if any(outcome.wrong for outcome in outcomes) else 0
