"""Runs the operators' tests that are marked `gpu`, for a limited time, and says which operators failed.

What tells most of an operator comes first; among equals the order is random and fixed, so that every operator has its
share of what there is time for.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pytest

from benchmarks.readme import ROOT
from convnext_kernels.cli.errors import CommandError, command, positive, writable
from convnext_kernels.cli.output import save_json
from convnext_kernels.functional import OPERATORS

MOST_PROCESSES = 16
"""Most of a test's time is that of a processor: compiling kernels and drawing arguments."""

LATER = ("test_every_published_width_on_a_gpu", "test_offsets_past_32_bits")
"""The same kernels at more widths; what takes most of the GPU's memory, so that one process waits for another."""

FILES = {f"test_{function.__module__.split('.')[-1]}.py": name for name, function in OPERATORS.items()}


def operator_of(nodeid: str) -> str:
    """The operator that a test is of: what its parameters begin with, or its file's."""
    match = re.search(r"\[(\w+) ", nodeid)
    if match and match[1] in OPERATORS:
        return match[1]
    file = nodeid.split("::")[0].split("/")[-1]
    return FILES.get(file, file)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The same order in every process."""
    random.Random(0).shuffle(items)
    later = {name: place for place, name in enumerate(LATER, start=1)}
    items.sort(key=lambda item: later.get(item.name.partition("[")[0], 0))


@dataclass
class Tests:
    """Of one operator."""

    passed: int = 0
    skipped: int = 0
    failed: list[str] = field(default_factory=list)


@dataclass
class Recorder:
    """A plugin that writes what came of every test as it comes, and ends the run when time is up."""

    path: Path | None
    deadline: float
    tests: dict[str, Tests] = field(default_factory=dict)
    unmeasured: dict[str, str] = field(default_factory=dict)

    def save(self) -> None:
        """Writes everything, if there is a file for it."""
        tests = {name: asdict(tests) for name, tests in sorted(self.tests.items())}
        if self.path is not None:
            save_json(self.path, {"results": [], "unmeasured": self.unmeasured, "tests": tests})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        tests = self.tests.setdefault(operator_of(report.nodeid), Tests())
        if report.failed:
            tests.failed.append(report.nodeid)
        elif report.skipped:
            tests.skipped += 1
        elif report.when == "call":
            tests.passed += 1
        else:
            return
        out_of_time = time.monotonic() > self.deadline
        if out_of_time:
            self.unmeasured["the other tests"] = "left out for the time"
        self.save()
        if out_of_time:
            pytest.exit("time is up", returncode=0)


def run(path: Path | None, minutes: float, tests: list[str]) -> Recorder:
    """Runs those tests that are marked `gpu`."""
    recorder = Recorder(path, time.monotonic() + 60 * minutes)
    processes = str(min(MOST_PROCESSES, os.cpu_count() or 1))
    options = ["-q", "-m", "gpu", "--no-header", "-p", "benchmarks.gpu_tests", f"--rootdir={ROOT}"]
    in_order = ["-n", processes, "--dist", "load", "--maxschedchunk", "1"]  # others give each process a part of it
    code = pytest.main([*options, *in_order, *tests], plugins=[recorder])
    if not recorder.tests:
        recorder.unmeasured["tests"] = f"none ran, pytest ended with {int(code)}"
        recorder.save()
    return recorder


@command("gpu_tests")
def main(arguments: list[str] | None = None) -> int:
    """Returns 0; 1 where a test failed; 2 where the arguments do not fit."""
    description = (__doc__ or "").split("\n\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_tests", description=description)
    parser.add_argument("tests", nargs="*", default=[str(ROOT / "tests" / "ops")], help="files or folders (tests/ops)")
    parser.add_argument("--minutes", type=float, default=2, metavar="N", help="end the run then (%(default)g)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what passed and failed")
    options = parser.parse_args(arguments)
    path, minutes = writable("--json", options.json), positive("--minutes", options.minutes)
    for test in options.tests:
        if not Path(test.partition("::")[0]).exists():
            raise CommandError(f"tests: got {test!r}; accepted: existing files or folders")
    recorder = run(path, minutes, options.tests)
    return 1 if any(tests.failed for tests in recorder.tests.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
