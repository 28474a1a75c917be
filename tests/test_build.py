"""The build: what setup.py makes of a machine, what the compiled library is, and what `build_info` says of it."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from convnext_kernels import build

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = "convnext_kernels._C"
SETUP = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")

needs_nvcc = pytest.mark.skipif(SETUP["find_nvcc"]() is None, reason="needs nvcc")


def program(path: Path, script: str = "") -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine without nvcc, on which no variable of the build is set."""
    for name in ("CUDACXX", "CUDA_HOME", "CONVNEXT_KERNELS_CUDA", "CONVNEXT_KERNELS_CUDA_ARCHS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    return monkeypatch


def test_without_nvcc_no_library_is_built_and_it_is_said(machine, capsys):
    assert SETUP["extensions"]() == []
    assert "without the compiled library" in capsys.readouterr().out


def test_a_required_library_without_nvcc_is_an_error(machine):
    machine.setenv("CONVNEXT_KERNELS_CUDA", "1")
    with pytest.raises(FileNotFoundError, match="no nvcc"):
        SETUP["extensions"]()


def test_nvcc_is_looked_for_in_order(machine, tmp_path):
    on_path = program(tmp_path / "path" / "nvcc")
    assert SETUP["find_nvcc"]() == on_path
    machine.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    assert SETUP["find_nvcc"]() == on_path
    in_toolkit = program(tmp_path / "toolkit" / "bin" / "nvcc")
    assert SETUP["find_nvcc"]() == in_toolkit
    explicit = program(tmp_path / "nvcc-13")
    machine.setenv("CUDACXX", explicit)
    assert SETUP["find_nvcc"]() == explicit


def test_with_nvcc_the_library_is_built_unless_switched_off(machine, tmp_path):
    nvcc = program(tmp_path / "path" / "nvcc")
    assert [(extension.name, extension.nvcc) for extension in SETUP["extensions"]()] == [(LIBRARY, nvcc)]
    machine.setenv("CONVNEXT_KERNELS_CUDA", "0")
    assert SETUP["extensions"]() == []


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("CONVNEXT_KERNELS_CUDA", "yes"),
        ("CONVNEXT_KERNELS_CUDA", ""),
        ("CONVNEXT_KERNELS_CUDA_ARCHS", "sm_90"),
        ("CONVNEXT_KERNELS_CUDA_ARCHS", "80,90a"),
        ("CONVNEXT_KERNELS_CUDA_ARCHS", ""),
        ("CUDACXX", "/no/such/nvcc"),
    ],
)
def test_a_bad_value_is_named(machine, variable, value):
    machine.setenv(variable, value)
    with pytest.raises(ValueError, match=f"^{variable}={value!r}"):
        SETUP["extensions"]()


def test_a_failing_compiler_is_shown(tmp_path, capfd):
    nvcc = program(tmp_path / "nvcc", "echo this compiler is broken >&2; exit 1")
    with pytest.raises(RuntimeError, match="CONVNEXT_KERNELS_CUDA=0"):
        SETUP["build_library"](nvcc, "0", tmp_path / "output", tmp_path / "build")
    assert "this compiler is broken" in capfd.readouterr().out


def test_setup_imports_neither_torch_nor_the_package(tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('setup.py imports torch')")
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "CONVNEXT_KERNELS_CUDA": "0"}
    command = [sys.executable, "setup.py", "--version"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == build.__version__


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The compiled library, built for one architecture in a folder of its own."""
    output = tmp_path_factory.mktemp("library")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("CONVNEXT_KERNELS_CUDA_ARCHS", "90a")
        SETUP["build_library"](SETUP["find_nvcc"](), build.__version__, output, tmp_path_factory.mktemp("build"))
    (module,) = output.glob("_C*.so")
    return module


@needs_nvcc
def test_the_library_imports_without_torch_and_says_what_it_is(library):
    script = """
import json, sys
import _C
assert "torch" not in sys.modules
print(json.dumps([_C.version, _C.architectures, _C.ptx, _C.nvcc, *_C.device_code(1000)]))
"""
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, cwd=library.parent, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    version, architectures, ptx, nvcc, code, reason = json.loads(result.stdout)
    assert (version, architectures, ptx) == (build.__version__, "90a", "90")
    assert nvcc in subprocess.run([SETUP["find_nvcc"](), "--version"], capture_output=True, text=True).stdout
    assert code == "unavailable"
    assert reason


@needs_nvcc
def test_the_library_shows_one_symbol_and_needs_no_cuda_or_torch_library(library):
    symbols = subprocess.run(["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True)
    assert [line.split()[-1] for line in symbols.stdout.splitlines()] == ["PyInit__C"]
    dynamic = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    needed = [line for line in dynamic.splitlines() if "NEEDED" in line]
    assert needed
    assert not [line for line in needed if any(name in line for name in ("cuda", "torch", "python"))]


@pytest.fixture
def installed(monkeypatch):
    """Puts a compiled library, or None for none, in the place of the installed one."""

    def put(module):
        monkeypatch.setitem(sys.modules, LIBRARY, module)
        build._load.cache_clear()

    yield put
    build._load.cache_clear()


def test_build_info_says_what_is_installed():
    info = build.build_info()
    assert info["version"] == build.__version__
    assert info["compiled_library"] == (build.compiled_library() is not None) == (not build.missing_reasons())
    assert (info["reason"] is None) == info["compiled_library"]
    assert info["torch"] == torch.__version__
    assert info["cuda_runtime"] == torch.version.cuda
    assert info["python"] == sys.version.split()[0]
    assert len(info["device_code"]) == torch.cuda.device_count()
    json.dumps(info)


def test_build_info_repeats_what_the_library_says(installed):
    described = {"version": build.__version__, "nvcc": "13.0.88", "architectures": "80,90a", "ptx": "90"}
    installed(SimpleNamespace(**described, device_code=lambda device: ("machine code", "")))
    info = build.build_info()
    assert info["compiled_library"]
    assert (info["nvcc"], info["architectures"], info["ptx"]) == ("13.0.88", ["80", "90a"], "90")


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (("machine code", ""), "machine code"),
        (("PTX", ""), "PTX"),
        (("none", "no kernel image"), "none: no kernel image"),
        (("unavailable", "no driver"), "unavailable: no driver"),
    ],
)
def test_device_code_carries_its_reason(installed, answer, text):
    installed(SimpleNamespace(version=build.__version__, device_code=lambda device: answer))
    assert build.device_code(0) == text


def test_a_library_that_is_not_built_is_a_reason(installed):
    installed(None)
    assert build.compiled_library() is None
    assert "is not built" in build.missing_reasons()[0]
    assert build.build_info()["reason"] == build.missing_reasons()[0]
    assert build.device_code(0) == f"none: {build.missing_reasons()[0]}"


def test_a_library_of_another_version_is_a_reason(installed):
    installed(SimpleNamespace(version="0.0.1"))
    assert build.compiled_library() is None
    assert "version 0.0.1" in build.missing_reasons()[0]


def test_a_library_that_fails_to_import_is_a_reason(installed, monkeypatch):
    def fail(name):
        raise ImportError("libstdc++.so.6: version `GLIBCXX_9' not found")

    installed(None)
    monkeypatch.setattr(build.importlib, "import_module", fail)
    assert build.compiled_library() is None
    assert "GLIBCXX_9" in build.missing_reasons()[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_installed_library_runs_on_the_device():
    if build.missing_reasons():
        pytest.skip(build.missing_reasons()[0])
    major, minor = torch.cuda.get_device_capability(0)
    machine_code = f"{major}{minor}" in {name.rstrip("af") for name in build.build_info()["architectures"]}
    assert build.device_code(0) == ("machine code" if machine_code else "PTX")
