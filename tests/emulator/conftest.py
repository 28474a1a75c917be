"""The compiled library of the emulator, built once for all tests of a run."""

import fcntl
import os
from pathlib import Path

import pytest
from emulation import compile_library


@pytest.fixture(scope="session")
def library(tmp_path_factory) -> Path:
    """Built by the first worker that asks for it; the others wait."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # a worker's folder lies in the run's
    folder = folder / "library"
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        library = folder / "_C.so"
        return library if library.exists() else compile_library(folder)
