"""Two processes of examples/train.py compute what one does."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support import relative_error
from training.processes import Processes
from two_processes import GRADIENTS, STATES, gradients_of, learner, state_of

ALONE = Processes(0, 1, torch.device("cpu"))
ROOT = Path(__file__).resolve().parents[2]


def torchrun(*arguments: str) -> subprocess.Popen[str]:
    """Starts two processes on the CPU, of one thread each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "examples")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("two")
    process = torchrun(str(Path(__file__).with_name("two_processes.py")), str(folder))
    errors = process.communicate(timeout=300)[1]
    assert process.returncode == 0 and "Warning" not in errors, errors
    return torch.load(folder / "found.pt")


def without_fsdp(arguments: tuple[str, ...]) -> list[str]:
    return [argument for argument in arguments if argument != "--fsdp"]


@pytest.mark.parametrize("case", [case for case in GRADIENTS if "bf16" not in case])
def test_gradients_are_those_of_one_process_with_the_whole_batch(found, case):
    expected = gradients_of(learner(ALONE), ALONE)
    assert found["gradients"][case].keys() == expected.keys()
    for name, gradient in expected.items():
        assert relative_error(found["gradients"][case][name], gradient) < 1e-5, name


@pytest.mark.parametrize("case", [case for case in GRADIENTS if "bf16" in case])
def test_sharded_gradients_in_bf16_are_as_accurate_as_autocast(found, case):
    exact = gradients_of(learner(ALONE), ALONE)
    autocast = gradients_of(learner(ALONE, *without_fsdp(GRADIENTS[case])), ALONE)
    errors, allowed = (
        torch.tensor([relative_error(gradients[name], exact[name]) for name in exact])
        for gradients in (found["gradients"][case], autocast)
    )
    assert {gradient.dtype for gradient in found["gradients"][case].values()} == {torch.float32}
    assert 1e-4 < errors.mean() < 1.5 * allowed.mean()


@pytest.mark.parametrize("case", list(STATES))
def test_a_step_a_checkpoint_and_a_step_more_are_those_of_one_process(found, case, tmp_path):
    expected = state_of(ALONE, tmp_path, *without_fsdp(STATES[case]))
    got = found["states"][case]
    assert got["scaler"] == expected["scaler"]
    assert got["scheduler"]["last_epoch"] == 2
    before = learner(ALONE).model.state_dict()
    allowed = 2e-2 if "fp16" in case else 1e-4
    for part in ("model", "ema"):
        assert got[part].keys() == expected[part].keys()
        errors = {
            name: relative_error(got[part][name] - before[name], value - before[name])
            for name, value in expected[part].items()
        }
        assert max(errors.values()) < allowed, errors
