"""Lets the CUDA launchers, compiled for the host, run what nvcc makes of their kernels, on tensors of the CPU."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sysconfig
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pybind11
import torch
from ptx.machine import Launch
from ptx.memory import GlobalMemory
from ptx.program import Program, kernels

from convnext_kernels.build import __version__

ROOT = Path(__file__).resolve().parents[2]
SOURCES, EMULATOR, HERE = ROOT / "csrc", ROOT / "tests" / "emulator", ROOT / "tests" / "ptx"
FOLDER = "CONVNEXT_KERNELS_PTX_OF_CUDA"
"""The environment variable with the folder that `build` has filled."""

LAUNCHER = ctypes.CFUNCTYPE(
    ctypes.c_bool,
    ctypes.c_size_t,
    ctypes.POINTER(ctypes.c_uint),
    ctypes.c_uint,
    ctypes.c_size_t,
    ctypes.POINTER(ctypes.c_void_p),
    ctypes.POINTER(ctypes.c_size_t),
    ctypes.c_size_t,
)
"""As include/common/launch.cuh has it."""


def _run(*command: object, given: str | None = None) -> str:
    result = subprocess.run(list(map(str, command)), input=given, capture_output=True, text=True)
    assert result.returncode == 0, f"{' '.join(map(str, command))}\n{result.stderr}"
    return result.stdout


def build(folder: Path, nvcc: str, compiler: str, architecture: str) -> Path:
    """The PTX of every source, and the library of the launchers, whose kernels nobody calls; returns its path."""
    sources = [source for source in SOURCES.glob("*/*.cu") if source.name != "build_info.cu"]
    includes = [f"-I{path}" for path in (HERE / "include", EMULATOR / "include", SOURCES)]
    headers = ["-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include")]
    options = ["-std=c++17", "-fPIC", "-Wno-unknown-pragmas", f'-DCONVNEXT_KERNELS_VERSION="{__version__}"']
    for_gpu = [nvcc, "-std=c++17", "-O3", "-ptx", f"-arch=sm_{architecture}", f"-I{SOURCES}"]
    for_host = [compiler, *options, *includes, *headers, "-x", "c++", "-c"]

    def compile_to(suffix: str, command: list[str], source: Path) -> Path:
        output = folder / f"{source.parent.name}_{source.stem}{suffix}"
        _run(*command, source, "-o", output)
        return output

    others = [SOURCES / "bindings.cpp", EMULATOR / "build_info.cpp", HERE / "host.cpp"]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [pool.submit(compile_to, ".o", for_host, source) for source in [*sources, *others]]
        for compiled in [pool.submit(compile_to, ".ptx", for_gpu, source) for source in sources]:
            compiled.result()
    library = folder / "_C.so"
    _run(compiler, "-shared", *(compiled.result() for compiled in objects), "-o", library)
    return library


def _plain(name: str) -> str:
    """A kernel's name without its arguments, the nameless namespace being called alike by all compilers."""
    name = re.sub(r"\(anonymous namespace\)|_GLOBAL__N__\w+", "_", name.removeprefix("void "))
    return re.sub(r"\((?:convnext_kernels::|float const).*\)$", "", name)


def _programs(folder: Path) -> dict[str, Program]:
    """Every kernel by its plain name."""
    found = [program for path in sorted(folder.glob("*.ptx")) for program in kernels(path.read_text())]
    names = _run("c++filt", given="\n".join(program.name for program in found)).splitlines()
    programs = dict(zip(map(_plain, names), found, strict=True))
    assert len(programs) == len(found)
    return programs


def _symbols(library: Path) -> dict[str, int]:
    """Places in a library by plain names."""
    lines = (line.split(maxsplit=2) for line in _run("nm", "-C", "--defined-only", library).splitlines())
    return {_plain(name): int(place, 16) for place, _, name in lines}


class _Tensors:
    """Those of the calls since the last launch: only their addresses reach the library."""

    def __init__(self) -> None:
        self._known: list[torch.Tensor] = []
        self._launched = False

    def address(self, tensor: torch.Tensor | None) -> int:
        """In the place of `cuda_launch.address`."""
        if self._launched:
            self._known, self._launched = [], False
        if tensor is None:
            return 0
        self._known.append(tensor)
        return tensor.data_ptr()

    def memory(self) -> GlobalMemory:
        self._launched = True
        return GlobalMemory(self._known)


def _launcher(
    programs: dict[int, Program], tensors: _Tensors, failures: list[Exception]
) -> Callable[[int, Any, int, int, Any, Any, int], bool]:
    """What C++ calls; exceptions, which it cannot pass on, are put aside."""

    def launch(kernel: int, grid: Any, threads: int, dynamic: int, places: Any, sizes: Any, count: int) -> bool:
        try:
            values = [ctypes.string_at(places[i], sizes[i]) for i in range(count)]
            Launch(programs[kernel], (grid[0], grid[1], grid[2]), threads, dynamic, values, tensors.memory()).run()
        except Exception as failure:
            failures.append(failure)
        return not failures

    return launch


_callbacks: list[Any] = []
"""That C++ has the addresses of."""


def install() -> None:
    """Launches of the library, which `emulated.install` has loaded, run on the machine."""
    from convnext_kernels.ops.common import cuda_launch

    folder = Path(os.environ[FOLDER])
    path = folder / "_C.so"
    symbols, library = _symbols(path), ctypes.CDLL(str(path))
    hook = ctypes.c_void_p.in_dll(library, "ptx_launcher")
    start = ctypes.addressof(hook) - symbols["ptx_launcher"]
    programs = {start + symbols[name]: program for name, program in _programs(folder).items()}
    tensors, failures, call = _Tensors(), list[Exception](), cuda_launch.launch
    _callbacks.append(LAUNCHER(_launcher(programs, tensors, failures)))
    hook.value = ctypes.cast(_callbacks[-1], ctypes.c_void_p).value

    def launch(function: str, device: torch.device, **arguments: Any) -> None:
        try:
            call(function, device, **arguments)
        except RuntimeError as error:
            if failures:
                raise failures.pop() from error
            raise

    cuda_launch.address, cuda_launch.launch = tensors.address, launch
