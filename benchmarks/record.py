"""The file that `python -m benchmarks` writes: what a part measured in one form for all, and reading it back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from benchmarks.reporting import Figure, Row, Target
from convnext_kernels.cli.errors import CommandError
from convnext_kernels.cli.tasks import OURS as OURS_OF_BENCH

KIND, FORMAT = "convnext_kernels benchmarks", 1

MEASURED = tuple(field.name for field in fields(Row) if field.name not in ("shape", "case", "contender"))
COUNTED = ("bytes", "flops")
"""What is known of a case beyond what tells it from others."""

OURS = ("ours", "cuda", "triton", OURS_OF_BENCH)
"""How the names of our contenders begin; the others are peers and ceilings."""

BLOCK_MICROSECONDS = {False: 15, True: 30}
"""What the host side of a block's forward may take, without and with autograd."""

Record = dict[str, Any]
"""kind, format, state, the machine as `benchmarks.timing.header` gives it, parity (by operator that failed the reason),
and by its name each part: state, reason, what it does, seconds, results, unmeasured (by case the reason)."""


def is_ours(contender: str) -> bool:
    """Whether a contender is of this package."""
    return contender.startswith(OURS)


def result(row: dict[str, Any]) -> dict[str, Any]:
    """A row of `benchmarks.reporting` with its case's entries gathered, apart from what was measured and counted."""
    known = (*MEASURED, *COUNTED, "contender")
    case = {key: value for key, value in row.items() if key not in known and value is not None}
    return {"case": case, **{key: value for key, value in row.items() if key in known}}


def _figures(*figures: Figure) -> dict[str, Any]:
    row = Row("", {}, "", [figure for figure in figures if figure.value is not None])
    return row.as_dict()["figures"]


def depthwise_results(content: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Of the file of `benchmarks.depthwise`."""
    for row in content["results"]:
        targets = [row[name] and Target(row[name]) for name in ("of_copy_target", "over_pytorch_target")]
        figures = _figures(
            Figure("TB/s", row["terabytes_per_second"]),
            Figure("of copy", row["of_copy"], targets[0]),
            Figure("speedup over PyTorch", row["over_pytorch"], targets[1]),
        )
        case = {"mode": row["operation"], **{key: row[key] for key in ("dtype", "batch", "channels", "size")}}
        kept = {key: row.get(key) for key in (*MEASURED, *COUNTED, "contender")}
        yield {"case": case, **kept, "figures": figures}


def bench_results(content: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Of the file of `convnext-kernels bench`."""
    arguments = content.get("arguments", {})
    for row in content["results"]:
        figures = _figures(
            Figure("images/s", row["images_per_second"]),
            Figure("speedup over PyTorch eager", row["ratio_to_eager"] if is_ours(row["contender"]) else None),
        )
        case = {"mode": row["mode"], "model": row["model"], "dtype": arguments["dtype"]}
        case |= {"batch": arguments["batch_size"], "resolution": arguments["resolution"]}
        kept = {key: row.get(key) for key in (*MEASURED, "contender")}
        yield {"case": case, **kept, "peak_bytes": row["peak_memory_bytes"], "figures": figures}


def dispatch_results(content: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Of pytest-benchmark's file of tests/test_dispatch_overhead.py."""
    for benchmark in content.get("benchmarks", ()):
        name, autograd = benchmark["params"]["name"], benchmark["params"]["autograd"]
        median, *quartiles = (1e3 * benchmark["stats"][key] for key in ("median", "q1", "q3"))
        target = Target(BLOCK_MICROSECONDS[autograd], at_most=True) if name == "ConvNeXtBlock" else None
        case = {"mode": benchmark["group"], "operator": name, "autograd": autograd}
        figures = _figures(Figure("microseconds", 1e3 * median, target))
        times = {"milliseconds": median, "quartiles": quartiles, "failure": None}
        yield {"case": case, "contender": "ours", **times, "figures": figures}


def results(content: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Of a file of the benchmarks that use `benchmarks.reporting`."""
    yield from map(result, content["results"])


def refuse(row: dict[str, Any], operators: frozenset[str], failed: dict[str, str]) -> dict[str, Any]:
    """The row without the speeds of ours if an operator that it rests on failed parity in this run: null, and why."""
    reasons = [f"{name}: {failed[name]}" for name in sorted(operators & failed.keys())]
    if not reasons or not is_ours(row["contender"]):
        return row
    figures = {name: {**figure, "value": None, "met": None} for name, figure in row["figures"].items()}
    return {**row, "figures": figures, "refused": f"parity failed in this run, {'; '.join(reasons)}"}


def _is_time(row: dict[str, Any]) -> bool:
    """Whether a time is missing, or a number with its quartiles."""
    if row.get("milliseconds") is None:
        return True
    quartiles = row.get("quartiles")
    times = [row["milliseconds"], *(quartiles if isinstance(quartiles, list) else ())]
    return len(times) == 3 and all(isinstance(time, int | float) for time in times)


def _is_result(row: Any) -> bool:
    kinds = {"case": dict, "contender": str, "figures": dict}
    if not isinstance(row, dict) or not all(isinstance(row.get(key), of) for key, of in kinds.items()):
        return False
    figures = row["figures"].values()
    return _is_time(row) and all(isinstance(figure, dict) and "value" in figure for figure in figures)


def _is_part(part: Any) -> bool:
    kinds = {"state": str, "results": list}
    well_formed = isinstance(part, dict) and all(isinstance(part.get(key), of) for key, of in kinds.items())
    return well_formed and all(map(_is_result, part["results"]))


def load(path: Path) -> Record:
    """Reads a record; what is no such file raises `CommandError` naming it and the reason."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CommandError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CommandError(f"{path}: is no JSON, or not all of it: {error}") from error
    if not isinstance(content, dict) or content.get("kind") != KIND:
        raise CommandError(f"{path}: was not written by python -m benchmarks")
    if content.get("format") != FORMAT:
        raise CommandError(f"{path}: has format {content.get('format')!r}; accepted: {FORMAT}")
    parts = content.get("parts")
    if not isinstance(parts, dict) or not all(map(_is_part, parts.values())):
        raise CommandError(f"{path}: is damaged: parts or results are missing")
    return content


def rows(record: Record) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every result with the name of its part."""
    for name, part in record["parts"].items():
        for row in part["results"]:
            yield name, row


def label(case: dict[str, Any]) -> str:
    """A case in words: mode first, then its other entries, booleans by name where true."""
    words = []
    for key, value in case.items():
        if isinstance(value, bool):
            words += [key] if value else []
        elif key in ("batch", "resolution", "channels", "size", "tokens", "drop_path_rate"):
            words.append(
                f"{key.replace('_', ' ')} {value:,}" if key == "tokens" else f"{key.replace('_', ' ')} {value}"
            )
        else:
            words.append(str(value))
    return ", ".join(words)


def machine(record: Record) -> str:
    """Where and when a record was measured, in one line."""
    versions = record.get("versions") or {}
    parts = [
        str(record.get("device")),
        f"PyTorch {versions.get('torch')}",
        f"commit {str(record.get('commit'))[:10]}",
        str(record.get("date"))[:16].replace("T", " "),
    ]
    if record.get("driver"):
        parts.insert(1, f"driver {record['driver']}")
    return ", ".join(parts)
