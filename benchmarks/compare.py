"""Compares two records of `python -m benchmarks`: what got faster or slower, what appeared and what vanished.

A time has changed where the quartiles of both runs do not overlap; what lies closer is within the spread.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.record import Record, is_ours, label, load, machine, rows
from convnext_kernels.cli.errors import command
from convnext_kernels.cli.output import console

FASTER, SLOWER, LOST, GAINED = "faster", "slower", "lost its time", "gained a time"
APPEARED, VANISHED = "appeared", "vanished"
COLOURS = {FASTER: "green", SLOWER: "red", LOST: "red"}

Key = tuple[str, str, str]
"""Part, case in words, contender."""


@dataclass(frozen=True)
class Change:
    """What happened to one result; times in milliseconds, with quartiles, None where there are none."""

    key: Key
    verdict: str
    before: dict[str, Any] | None
    after: dict[str, Any] | None

    @property
    def speedup(self) -> float | None:
        if not (_timed(self.before) and _timed(self.after)):
            return None
        return self.before["milliseconds"] / self.after["milliseconds"]

    @property
    def is_regression(self) -> bool:
        return self.verdict in (SLOWER, LOST) and is_ours(self.key[-1])


def _timed(row: dict[str, Any] | None) -> bool:
    return row is not None and row.get("milliseconds") is not None and "refused" not in row


def _verdict(before: dict[str, Any] | None, after: dict[str, Any] | None) -> str | None:
    """None where nothing changed beyond the spread."""
    if before is None or after is None:
        return APPEARED if before is None else VANISHED
    if not (_timed(before) and _timed(after)):
        return LOST if _timed(before) else GAINED if _timed(after) else None
    (fast_before, slow_before), (fast_after, slow_after) = before["quartiles"], after["quartiles"]
    return FASTER if slow_after < fast_before else SLOWER if fast_after > slow_before else None


def by_key(record: Record) -> dict[Key, dict[str, Any]]:
    """The results of a record."""
    return {(part, label(row["case"]), row["contender"]): row for part, row in rows(record)}


def compare(before: Record, after: Record) -> Iterator[Change]:
    """Every change: those of the second record's results in its order, then what vanished."""
    old, new = by_key(before), by_key(after)
    for key in [*new, *(key for key in old if key not in new)]:
        verdict = _verdict(old.get(key), new.get(key))
        if verdict is not None:
            yield Change(key, verdict, old.get(key), new.get(key))


def _time(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    if not _timed(row):
        return row.get("failure") or row.get("refused") or "none"
    lower, upper = row["quartiles"]
    return f"{row['milliseconds']:.4g} ({lower:.4g} to {upper:.4g})"


def show(before: Record, after: Record, changes: list[Change]) -> None:
    """Prints both machines, every change and how many results stayed within the spread."""
    out = console()
    out.print(f"before: {machine(before)}\nafter:  {machine(after)}", markup=False)
    if before.get("device") != after.get("device"):
        out.print("[yellow]These are different devices: times differ for that reason alone.[/yellow]")
    table = Table(title="Changes beyond the spread; milliseconds, median (quartiles)")
    for column in ("part", "case", "contender", "before", "after"):
        table.add_column(column, overflow="fold")
    table.add_column("change", justify="right")
    for change in changes:
        speedup = "" if change.speedup is None else f" {change.speedup:.2f}x"
        colour = COLOURS.get(change.verdict, "yellow")
        times = (_time(change.before), _time(change.after))
        table.add_row(*change.key, *times, f"[{colour}]{change.verdict}{speedup}[/]")
    if changes:
        out.print(table)
    old, new = by_key(before), by_key(after)
    timed = sum(_timed(old.get(key)) and _timed(new[key]) for key in new)
    faster, slower = (sum(change.verdict == verdict for change in changes) for verdict in (FASTER, SLOWER))
    out.print(f"{faster} faster, {slower} slower, {timed - faster - slower} within the spread")


@command("compare")
def main(arguments: list[str] | None = None) -> int:
    """Returns 0; 1 where ours got worse and `--strict` asks for it; 2 where a file cannot be read."""
    description = (__doc__ or "").split("\n\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=description)
    parser.add_argument("before", type=Path, metavar="A.json")
    parser.add_argument("after", type=Path, metavar="B.json")
    parser.add_argument("--strict", action="store_true", help="exit with 1 where ours got slower or lost its time")
    options = parser.parse_args(arguments)
    before, after = load(options.before), load(options.after)
    changes = list(compare(before, after))
    show(before, after, changes)
    return 1 if options.strict and any(change.is_regression for change in changes) else 0


if __name__ == "__main__":
    sys.exit(main())
