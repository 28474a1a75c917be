"""Writes the figures of README.md from the stored results: `python -m benchmarks.readme`.

Between `<!-- results: FILE -->` and `<!-- end of results -->` stands the table of benchmarks/results/FILE, a JSON
written by `convnext-kernels bench --json`, or of the whole models in a record of `python -m benchmarks`; between
`<!-- operators: FILE -->` and `<!-- end of operators -->` that of a record's operators and blocks; between
`<!-- predicted: FILE -->` and `<!-- end of predicted -->` what `benchmarks.predicted` makes of a report by
`benchmarks.static_report`.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import predicted, record
from convnext_kernels.cli.errors import CommandError
from convnext_kernels.cli.tasks import OURS

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
OPERATOR_PARTS = ("depthwise", "mlp", "blocks")
SECTION = re.compile(
    r"(?P<start><!-- (?P<kind>results|operators|predicted): (?P<file>\S+) -->\n).*?"
    r"(?P<end><!-- end of (?P=kind) -->)",
    re.DOTALL,
)


def _row(row: dict[str, Any]) -> str:
    if row["failure"] is not None:
        return f"| {row['mode']} | {row['contender']} | {row['failure']} | | | |"
    lower, upper = row["quartiles"]
    cells = (
        row["mode"],
        row["contender"],
        f"{row['images_per_second']:.1f}",
        f"{row['milliseconds']:.0f} ({lower:.0f} to {upper:.0f})",
        f"{row['peak_memory_bytes'] / 2**20:.0f}",
        f"{row['ratio_to_eager']:.2f}x",
    )
    return f"| {' | '.join(cells)} |"


def _bench_table(report: dict[str, Any]) -> str:
    """One run of `convnext-kernels bench`, and where and when it was measured."""
    arguments, versions = report["arguments"], report["versions"]
    size = f"batch {arguments['batch_size']} at {arguments['resolution']} px, {arguments['dtype']}"
    lines = [
        f"{', '.join(arguments['models'])}, {size}, on {report['device']} (PyTorch {versions['torch']}, "
        f"{report['date'][:10]}, commit {report['commit'][:10]}):",
        "",
        "| mode | contender | images/s | ms, median (quartiles) | peak MiB | against eager |",
        "| --- | --- | --: | --: | --: | --: |",
        *map(_row, report["results"]),
    ]
    return "\n".join(lines)


def _record_rows(content: dict[str, Any]) -> Iterator[str]:
    """Ours of every whole model that has a time."""
    for _, row in record.rows(content):
        is_model = "model" in row["case"] and not row["case"]["mode"].startswith("block")
        if not (is_model and record.is_ours(row["contender"]) and "images/s" in row["figures"]):
            continue
        values = {name: figure["value"] for name, figure in row["figures"].items()}
        rate = row.get("refused") or f"{values['images/s']:.0f}"
        over = (f"{value:.2f}x {name.removeprefix('speedup over ')}" for name, value in values.items() if value)
        name = f"{record.label(row['case'])}, {row['contender']}".removesuffix(f", {OURS}")
        yield f"| {name} | {rate} | {', '.join(text for text in over if 'images/s' not in text)} |"


def _record_table(content: dict[str, Any]) -> str:
    """The whole models of a record, and where and when they were measured."""
    head = ["| ours | images/s | beside |", "| --- | --: | --- |"]
    return "\n".join([f"{record.machine(content)}:", "", *head, *_record_rows(content)])


def _operator_rows(content: dict[str, Any]) -> Iterator[str]:
    """The fastest of ours in every case of an operator or a block, with its figures."""
    cases: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for part, row in record.rows(content):
        if part in OPERATOR_PARTS and row.get("milliseconds") is not None and record.is_ours(row["contender"]):
            cases.setdefault((part, record.label(row["case"])), []).append(row)
    for (part, label), ours in cases.items():
        row = min(ours, key=lambda row: row["milliseconds"])
        values = {name: figure["value"] for name, figure in row["figures"].items()}
        figures = row.get("refused") or ", ".join(f"{name} {value:.2f}" for name, value in values.items() if value)
        time = "" if "refused" in row else f"{row['milliseconds']:.4g}"
        yield f"| {part}: {label} | {row['contender']} | {time} | {figures} |"


def _operator_table(content: dict[str, Any]) -> str:
    """The operators of a record, and where and when they were measured."""
    head = ["| operator | fastest of ours | ms | |", "| --- | --- | --: | --- |"]
    return "\n".join([f"{record.machine(content)}:", "", *head, *_operator_rows(content)])


def table(kind: str, path: Path) -> str:
    """The Markdown table of a stored result."""
    if kind == "predicted":
        return predicted.table(path)
    if kind == "operators":
        return _operator_table(record.load(path))
    content = json.loads(path.read_text(encoding="utf-8"))
    return _record_table(record.load(path)) if content.get("kind") == record.KIND else _bench_table(content)


def filled(text: str) -> str:
    """The README's text with every section written anew."""

    def section(match: re.Match[str]) -> str:
        return f"{match['start']}\n{table(match['kind'], RESULTS / match['file'])}\n\n{match['end']}"

    return SECTION.sub(section, text)


def main() -> int:
    """Returns 0; 2, and README.md stays as it is, where a result is missing or cannot be read."""
    try:
        text = filled(README.read_text())
    except (CommandError, OSError, ValueError) as error:
        print(f"readme: {error}", file=sys.stderr)
        return 2
    README.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
