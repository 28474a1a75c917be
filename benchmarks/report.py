"""Makes one HTML file of a record of `python -m benchmarks`: all its pictures and tables, nothing from elsewhere."""

from __future__ import annotations

import argparse
import base64
import io
import sys
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.pictures import PICTURES, draw
from benchmarks.record import Record, is_ours, load
from convnext_kernels.cli.errors import CommandError, command, writable

DPI = 130
STATE_CLASSES = {"done": "good", "left out": "quiet"}

CSS = """
:root { color-scheme: light dark; --ink: #1d2329; --paper: #ffffff; --line: #d5dade; --quiet: #5d6873;
  --ours: #fbeaec; --bad: #a4161a; --good: #22762c; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7ea; --paper: #16191d; --line: #383f47; --quiet: #9aa5b1;
  --ours: #3a2127; --bad: #ff8a8e; --good: #83d28c; } }
body { color: var(--ink); background: var(--paper); font: 15px/1.45 system-ui, sans-serif; margin: 0 auto;
  max-width: 1200px; padding: 1.5rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
summary, h3 { font-size: 1rem; font-weight: 600; }
figure { margin: 1rem 0; } figure img { background: #ffffff; border-radius: 6px; max-width: 100%; padding: 8px;
  box-sizing: border-box; } figcaption, .quiet { color: var(--quiet); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .5rem 0; }
th, td { border-bottom: 1px solid var(--line); padding: .18rem .6rem; text-align: left; vertical-align: top; }
td.n, th.n { text-align: right; white-space: nowrap; } tr.ours { background: var(--ours); } .bad { color: var(--bad); }
.good { color: var(--good); } details { margin: .6rem 0; } summary { cursor: pointer; }
"""

Cell = tuple[str, str]
"""Escaped text and a class: n for a number, bad, good, or nothing."""


def _table(header: Sequence[Cell], lines: Iterable[tuple[str, Sequence[Cell]]]) -> str:
    """Lines are a class and cells."""

    def cells(tag: str, of_line: Sequence[Cell]) -> str:
        return "".join(f'<{tag} class="{kind}">{text}</{tag}>' for text, kind in of_line)

    body = "".join(f'<tr class="{kind}">{cells("td", of_line)}</tr>' for kind, of_line in lines)
    return (
        f'<div class="scroll"><table><thead><tr>{cells("th", header)}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _text(value: Any) -> Cell:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return escape(
        "" if value is None else f"{value:,}" if isinstance(value, int) and number else str(value)
    ), "n" * number


def _figure(figure: dict[str, Any] | None) -> Cell:
    if figure is None or figure["value"] is None:
        return "", "n"
    target = figure.get("target")
    against = f" ({'≤' if target['at_most'] else '≥'} {target['value']:g})" if target else ""
    verdict = {True: " good", False: " bad", None: ""}[figure.get("met")]
    return f"{figure['value']:,.4g}{against}", f"n{verdict}"


def _note(row: dict[str, Any]) -> Cell:
    """Why there is no time or no speedup, or how it was timed."""
    if reason := row.get("failure") or row.get("refused"):
        return escape(reason), "bad"
    return escape(f"without CUDA graphs: {row['no_graphs']}" if row.get("no_graphs") else ""), ""


def _times(row: dict[str, Any], weighed: bool) -> list[Cell]:
    """Median, quartiles and, where any result of the table has one, the peak of memory."""
    times, peak = ["", ""], row.get("peak_bytes")
    if row.get("milliseconds") is not None:
        lower, upper = row["quartiles"]
        times = [f"{row['milliseconds']:.4g}", f"{lower:.4g} to {upper:.4g}"]
    memory = ["" if peak is None else f"{peak / 2**20:,.0f}"] if weighed else []
    return [(text, "n") for text in [*times, *memory]]


def _results(results: Sequence[dict[str, Any]]) -> str:
    """The table of results that share mode and dtype; a column for every entry of their cases and every figure."""
    entries = [key for key in dict.fromkeys(k for row in results for k in row["case"]) if key not in ("mode", "dtype")]
    weighed = any(row.get("peak_bytes") is not None for row in results)
    figures = list(dict.fromkeys(name for row in results for name in row["figures"]))
    numbers = ["ms", "quartiles, ms", *(["peak MiB"] if weighed else []), *figures]
    header = [*((escape(name), "") for name in [*entries, "contender"]), *((escape(name), "n") for name in numbers)]
    lines = []
    for row in results:
        case = [_text(row["case"].get(key)) for key in entries]
        of_figures = [_figure(row["figures"].get(name)) for name in figures]
        cells = [*case, _text(row["contender"]), *_times(row, weighed), *of_figures, _note(row)]
        lines.append(("ours" if is_ours(row["contender"]) else "", cells))
    return _table([*header, ("", "")], lines)


def _part(name: str, part: dict[str, Any]) -> Iterator[str]:
    yield f"<h2>{escape(name)}</h2><p>{escape(part.get('does') or '')}</p>"

    def heading(row: dict[str, Any]) -> str:
        return ", ".join(str(row["case"][key]) for key in ("mode", "dtype") if key in row["case"])

    for title, group in groupby(sorted(part["results"], key=heading), key=heading):
        yield f"<details open><summary>{escape(title)}</summary>{_results(list(group))}</details>"
    unmeasured = part.get("unmeasured") or {}
    if unmeasured:
        items = "".join(f"<li>{escape(case)}: {escape(reason)}</li>" for case, reason in unmeasured.items())
        yield f"<h3>Not measured</h3><ul>{items}</ul>"
    tests = part.get("tests") or {}
    if tests:
        lines = [
            ("", [_text(operator), *map(_text, (of["passed"], of["skipped"], len(of["failed"])))])
            for operator, of in tests.items()
        ]
        header = [("operator", ""), ("passed", "n"), ("skipped", "n"), ("failed", "n")]
        yield _table(header, lines)


def png(figure: Any) -> bytes:
    """A figure as a PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def pictures(record: Record) -> dict[str, bytes | str]:
    """Every picture as a PNG, or why it cannot be drawn."""
    drawn: dict[str, bytes | str] = {}
    for name, picture in PICTURES.items():
        try:
            figure = draw(record, name)
        except CommandError as error:  # without matplotlib
            drawn[name] = str(error)
            continue
        drawn[name] = f"not drawn, it needs {picture.needs}" if figure is None else png(figure)
    return drawn


def _picture(name: str, drawn: bytes | str) -> str:
    title = escape(PICTURES[name].title)
    if isinstance(drawn, str):
        return f'<p class="quiet" id="{name}">{title}: {escape(drawn)}</p>'
    data = base64.b64encode(drawn).decode()
    image = f'<img alt="{title}" src="data:image/png;base64,{data}">'
    return f'<figure id="{name}">{image}<figcaption>{title}</figcaption></figure>'


def _machine(record: Record) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in (record.get("versions") or {}).items() if version)
    clocks = ", ".join(f"{name} {value}" for name, value in (record.get("clocks") or {}).items())
    entries = {
        "device": record.get("device"),
        "driver": record.get("driver"),
        "clocks, power, temperature at the start": clocks,
        "versions": versions,
        "commit": record.get("commit"),
        "date": record.get("date"),
        "run": record.get("state"),
    }
    lines = [("", [_text(name), (escape(str(value)), "")]) for name, value in entries.items() if value]
    return _table([("", ""), ("", "")], lines)


def _overview(record: Record) -> str:
    lines = []
    for name, part in record["parts"].items():
        state = (escape(part["state"]), STATE_CLASSES.get(part["state"], "bad"))
        cells = [_text(name), state, _text(part.get("reason")), _text(part.get("seconds")), _text(len(part["results"]))]
        lines.append(("", cells))
    header = [("part", ""), ("state", ""), ("", ""), ("seconds", "n"), ("results", "n")]
    refused = "".join(
        f'<p class="bad">No speedup is given for {escape(name)}: {escape(reason)}</p>'
        for name, reason in (record.get("parity") or {}).items()
    )
    return _table(header, lines) + refused


def page(record: Record, drawn: dict[str, bytes | str]) -> str:
    """The whole report."""
    title = f"convnext_kernels on {escape(str(record.get('device')))}"
    method = (
        "Medians with quartiles over rounds in which the contenders take turns; a speedup is the median over rounds of "
        "the other's time divided by ours. Ours is checked first, and gets no time where it is wrong."
    )
    body = [f"<h1>{title}</h1>", _machine(record), _overview(record), f'<p class="quiet">{method}</p>']
    body += [_picture(name, picture) for name, picture in drawn.items()]
    for name, part in record["parts"].items():
        if part["results"] or part.get("unmeasured") or part.get("tests"):
            body += _part(name, part)
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<style>{CSS}</style></head>\n<body>\n'
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def write(record: Record, path: Path, folder: Path | None = None) -> None:
    """Writes the report and, into a folder, its pictures; says so on stderr."""
    drawn = pictures(record)
    path.write_text(page(record, drawn), encoding="utf-8")
    print(f"wrote {path}", file=sys.stderr)
    for name, picture in drawn.items():
        if isinstance(picture, str):
            print(f"{name}: {picture}", file=sys.stderr)
        elif folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{name}.png").write_bytes(picture)
            print(f"wrote {folder / f'{name}.png'}", file=sys.stderr)


@command("report")
def main(arguments: list[str] | None = None) -> int:
    """Returns 0; 2 where a file cannot be read or written."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("record", type=Path, metavar="FILE.json")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="(FILE.html beside it)")
    parser.add_argument("--pictures", type=Path, metavar="DIR", help="write the pictures into this folder too")
    options = parser.parse_args(arguments)
    record = load(options.record)
    path = options.output or options.record.with_suffix(".html")
    writable("--output", path)
    try:
        write(record, path, options.pictures)
    except OSError as error:
        raise CommandError(str(error)) from error
    return 0


if __name__ == "__main__":
    sys.exit(main())
