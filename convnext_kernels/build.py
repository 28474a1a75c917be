"""What this installation was built with: the version, the compiled library and, if it cannot be used, why."""

import functools
import importlib
import importlib.metadata
import platform
from types import ModuleType
from typing import Any

import torch

__version__ = "0.1.0"

_LIBRARY = f"{__package__}._C"


@functools.cache
def _load() -> tuple[ModuleType | None, list[str]]:
    """The compiled library and the reasons against using it: one of the two is empty."""
    try:
        library = importlib.import_module(_LIBRARY)
    except ModuleNotFoundError as error:
        if error.name != _LIBRARY:
            raise
        return None, [f"the compiled library {_LIBRARY} is not built: it is built where nvcc is found on installation"]
    except ImportError as error:
        return None, [f"the compiled library {_LIBRARY} failed to import: {error}"]
    if library.version != __version__:
        built_for = f"the compiled library {_LIBRARY} was built for version {library.version}, this is {__version__}"
        return None, [f"{built_for}: install again"]
    return library, []


def compiled_library() -> ModuleType | None:
    """The compiled library `convnext_kernels._C`, imported on first use, or None; `missing_reasons` tells why."""
    return _load()[0]


def missing_reasons() -> list[str]:
    """Why the compiled library cannot be used: not built, failed to import, or of another version. Empty if it can."""
    return list(_load()[1])


def device_code(device: int) -> str:
    """What the compiled library holds for CUDA device number `device`.

    "machine code", "PTX" (translated by the driver on first use), or "none: reason" and "unavailable: reason".
    Creates the device's CUDA context.
    """
    library, reasons = _load()
    code, reason = ("none", reasons[0]) if library is None else library.device_code(device)
    return f"{code}: {reason}" if reason else code


def _triton_version() -> str | None:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


def build_info() -> dict[str, Any]:
    """What was built, and with what; needs neither a GPU nor the compiled library.

    Returns:
        version: of this package
        compiled_library: whether the compiled library can be used
        reason: why not, or None
        nvcc: release of the compiler that built it, or None
        architectures: list of those it holds machine code for, such as ["80", "90a"]
        ptx: the architecture whose PTX it holds for later devices, such as "90", or None
        python, torch, triton: versions; triton is None where it is not installed
        cuda_runtime: the CUDA release that torch was built with, or None
        device_code: {"cuda:0 (NAME)": what `device_code` says} for each visible GPU
    """
    library, reasons = _load()
    return {
        "version": __version__,
        "compiled_library": library is not None,
        "reason": None if library else reasons[0],
        "nvcc": library.nvcc if library else None,
        "architectures": library.architectures.split(",") if library else [],
        "ptx": library.ptx if library else None,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "triton": _triton_version(),
        "cuda_runtime": torch.version.cuda,
        "device_code": {
            f"cuda:{index} ({torch.cuda.get_device_name(index)})": device_code(index)
            for index in range(torch.cuda.device_count())
        },
    }
