"""Files that are there wholly or not at all, and logs that a resumed run takes up where its checkpoint stands."""

from __future__ import annotations

import csv
import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


def claim(folder: Path) -> TextIO:
    """Keeps other processes from claiming a folder while this one lives and has the returned file open.

    Raises:
        ValueError: another process has claimed it.
    """
    file = (folder / ".lock").open("w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"--output: another run is writing into {folder}; accepted: another folder") from None
    except OSError:  # some file systems have no locks
        pass
    return file


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to be written beside `path`, whose place it takes in one step, once it is on the disk."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class CsvLog:
    """A CSV file with a row for some of the steps.

    Args:
        path: the file; None: nothing is written.
        columns: its columns, of which "step" is one.
        before: rows of this step and later ones, of a run that went on after its checkpoint, are removed.
    """

    def __init__(self, path: Path | None, columns: Sequence[str], before: int) -> None:
        self.path, self.columns = path, list(columns)
        if path is None:
            return
        rows = read_log(path) if path.exists() else []
        with replacing(path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(row for row in rows if int(row["step"]) < before)

    def add(self, **row: object) -> None:
        if self.path is not None:
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, self.columns).writerow(row)


def read_log(path: Path) -> list[dict[str, str]]:
    """The rows of such a file; one that was cut off while it was written is left out."""
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if None not in row.values()]
