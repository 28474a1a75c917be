"""Compiles CUDA sources with the host's C++ compiler against the emulator's headers, and runs what comes out."""

import os
import runpy
import shlex
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
import pytest

from convnext_kernels.build import __version__

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc"
EMULATOR = Path(__file__).resolve().parent
COMPILER = shlex.split(os.environ.get("CXX", "g++"))
FLAGS = [
    *("-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"),
]

NVCC: str | None = runpy.run_path(str(ROOT / "setup.py"))["find_nvcc"]()
ARCHITECTURES = ("80", "90a")

needs_compiler = pytest.mark.skipif(
    shutil.which(COMPILER[0]) is None, reason=f"needs the C++ compiler {COMPILER[0]}, which is not on PATH"
)
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="needs nvcc")


def _compile(output: Path, *arguments: str) -> Path:
    """Calls the compiler; the emulator's headers come before those of csrc/."""
    includes = [f"-I{EMULATOR / 'include'}", f"-I{SOURCES}"]
    command = [*COMPILER, *FLAGS, *includes, *arguments, "-o", str(output)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, f"{shlex.join(command)}\n{result.stderr}"
    return output


def compile_program(program: Path, *sources: Path) -> Path:
    """Builds the sources, .cu among them, as one program."""
    return _compile(program, "-x", "c++", *map(str, sources))


def compile_library(folder: Path) -> Path:
    """Builds the whole compiled library, bindings and kernels, as the Python module `_C` of the emulator."""
    options = [
        *("-x", "c++", "-c", "-fPIC", "-fvisibility=hidden", f'-DCONVNEXT_KERNELS_VERSION="{__version__}"'),
        *("-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include")),
    ]
    kernels = [path for path in SOURCES.glob("*/*.cu") if path.name != "build_info.cu"]
    sources = [*kernels, SOURCES / "bindings.cpp", EMULATOR / "build_info.cpp"]
    objects = [folder / f"{source.parent.name}_{source.stem}.o" for source in sources]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda pair: _compile(pair[1], *options, str(pair[0])), zip(sources, objects, strict=True)))
    return _compile(folder / "_C.so", "-shared", *map(str, objects))


def run(program: Path, *arguments: object, given: bytes) -> bytes:
    """What the program writes when it is given these bytes; the emulator's or a sanitizer's report as RuntimeError."""
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}  # looking for leaks needs to trace processes
    command = [str(program), *map(str, arguments)]
    result = subprocess.run(command, input=given, capture_output=True, env=environment)
    if result.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)}: exit status {result.returncode}\n{result.stderr.decode()}")
    return result.stdout


def compile_for_gpu(source: Path, output: Path, *flags: str) -> str:
    """Compiles a source for every architecture with nvcc and returns what ptxas reports of each kernel."""
    targets = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in ARCHITECTURES]
    command = [str(NVCC), "-std=c++17", "-Xptxas=-v", *targets, *flags, f"-I{SOURCES}", "-c", str(source)]
    result = subprocess.run([*command, "-o", str(output)], capture_output=True, text=True)
    assert result.returncode == 0, f"{shlex.join(command)}\n{result.stderr}"
    return result.stdout + result.stderr
