"""The command `info`."""

import json
import subprocess

import torch

from convnext_kernels.cli import info, machine, main
from convnext_kernels.functional import OPERATORS

GPU = {"index": 0, "name": "NVIDIA X", "capability": [9, 0], "memory_bytes": 80 * 2**30, "l2_cache_bytes": 50 * 2**20}


def test_json_parses(capsys):
    assert main(["info", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["build"]["torch"] == torch.__version__ and content["machine"]["cpu"]
    cpu = content["backends"]["cpu"]
    assert cpu["reference"] == {"chosen_for": list(OPERATORS), "reasons": {}}
    for backend in ("triton", "cuda"):
        assert cpu[backend]["chosen_for"] == [] and cpu[backend]["reasons"]


def test_tables_name_every_backend(capsys):
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("PyTorch", "Triton", "compiled library", "cuda", "triton", "reference"))
    assert torch.__version__ in shown and "all operators" in shown


def test_a_gpu_and_the_library_s_code_for_it_are_shown(capsys, monkeypatch):
    content = info.collect()
    content["machine"]["gpus"] = [GPU]
    library = {"compiled_library": True, "architectures": ["80", "90a"], "ptx": "90", "nvcc": "13.0"}
    content["build"] |= library | {"device_code": {"cuda:0 (NVIDIA X)": "machine code"}}
    monkeypatch.setattr(info, "collect", lambda: content)
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    assert "NVIDIA X, 9.0, 80 GiB; library code: machine code" in shown
    assert "machine code for sm_80, sm_90a; PTX of compute_90 (nvcc 13.0)" in shown


def test_commit_is_asked_for_once(monkeypatch):
    """A result that is written into the checkout would make it a changed one."""
    states = iter(["__init__.py", "1a2b", "__init__.py", "1a2b-dirty"])
    monkeypatch.setattr(
        machine.subprocess, "run", lambda *command, **options: subprocess.CompletedProcess(command, 0, next(states))
    )
    machine.commit.cache_clear()
    try:
        assert [machine.commit(), machine.commit()] == ["1a2b", "1a2b"]
    finally:
        machine.commit.cache_clear()
