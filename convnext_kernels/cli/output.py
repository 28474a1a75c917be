"""Where results go: the terminal and JSON files."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

PIPE_WIDTH = 140


def console(stderr: bool = False) -> Console:
    """A console as wide as the terminal; into a pipe or file, wide enough that no table breaks."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() else PIPE_WIDTH, highlight=False)


def _finite(content: Any) -> Any:
    """JSON has no NaN and no infinity: null stands for them."""
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    if isinstance(content, float) and not math.isfinite(content):
        return None
    return content


def to_json(content: Any) -> str:
    """Strict JSON, indented."""
    return json.dumps(_finite(content), indent=2, allow_nan=False)


def save_json(path: Path, content: Any) -> None:
    """Writes strict JSON in one step: whoever reads or interrupts finds the old file or the new one, never a part."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(to_json(content) + "\n", encoding="utf-8")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """`save_json`, and says so on stderr."""
    save_json(path, content)
    print(f"wrote {path}", file=sys.stderr)
