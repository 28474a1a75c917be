"""time models and blocks beside PyTorch eager and torch.compile

Every contender has the same weights and sees the same photographs. Contenders alternate, and the ratio is the median
over rounds of eager's time divided by the contender's. Ours gets no speed where it does not agree with eager.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import nn

from convnext_kernels.cli.errors import at_least, first_line, names, writable
from convnext_kernels.cli.images import Photographs, crop_batch, load_photographs
from convnext_kernels.cli.machine import device_name, find_device, provenance
from convnext_kernels.cli.measure import Timing, Work, measure, peak_memory
from convnext_kernels.cli.output import console, save_json, write_json
from convnext_kernels.cli.tasks import (
    COMPILED,
    EAGER,
    MODES,
    OURS,
    Parity,
    Task,
    check_parity,
    full_float32,
    parity_failure,
    tasks,
)
from convnext_kernels.model import list_models

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

MINIMUM_RESOLUTION = 32

ROUNDS = {"cpu": {"inference": 10, "training": 5}, "cuda": {"inference": 30, "training": 30}}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's options."""
    parser.add_argument("--model", action="append", metavar="NAME", help="repeat or separate by commas (convnext_tiny)")
    parser.add_argument("--batch-size", type=int, metavar="N", help="images per batch (8 on a CPU, 128 on a GPU)")
    parser.add_argument("--resolution", type=int, default=224, metavar="PIXELS", help="height and width (%(default)s)")
    parser.add_argument(
        "--dtype", metavar="NAME", help="float32, float16, bfloat16 (float32 on a CPU, bfloat16 on a GPU)"
    )
    parser.add_argument(
        "--mode", action="append", metavar="NAME", help="inference, training, block (inference,training)"
    )
    parser.add_argument("--images", type=Path, metavar="DIR", help="a folder of photographs (scikit-learn's two)")
    parser.add_argument("--runs", type=int, metavar="N", help="rounds (CPU: 10 inference, 5 training; GPU: 30)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (PyTorch's choice)")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda or cuda:N (the GPU if there is one)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number, the machine and the versions")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw images per second (png, svg, pdf)")


@dataclass(frozen=True)
class Options:
    """The command's arguments, checked and with the device's defaults."""

    models: list[str]
    modes: list[str]
    batch_size: int
    resolution: int
    dtype: str
    device: torch.device
    runs: int | None
    compile: bool
    images: Path | None
    json: Path | None
    plot: Path | None

    def rounds(self, task: Task) -> int:
        mode = "inference" if task.objective is None else "training"
        return self.runs or ROUNDS[self.device.type][mode]


@dataclass(frozen=True)
class Row:
    """What was measured of one contender; `failure` says why there is no time."""

    model: str
    mode: str
    contender: str
    images_per_second: float | None = None
    milliseconds: float | None = None
    quartiles: tuple[float, float] | None = None
    samples: list[float] | None = None
    peak_memory_bytes: int | None = None
    ratio_to_eager: float | None = None
    parity: list[Parity] | None = None
    failure: str | None = None


def check_options(arguments: argparse.Namespace) -> Options:
    """Checks every argument before any work; a wrong one raises `CommandError`."""
    device = find_device(arguments.device)
    on_gpu = device.type == "cuda"
    batch_size = arguments.batch_size
    dtypes = None if arguments.dtype is None else [arguments.dtype]
    if arguments.runs is not None:
        at_least("--runs", arguments.runs, 1)
    if arguments.threads is not None:
        torch.set_num_threads(at_least("--threads", arguments.threads, 1))
    return Options(
        models=names("--model", arguments.model, list_models(), ["convnext_tiny"]),
        modes=names("--mode", arguments.mode, MODES, ["inference", "training"]),
        batch_size=at_least("--batch-size", batch_size, 1) if batch_size is not None else 128 if on_gpu else 8,
        resolution=at_least("--resolution", arguments.resolution, MINIMUM_RESOLUTION),
        dtype=names("--dtype", dtypes, DTYPES, ["bfloat16" if on_gpu else "float32"])[0],
        device=device,
        runs=arguments.runs,
        compile=not arguments.no_compile,
        images=arguments.images,
        json=writable("--json", arguments.json),
        plot=writable("--plot", arguments.plot),
    )


def resident_bytes(module: nn.Module, optimizer: torch.optim.Optimizer | None) -> int:
    """Bytes of the weights and of the optimizer's state."""
    tensors = [*module.parameters(), *module.buffers()]
    if optimizer is not None:
        tensors += [value for state in optimizer.state.values() for value in state.values()]
    return sum(tensor.nbytes for tensor in tensors)


class TaskRun:
    """Prepares, checks and times the contenders of one task."""

    def __init__(self, task: Task, with_compile: bool) -> None:
        self.task = task
        self.modules = {OURS: task.contender(task.ours), EAGER: task.contender(task.reference)}
        self.works: dict[str, Work] = {}
        self.optimizers: dict[str, torch.optim.Optimizer | None] = {}
        self.failures: dict[str, str] = {}
        self.parity = check_parity(task, self.modules)
        if failure := parity_failure(self.parity):
            self.failures[OURS] = failure
        if with_compile:
            self.modules[COMPILED] = task.contender(task.reference)
        for name, module in self.modules.items():
            if name not in self.failures:
                self._prepare(name, module)

    def _prepare(self, name: str, module: nn.Module) -> None:
        work, optimizer = self.task.work(module)
        if name == COMPILED:
            torch.compiler.reset()
            try:
                module.compile()
                work(self.task.inputs)
            except Exception as error:  # whatever the compiler runs into is a result, not the end of the benchmark
                self.failures[name] = f"torch.compile failed: {first_line(error)}"
                return
        self.works[name], self.optimizers[name] = work, optimizer

    def rows(self, timings: dict[str, Timing]) -> Iterator[Row]:
        """One row for each contender; the peak of memory is measured here, in a call of its own."""
        task = self.task
        for name, module in self.modules.items():
            parity = self.parity if name == OURS else None
            row = Row(task.model, task.name, name, parity=parity, failure=self.failures.get(name))
            if name in self.failures:
                yield row
                continue
            timing = timings[name]
            yield replace(
                row,
                images_per_second=len(task.inputs) / timing.median * 1e3,
                milliseconds=timing.median,
                quartiles=timing.quartiles,
                samples=timing.samples,
                peak_memory_bytes=resident_bytes(module, self.optimizers[name])
                + peak_memory(self.works[name], task.inputs),
                ratio_to_eager=timing.speedup_over(timings[EAGER]),
            )


def _task_count(options: Options) -> int:
    stages = {model: 1 if "isotropic" in model else 4 for model in options.models}
    return sum((mode != "block") or 2 * stages[model] for model in options.models for mode in options.modes)


def run_tasks(options: Options, photographs: Photographs) -> list[Row]:
    """Runs every task of every model, with a progress bar on stderr; after each the file has what there is."""
    images = crop_batch(photographs, options.batch_size, options.resolution).to(options.device)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    rows: list[Row] = []
    with Progress(*columns, console=console(stderr=True)) as progress:
        bar, done = progress.add_task("", total=_task_count(options)), 0
        for model in options.models:
            for task in tasks(model, options.modes, images, DTYPES[options.dtype]):
                label = f"{model}, {task.name}"
                progress.update(bar, description=f"{label}: parity and compilation" if options.compile else label)
                run = TaskRun(task, options.compile)
                rounds = options.rounds(task)
                progress.update(bar, description=f"{label}: {rounds} rounds")
                advance = partial(progress.advance, bar, 1 / (rounds * len(run.works)))
                rows += run.rows(measure(run.works, task.inputs, rounds, advance))
                if options.json is not None:
                    save_json(options.json, report(rows, options, photographs))
                done += 1
                progress.update(bar, completed=done)
    return rows


def _cells(row: Row) -> list[str]:
    if row.failure is not None or row.milliseconds is None or row.quartiles is None:
        return [row.mode, row.contender, "[red]failed[/red]"]
    lower, upper = row.quartiles
    error = max((check.error for check in row.parity), default=None) if row.parity else None
    return [
        row.mode,
        row.contender,
        f"{row.images_per_second:.1f}",
        f"{row.milliseconds:.2f}",
        f"{lower:.2f} - {upper:.2f}",
        f"{(row.peak_memory_bytes or 0) / 2**20:.0f}",
        f"{row.ratio_to_eager:.2f}x",
        "" if error is None else f"{error:.1e}",
    ]


def show(rows: Sequence[Row], options: Options, target: Console) -> None:
    """Prints one table for each model."""
    for model in options.models:
        title = f"{model}, batch {options.batch_size} at {options.resolution}, {options.dtype}"
        table = Table(title=f"{title}\n{device_name(options.device)}", title_style="bold")
        table.add_column("mode")
        table.add_column("contender")
        for column in ("images/s", "ms", "quartiles, ms", "peak MiB", "ratio", "error"):
            table.add_column(column, justify="right")
        of_model = [row for row in rows if row.model == model]
        for _, of_mode in groupby(of_model, key=lambda row: row.mode):
            for row in of_mode:
                table.add_row(*_cells(row), style="bold" if row.contender == OURS else None)
            table.add_section()
        target.print(table)
        for row in of_model:
            if row.failure is not None:
                target.print(f"{row.mode}, {row.contender}: {row.failure}", style="red", markup=False)


def report(rows: Sequence[Row], options: Options, photographs: Photographs) -> dict[str, Any]:
    """Everything as plain data for JSON."""
    arguments = {name: value for name, value in vars(options).items()}
    arguments |= {
        key: str(arguments[key]) for key in ("device", "images", "json", "plot") if arguments[key] is not None
    }
    return {
        "arguments": arguments,
        "device": device_name(options.device),
        **provenance(),
        "images": {"used": list(photographs.images), "skipped": photographs.skipped},
        "results": [asdict(row) for row in rows],
        "passed": all(row.contender != OURS or row.failure is None for row in rows),
    }


def run(arguments: argparse.Namespace) -> int:
    """Runs the benchmark; 1 where ours disagrees with PyTorch."""
    options = check_options(arguments)
    photographs = load_photographs(options.images, options.batch_size)
    if options.plot is not None:
        from convnext_kernels.cli.plot import check_format, draw

        check_format(options.plot)
    messages = console(stderr=True)
    for name, reason in photographs.skipped.items():
        messages.print(f"skipped {name}: {reason}", style="yellow", markup=False)
    with full_float32():
        rows = run_tasks(options, photographs)
    show(rows, options, console())
    content = report(rows, options, photographs)
    if options.json is not None:
        write_json(options.json, content)
    if options.plot is not None:
        draw(options.plot, rows, options, photographs)
    return 0 if content["passed"] else 1
