"""The machine, the versions and the commit that a result belongs to."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import convnext_kernels
from convnext_kernels.cli.errors import CommandError


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    """The versions that a result depends on; None for what is not installed."""
    return {
        "convnext_kernels": convnext_kernels.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _installed("triton"),
        "cuda": torch.version.cuda,
    }


def cpu_name() -> str:
    """The processor's name as the operating system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def gpus() -> list[dict[str, Any]]:
    """Name, compute capability, memory and L2 cache of each visible GPU."""
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "index": index,
                "name": properties.name,
                "capability": [properties.major, properties.minor],
                "memory_bytes": properties.total_memory,
                "l2_cache_bytes": properties.L2_cache_size,
            }
        )
    return found


def machine() -> dict[str, Any]:
    """The hardware and the operating system."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def device_name(device: torch.device) -> str:
    """The name of the GPU, or of the processor with the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {torch.get_num_threads()} threads"


@cache
def commit() -> str | None:
    """The commit of the checkout that the package runs from, "-dirty" where it was changed; None outside a checkout.

    As it was when first asked: results that are then stored there change it.
    """
    folder = Path(convnext_kernels.__file__).parent
    tracked = ["git", "ls-files", "--error-unmatch", "__init__.py"]
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        subprocess.run(tracked, cwd=folder, check=True, capture_output=True)
        return subprocess.run(describe, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def provenance() -> dict[str, Any]:
    """Everything that a stored result needs to be traced: machine, versions, commit and date."""
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"machine": machine(), "versions": versions(), "commit": commit(), "date": date}


def find_device(name: str | None) -> torch.device:
    """The device asked for, by default the current GPU or else the CPU."""
    accepted = "accepted: cpu" + "".join(f", cuda:{index}" for index in range(torch.cuda.device_count()))
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise CommandError(f"--device: got {name!r}; {accepted}") from error
    if device.type == "cuda" and torch.cuda.is_available():
        index = torch.cuda.current_device() if device.index is None else device.index
        if index < torch.cuda.device_count():
            return torch.device("cuda", index)
    elif device.type == "cpu":
        return torch.device("cpu")
    raise CommandError(f"--device: got {name!r}; {accepted}")
