"""The command `verify`."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch

from convnext_kernels import backends, parity
from convnext_kernels.cli import main

LAYER_NORM = ("verify", "--device", "cpu", "--operator", "layer_norm", "--dtype", "float32", "--backend", "reference")


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """The command may set the variable; the test puts back what was there."""
    monkeypatch.setenv("TRITON_INTERPRET", os.environ.get("TRITON_INTERPRET", "1"))


def change(monkeypatch, **changes):
    """Changes the output's comparison of the last layer norm case."""
    compare = parity.compare
    last = parity.cases("layer_norm", True)[-1]

    def changed(case, *arguments):
        output, *gradients = compare(case, *arguments)
        return [dataclasses.replace(output, **changes) if case == last else output, *gradients]

    monkeypatch.setattr(parity, "compare", changed)
    return last


def test_the_reference_passes(capsys, tmp_path):
    path = tmp_path / "verify.json"
    assert main([*LAYER_NORM, "--dtype", "bfloat16", "--json", str(path)]) == 0
    shown = capsys.readouterr().out
    assert shown.count("pass") == 2 and "FAIL" not in shown
    content = json.loads(path.read_text())
    assert content["passed"] and not content["raised"] and not content["not_run"]
    comparisons = content["comparisons"]
    assert {comparison["dtype"] for comparison in comparisons} == {"float32", "bfloat16"}
    assert {comparison["case"] for comparison in comparisons} == {c.name for c in parity.cases("layer_norm", True)}
    assert {"output", "grad input", "grad weight", "grad bias"} == {c["tensor"] for c in comparisons}
    assert all(comparison["error"] <= comparison["limit"] for comparison in comparisons)


@pytest.mark.parametrize(("error", "ratio"), [(2e-3, "2.00"), (float("nan"), "inf")])
def test_a_failed_comparison_is_an_exit_code(monkeypatch, capsys, tmp_path, error, ratio):
    case = change(monkeypatch, error=error, limit=1e-3)
    path = tmp_path / "verify.json"
    assert main([*LAYER_NORM, "--json", str(path)]) == 1
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "FAIL" in line]
    assert case.name in row and ratio in row and "output" in row
    content = json.loads(path.read_text())
    assert not content["passed"] and len([c for c in content["comparisons"] if c["limit"] == 1e-3]) == 1


def test_every_comparison_is_printed_on_request(capsys):
    assert main([*LAYER_NORM, "--all"]) == 0
    assert capsys.readouterr().out.count("pass") > 20


def test_a_kernel_that_raises_fails(monkeypatch, capsys, tmp_path):
    def compare(case, *arguments):
        raise RuntimeError("out of [red] registers")

    monkeypatch.setattr(parity, "compare", compare)
    assert main([*LAYER_NORM, "--json", str(tmp_path / "verify.json")]) == 1
    shown = capsys.readouterr().out
    assert "FAIL" in shown and "raised RuntimeError: out of [red] registers (layer_norm float32 reference" in shown
    (raised,) = json.loads((tmp_path / "verify.json").read_text())["raised"]
    assert set(raised["cases"].values()) == {"RuntimeError: out of [red] registers"}


def test_a_backend_asked_for_that_cannot_run_is_a_failure(capsys, tmp_path):
    path = tmp_path / "verify.json"
    assert main([*LAYER_NORM, "--backend", "cuda", "--json", str(path)]) == 1
    shown = capsys.readouterr().out
    assert "not run" in shown and "cuda was asked for and could not run" in shown
    (not_run,) = json.loads(path.read_text())["not_run"]
    assert not_run["backend"] == "cuda" and all(not_run["cases"].values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the kernels are not interpreted")
def test_without_a_gpu_the_kernels_are_interpreted(tmp_path):
    pytest.importorskip("triton")
    if broken := backends.broken_interpreter():
        pytest.skip(broken)
    path = tmp_path / "verify.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    arguments = ["--operator", "layer_norm", "--dtype", "float32", "--json", str(path)]
    command = [sys.executable, "-m", "convnext_kernels.cli", "verify", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {c["backend"] for c in json.loads(path.read_text())["comparisons"]} == {"triton", "reference"}


@pytest.mark.gpu
def test_on_a_gpu():
    assert main(["verify", "--operator", "layer_norm", "--dtype", "float32", "--backend", "triton"]) == 0
