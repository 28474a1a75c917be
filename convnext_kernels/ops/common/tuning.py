"""Launch configurations: the measured one of a GPU where a table has it, else the rule's.

Tables are JSON files named after the GPU: the package's own in `tables/`, and over them the user's, which
`convnext-kernels tune` writes. They are read at the first launch on that GPU, never at import, and nothing is measured
here. Only a kernel's own candidates are accepted, so that no table, however edited, can make a kernel wrong.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

FORMAT = 2
"""Raised where kernels change so that what was measured before holds no longer."""

OPERATORS = Path(__file__).resolve().parents[1]
PACKAGE_FOLDER = OPERATORS.parent / "tables"
FOLDER_VARIABLE = "CONVNEXT_KERNELS_TABLES"

DTYPES = ("float16", "bfloat16", "float32")
LARGEST_SIZE = 2**20
"""Of the numbers in a key."""

Config = TypeVar("Config")
Key = tuple[int, ...]
Name = tuple[str, str, Key]
"""What an entry is found by: kernel, dtype and key."""

_tunables: dict[str, Tunable[Any]] = {}


class Tunable(Generic[Config]):
    """A kernel's launch configurations.

    Called with the kernel's input and the rule's arguments, that is the key, it gives the configuration to launch with.
    Nothing that changes from batch to batch may be in the key, unless in two or three classes.

    Args:
        name: folder.kernel.
        rule: from integers the default, a frozen dataclass; None where the kernel is not to be launched at all.
        candidates: from the same integers what may be faster than that; each gives the same results within rounding.
    """

    def __init__(
        self, name: str, rule: Callable[..., Config], candidates: Callable[..., Sequence[Config | None]]
    ) -> None:
        self.name, self.rule, self._candidates = name, rule, candidates
        self.parameters = tuple(inspect.signature(rule).parameters)
        self.tried: Config | None = None
        _tunables[name] = self

    def __call__(self, input: Tensor, *key: int) -> Config:
        return _config(self, input.device, input.dtype, key) if self.tried is None else self.tried

    def __reduce__(self) -> tuple[Callable[[str], Tunable[Any]], tuple[str]]:
        """Another process gets its own of the same name, which is what its kernels ask."""
        return tunable_of, (self.name,)

    def candidates(self, key: Key) -> list[Any]:
        """Every configuration that is accepted for a key, the rule's first; none where the rule gives None."""
        default = self.rule(*key)
        return [] if default is None else list(dict.fromkeys((default, *self._candidates(*key))))


@contextmanager
def trying(tunable: Tunable[Config], config: Config) -> Iterator[None]:
    """Within the context every launch of a kernel, in any thread, takes this configuration."""
    tunable.tried = config
    try:
        yield
    finally:
        tunable.tried = None


@cache
def tunables() -> Mapping[str, Tunable[Any]]:
    """All there are, by name; those of operators that have not run yet are imported here."""
    for path in sorted(OPERATORS.glob("*/*configs.py")):
        import_module(f"..{path.parent.name}.{path.stem}", __package__)
    return _tunables


def tunable_of(name: str) -> Tunable[Any]:
    """The one of that name."""
    return tunables()[name]


@cache
def _config(tunable: Tunable[Any], device: torch.device, dtype: torch.dtype, key: Key) -> Any:
    if device.type == "cuda":
        entry = _table_in_use(device).entries.get((tunable.name, str(dtype).removeprefix("torch."), key))
        if entry is not None:
            return entry.config
    return tunable.rule(*key)


@dataclass(frozen=True)
class Entry:
    """A measured configuration; `speedup` over the rule's, None where the table does not say."""

    kernel: str
    dtype: str
    key: Key
    config: Any
    speedup: float | None = None

    @property
    def name(self) -> Name:
        return self.kernel, self.dtype, self.key


@dataclass(frozen=True)
class GpuTable:
    """A GPU's entries, the files that they come from, and what in those was ignored and why."""

    entries: Mapping[Name, Entry]
    files: Sequence[Path]
    problems: Sequence[str]


def _parse(record: Any) -> Entry:
    """Checks an entry; ValueError says what is wrong with it."""
    if not isinstance(record, dict) or not {"kernel", "dtype", "key", "config"} <= record.keys():
        raise ValueError("accepted: kernel, dtype, key and config")
    tunable, dtype, sizes = tunables().get(str(record["kernel"])), record["dtype"], record["key"]
    if tunable is None:
        raise ValueError(f"kernel: got {record['kernel']!r}; accepted: {', '.join(tunables())}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype: got {dtype!r}; accepted: {', '.join(DTYPES)}")
    if not isinstance(sizes, dict) or sizes.keys() != set(tunable.parameters):
        raise ValueError(f"key: got {sizes!r}; accepted: {', '.join(tunable.parameters)}")
    key = tuple(sizes[parameter] for parameter in tunable.parameters)
    if not all(type(size) is int and 0 <= size <= LARGEST_SIZE for size in key):
        raise ValueError(f"key: got {sizes!r}; accepted: integers from 0 to {LARGEST_SIZE}")
    for config in tunable.candidates(key):
        if asdict(config) == record["config"]:
            return Entry(tunable.name, dtype, key, config, record.get("speedup"))
    raise ValueError(f"config: got {record['config']!r}; accepted: the candidates of {tunable.name}")


def read_table(path: Path, gpu: str) -> GpuTable:
    """The entries of a file for the GPU of that name; an empty table, without a problem, where there is no file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return GpuTable({}, [], [])
    except (OSError, ValueError, RecursionError) as error:
        return GpuTable({}, [], [f"{path} cannot be read: {error}"])
    if not isinstance(content, dict) or not isinstance(content.get("entries"), list):
        return GpuTable({}, [], [f"{path} is not a table of launch configurations"])
    for field, accepted in (("format", FORMAT), ("gpu", gpu)):
        if content.get(field) != accepted:
            return GpuTable({}, [], [f"{path}: {field}: got {content.get(field)!r}; accepted: {accepted!r}"])
    entries, problems = {}, []
    for number, record in enumerate(content["entries"]):
        try:
            entry = _parse(record)
            entries[entry.name] = entry
        except ValueError as error:
            problems.append(f"{path}: entry {number}: {error}")
    return GpuTable(entries, [path], problems)


def table_content(gpu: str, entries: Iterable[Entry], versions: Mapping[str, str | None]) -> dict[str, Any]:
    """A table as plain data for JSON.

    Args:
        versions: of what it was measured with; recorded, not compared.
    """
    records = [
        {**asdict(entry), "key": dict(zip(tunables()[entry.kernel].parameters, entry.key, strict=True))}
        for entry in sorted(entries, key=lambda entry: entry.name)
    ]
    return {"format": FORMAT, "gpu": gpu, "versions": dict(versions), "entries": records}


def user_folder() -> Path:
    """CONVNEXT_KERNELS_TABLES, or convnext_kernels in the user's cache: XDG_CACHE_HOME or ~/.cache."""
    if given := os.environ.get(FOLDER_VARIABLE):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "convnext_kernels"


def file_name(gpu: str) -> str:
    """NVIDIA H200 -> nvidia-h200.json"""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json"


@cache
def gpu_table(gpu: str) -> GpuTable:
    """What the package and, over it, the user have for a GPU."""
    package, user = (read_table(folder / file_name(gpu), gpu) for folder in (PACKAGE_FOLDER, user_folder()))
    return GpuTable(
        {**package.entries, **user.entries}, [*package.files, *user.files], [*package.problems, *user.problems]
    )


@cache
def _table_in_use(device: torch.device) -> GpuTable:
    table = gpu_table(torch.cuda.get_device_name(device))
    if table.problems:
        warnings.warn("launch configurations ignored: " + "; ".join(table.problems), stacklevel=2)
    return table


def forget_tables() -> None:
    """Tables are read again at the next launch."""
    for cached in (_config, gpu_table, _table_in_use):
        cached.cache_clear()
