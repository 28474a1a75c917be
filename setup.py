"""Builds the compiled library with CMake where there is an nvcc: no torch, no GPU and no download is needed.

CONVNEXT_KERNELS_CUDA        auto (default): build if nvcc is found; 1: nvcc must be found; 0: do not build
CONVNEXT_KERNELS_CUDA_ARCHS  architectures that get machine code, such as "80;90a"; the newest gets PTX as well
CUDACXX, CUDA_HOME, PATH     where nvcc is looked for, in this order
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def find_nvcc() -> str | None:
    """Path of nvcc, or None; a CUDACXX that names no program is an error."""
    if cudacxx := os.environ.get("CUDACXX"):
        if nvcc := shutil.which(cudacxx):
            return nvcc
        raise ValueError(f"CUDACXX={cudacxx!r} is not an executable; expected the path of nvcc")
    cuda_home = os.environ.get("CUDA_HOME")
    return (cuda_home and shutil.which(os.path.join(cuda_home, "bin", "nvcc"))) or shutil.which("nvcc")


def nvcc_to_build_with() -> str | None:
    """The nvcc to build with by CONVNEXT_KERNELS_CUDA, or None to install without the compiled library."""
    mode = os.environ.get("CONVNEXT_KERNELS_CUDA", "auto")
    if mode not in ("auto", "0", "1"):
        raise ValueError(f"CONVNEXT_KERNELS_CUDA={mode!r}; accepted are auto, 0 and 1")
    if mode == "0":
        return None
    nvcc = find_nvcc()
    if nvcc is None and mode == "1":
        raise FileNotFoundError("CONVNEXT_KERNELS_CUDA=1, but there is no nvcc at CUDACXX, CUDA_HOME/bin or PATH")
    return nvcc


def architecture_options() -> list[str]:
    """CMake's option for CONVNEXT_KERNELS_CUDA_ARCHS; none when it is not set, CMakeLists.txt has the default."""
    architectures = os.environ.get("CONVNEXT_KERNELS_CUDA_ARCHS")
    if architectures is None:
        return []
    if not re.fullmatch(r"\d{2,3}[af]?(;\d{2,3}[af]?)*", architectures):
        raise ValueError(
            f"CONVNEXT_KERNELS_CUDA_ARCHS={architectures!r}; accepted are compute capabilities joined by ';': 80;90a"
        )
    return [f"-DCONVNEXT_KERNELS_CUDA_ARCHS={architectures}"]


def run(command: list[str], log: Path | None = None) -> None:
    """Runs a command of this Python environment, or of PATH; when it fails, shows the log it left."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    try:
        subprocess.run(command, check=True, env=os.environ | {"PATH": path})
    except subprocess.CalledProcessError as error:
        if log and log.is_file():
            print(log.read_text())
        raise RuntimeError(
            "building the compiled library failed, for the reason printed above; "
            "CONVNEXT_KERNELS_CUDA=0 installs without it"
        ) from error


def build_library(nvcc: str, version: str, output: Path, build: Path) -> None:
    """Configures and builds CMakeLists.txt in `build`; the module lands in the folder `output`."""
    import pybind11

    configure = [
        "cmake",
        "--fresh",  # a cached path may lead into an isolated build environment that is gone
        "-GNinja",
        f"-S{ROOT}",
        f"-B{build}",
        "-DCMAKE_BUILD_TYPE=Release",
        f"-DCMAKE_CUDA_COMPILER={nvcc}",
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DCONVNEXT_KERNELS_VERSION={version}",
        *architecture_options(),
    ]
    run(configure, log=build / "CMakeFiles" / "CMakeConfigureLog.yaml")  # what an unusable nvcc says is only there
    run(["cmake", "--build", str(build)])


class CMakeBuild(build_ext):
    """Hands each extension to CMake."""

    def build_extension(self, extension: Extension) -> None:
        output = Path(self.get_ext_fullpath(extension.name)).resolve().parent
        build_library(extension.nvcc, self.distribution.get_version(), output, Path(self.build_temp).resolve())


def extensions() -> list[Extension]:
    """The compiled library, or nothing where it is not built."""
    architecture_options()
    nvcc = nvcc_to_build_with()
    if nvcc is None:
        print("convnext-kernels: no nvcc, or CONVNEXT_KERNELS_CUDA=0: installing without the compiled library")
        return []
    library = Extension("convnext_kernels._C", sources=[])
    library.nvcc = nvcc
    return [library]


if __name__ == "__main__":
    setup(ext_modules=extensions(), cmdclass={"build_ext": CMakeBuild})
