"""Writes the figures of README.md from the stored results: `python -m benchmarks.readme`.

Between `<!-- results: FILE -->` and `<!-- end of results -->` stands the table of benchmarks/results/FILE, a JSON
written by `convnext-kernels bench --json`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
SECTION = re.compile(r"(<!-- results: (?P<file>\S+) -->\n).*?(<!-- end of results -->)", re.DOTALL)


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


def table(report: dict[str, Any]) -> str:
    """The Markdown table of one benchmark, and where and when it was measured."""
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


def filled(text: str) -> str:
    """The README's text with every section of results written anew."""

    def section(match: re.Match[str]) -> str:
        report = json.loads((ROOT / "benchmarks" / "results" / match["file"]).read_text())
        return f"{match[1]}\n{table(report)}\n\n{match[3]}"

    return SECTION.sub(section, text)


if __name__ == "__main__":
    README.write_text(filled(README.read_text()))
