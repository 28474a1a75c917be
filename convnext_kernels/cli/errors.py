"""What a command reports in one line instead of a traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection, Sequence
from functools import wraps
from importlib import import_module
from pathlib import Path
from types import ModuleType

EXTRA = "pip install 'convnext-kernels[bench]'"


class CommandError(Exception):
    """A command cannot start as it was asked to: one line on stderr, exit code 2."""


Main = Callable[[list[str] | None], int]
"""From arguments, those of the process where it gets none, to the exit code."""


def command(name: str) -> Callable[[Main], Callable[..., int]]:
    """Of a script's main function: a `CommandError` is one line on stderr, after that name, and exit code 2."""

    def decorate(main: Main) -> Callable[..., int]:
        @wraps(main)
        def run(arguments: list[str] | None = None) -> int:
            try:
                return main(arguments)
            except CommandError as error:
                print(f"{name}: {error}", file=sys.stderr)
                return 2

        return run

    return decorate


def optional(module: str) -> ModuleType:
    """Imports a module that only the extra `bench` brings; a missing one raises `CommandError` naming the extra."""
    try:
        return import_module(module)
    except ImportError as error:
        raise CommandError(f"{error}; {EXTRA} brings it") from error


def names(option: str, given: Sequence[str] | None, accepted: Collection[str], default: Sequence[str]) -> list[str]:
    """The names given to an option, repeated or separated by commas, each checked and listed once."""
    if given is None:
        return list(default)
    chosen = [name.strip() for item in given for name in item.split(",") if name.strip()]
    for name in chosen:
        if name not in accepted:
            raise CommandError(f"{option}: got {name!r}; accepted: {', '.join(accepted)}")
    if not chosen:
        raise CommandError(f"{option}: got nothing; accepted: {', '.join(accepted)}")
    return list(dict.fromkeys(chosen))


def at_least(option: str, value: int, minimum: int) -> int:
    """Checks a number given to an option."""
    if value < minimum:
        raise CommandError(f"{option}: got {value}; accepted: {minimum} or more")
    return value


def positive(option: str, value: float) -> float:
    """Checks a number given to an option; NaN is refused too."""
    if not value > 0:
        raise CommandError(f"{option}: got {value:g}; accepted: more than 0")
    return value


def writable(option: str, path: Path | None) -> Path | None:
    """Checks, before any work, that the folder of a file to be written exists and that files may be made in it."""
    if path is not None:
        folder = path.absolute().parent
        if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
            raise CommandError(f"{option}: cannot write {path}; accepted: a file in an existing, writable folder")
    return path


def first_line(error: Exception) -> str:
    """The type of an error and the first line of what it says."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
