"""Runs the parts one after the other and keeps what they measured in one file, whatever happens to them or to it."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from typing import IO, Any

import torch

from benchmarks import report
from benchmarks.parts import PARTS, Part
from benchmarks.readme import ROOT
from benchmarks.record import FORMAT, KIND, Record, is_ours, refuse, rows
from benchmarks.timing import clocks, find_gpu, header
from convnext_kernels.cli.errors import CommandError, names, positive, writable
from convnext_kernels.cli.output import save_json

MINUTES = 8.0
POLL_SECONDS, GRACE_SECONDS, PROGRESS_SECONDS = 0.5, 5.0, 15
START_UP = 0.85
"""A part that limits itself gets so much of its time: it takes some to start, and its last case may take longer."""

DONE, FAILED, STOPPED, INTERRUPTED = "done", "failed", "stopped", "interrupted"
LEFT_OUT, WAITING, RUNNING = "left out", "waiting", "running"
RESULTS = Path(__file__).parent / "results"


def default_path(device: torch.device | None) -> Path:
    """results/<processor or GPU>/<date and time>.json"""
    name = header(device)["device"].split(",")[0]
    folder = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return RESULTS / folder / f"{datetime.now(timezone.utc):%Y-%m-%d-%H%M%S}.json"


@contextmanager
def interruptible() -> Iterator[None]:
    """Within the context SIGTERM interrupts as Ctrl-C does, with its number."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt(number)

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _read(path: Path) -> dict[str, Any]:
    """What a part has written so far; nothing if that is not whole, as most write it in one step but not all."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {"results": [], "unmeasured": {}}


def _forward(stream: IO[str], last: deque[str], own_file: Path) -> None:
    """Shows a part's progress but not that it wrote its file, and keeps the last line to tell why it ended."""
    for line in stream:
        if line.strip() and str(own_file) not in line:
            print(f"    {line}", end="", file=sys.stderr, flush=True)
            last.append(line.strip())


def _end(process: subprocess.Popen[str]) -> None:
    """A part and what it started, first asked, then ended."""
    for number, patience in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, None)):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(patience)
            return


class Run:
    """A record that grows, and the file that always holds all of it."""

    def __init__(self, path: Path, parts: Sequence[Part], left_out: dict[str, str], minutes: float) -> None:
        device = find_gpu()
        self.path, self.minutes = path, minutes
        self.parts = [part for part in parts if part.name not in left_out]
        self.record: Record = {
            "kind": KIND,
            "format": FORMAT,
            "state": "running",
            **header(device, minutes=minutes),
            "clocks": clocks(device) if device is not None else None,
            "parity": {},
            "parts": {part.name: self._entry(part, left_out.get(part.name)) for part in parts},
        }

    @staticmethod
    def _entry(part: Part, why_left_out: str | None) -> dict[str, Any]:
        state = WAITING if why_left_out is None else LEFT_OUT
        return {
            **{"state": state, "reason": why_left_out, "does": part.does},
            **{"seconds": 0.0, "results": [], "unmeasured": {}},
        }

    def save(self) -> None:
        """Writes the record in one step."""
        save_json(self.path, self.record)

    def _absorb(self, part: Part, file: Path) -> None:
        """Takes over what a part has written so far; ours gets no speedup where parity failed."""
        content, entry = _read(file), self.record["parts"][part.name]
        for operator, tests in content.get("tests", {}).items():
            if failed := tests["failed"]:
                self.record["parity"][operator] = f"{len(failed)} tests failed, the first: {failed[0]}"
        entry |= {key: content[key] for key in ("unmeasured", "tests", "library") if key in content}
        entry["results"] = [
            refuse(row, part.operators(row["case"]), self.record["parity"]) for row in part.read(content)
        ]
        self.save()

    def _watch(self, part: Part, process: subprocess.Popen[str], file: Path, seconds: float) -> str | None:
        """Takes over results as they come, until the part ends; returns why it was ended, if it was."""
        start, seen, said = time.monotonic(), 0, 0
        while process.poll() is None:
            elapsed = int(time.monotonic() - start)
            if elapsed >= said + PROGRESS_SECONDS:
                said = elapsed
                kept = len(self.record["parts"][part.name]["results"])
                print(f"  {part.name}: {elapsed} of {seconds:.0f} s, {kept} results", file=sys.stderr, flush=True)
            with suppress(subprocess.TimeoutExpired):
                process.wait(POLL_SECONDS)
            if file.is_file() and file.stat().st_mtime_ns != seen:
                seen = file.stat().st_mtime_ns
                self._absorb(part, file)
            if process.poll() is None and time.monotonic() - start > seconds:
                return f"its time was up: {seconds:.0f} s"
        return None

    def measure(self, part: Part, seconds: float) -> None:
        """Runs a part for at most so long. An interruption ends it, and goes on to the caller."""
        entry, start = self.record["parts"][part.name], time.monotonic()
        entry["state"] = RUNNING
        limit = ("--minutes", f"{START_UP * seconds / 60:.3f}") if part.limits_itself else ()
        with TemporaryDirectory() as folder:
            file, last = Path(folder) / "part.json", deque[str](maxlen=1)
            command = [sys.executable, "-m", part.module, *part.arguments, *limit, part.output, str(file)]
            process = subprocess.Popen(
                command, cwd=ROOT, start_new_session=True, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
            )
            reader = Thread(target=_forward, args=(process.stderr, last, file), daemon=True)
            reader.start()
            try:
                entry["state"], entry["reason"] = STOPPED, self._watch(part, process, file, seconds)
            except KeyboardInterrupt:
                entry["state"], entry["reason"] = INTERRUPTED, "the run was interrupted"
                raise
            finally:
                _end(process)
                reader.join(GRACE_SECONDS)
                if entry["reason"] is None:
                    entry["state"], entry["reason"] = self._verdict(process.returncode, last)
                entry["seconds"] = round(time.monotonic() - start, 1)
                self._absorb(part, file)

    @staticmethod
    def _verdict(code: int, last: deque[str]) -> tuple[str, str | None]:
        """What a part's exit code says: 1 is a result, that something of ours is wrong."""
        if code in (0, 1):
            return DONE, None
        reason = last[-1] if last else "it said nothing"
        end = f"exit code {code}" if code > 0 else signal.Signals(-code).name
        return FAILED, f"ended with {end}: {reason}"

    def measure_all(self) -> int:
        """Runs every part; returns 0, or 128 and the number of the signal that interrupted the run."""
        end, shares = time.monotonic() + 60 * self.minutes, sum(part.minutes for part in self.parts)
        try:
            with interruptible():
                self.save()
                for part in self.parts:
                    seconds = max(0.0, end - time.monotonic()) * part.minutes / shares
                    shares -= part.minutes
                    print(f"{part.name}: at most {seconds:.0f} s", file=sys.stderr, flush=True)
                    self.measure(part, seconds)
        except KeyboardInterrupt as interruption:
            number = interruption.args[0] if interruption.args else signal.SIGINT
            self.record["state"] = f"interrupted by {signal.Signals(number).name}"
            self.save()
            return 128 + number
        self.record["state"] = "complete"
        self.save()
        return 0


def summary(record: Record) -> str:
    """Part by part, of those that were to run, what there is and, by reason, what is missing; operators that failed."""
    lines = []
    for name, part in record["parts"].items():
        if part["state"] == LEFT_OUT:
            continue
        failures = sum(bool(row["failure"]) for row in part["results"] if is_ours(row["contender"]))
        counts = f"{len(part['results'])} results" + (f", {failures} of ours without a time" if failures else "")
        reason = f": {part['reason']}" if part["reason"] else ""
        lines.append(f"  {name}: {part['state']}{reason} ({counts})")
        cases: dict[str, list[str]] = {}
        for case, why in part["unmeasured"].items():
            cases.setdefault(why, []).append(case)
        for why, (first, *others) in cases.items():
            lines.append(f"    not measured: {first}{f' and {len(others)} more' if others else ''}: {why}")
    lines += [f"  parity failed, no speedup for {name}: {why}" for name, why in record["parity"].items()]
    return "\n".join(lines)


def leave_out(parts: Sequence[Part], only: list[str] | None, has_gpu: bool) -> dict[str, str]:
    """Why parts are left out, by name: by default those that are not for this machine."""
    known = [part.name for part in parts]
    chosen = names("--only", only, known, known)
    reasons = {}
    for part in parts:
        if part.name not in chosen:
            reasons[part.name] = "not asked for"
        elif part.gpu and not has_gpu:
            reasons[part.name] = "needs an NVIDIA GPU that PyTorch can use; there is none"
        elif not part.gpu and has_gpu and only is None:
            reasons[part.name] = "for machines without a GPU"
    return reasons


def announce(run: Run, left_out: dict[str, str]) -> None:
    """Before anything is measured: what will be, on what, and how long it takes."""
    print(f"on {run.record['device']}, at most {run.minutes:g} minutes, results in {run.path}:")
    shares = sum(part.minutes for part in run.parts)
    for part in run.parts:
        print(f"  {part.name}: {part.does} (at most {part.minutes * run.minutes / shares:.1f} minutes)")
    for reason in dict.fromkeys(left_out.values()):
        print(f"  left out: {', '.join(name for name in left_out if left_out[name] == reason)} ({reason})")
    sys.stdout.flush()


def _parser(parts: Sequence[Part]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=f"{__doc__}")
    listed = ", ".join(part.name for part in parts)
    parser.add_argument("--only", nargs="+", metavar="PART", help=f"{listed} (all for this machine)")
    parser.add_argument("--minutes", type=float, default=MINUTES, metavar="N", help="for all parts (%(default)g)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="(benchmarks/results/<device>/<date>.json)")
    return parser


def main(arguments: list[str] | None = None, parts: Sequence[Part] = PARTS) -> int:
    """Returns 0; 2 where the arguments do not fit; 128 and the signal's number where one interrupted the run."""
    options = _parser(parts).parse_args(arguments)
    try:
        positive("--minutes", options.minutes)
        device = find_gpu()
        left_out = leave_out(parts, options.only, device is not None)
        path = options.json or default_path(device)
        if path.suffix != ".json":  # the report and its pictures take the other endings
            raise CommandError(f"--json: got {path.name!r}; accepted: a file ending in .json")
        path.parent.mkdir(parents=True, exist_ok=True)
        writable("--json", path)
    except (CommandError, OSError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    run = Run(path, parts, left_out, options.minutes)
    announce(run, left_out)
    code = run.measure_all()
    kept = sum(1 for _ in rows(run.record))
    print(f"{run.record['state']}: {kept} results in {path}\n{summary(run.record)}", flush=True)
    if code == 0:
        report.write(run.record, path.with_suffix(".html"), path.with_suffix(""))
    else:
        print(f"python -m benchmarks.report {path} makes a report of what there is")
    return code
