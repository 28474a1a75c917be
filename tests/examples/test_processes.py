"""Two processes of examples/train.py compute what one does."""

from pathlib import Path
from typing import Any

import pytest
import torch
from launch import torchrun
from support import relative_error
from training.data import PADDING
from training.processes import Processes
from two_processes import GRADIENTS, STATES, gradients_of, learner, state_of

TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL wants a GPU for each of two processes")


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, TWO_GPUS])])
def alone(request: pytest.FixtureRequest) -> Processes:
    """One process on its device."""
    return Processes(0, 1, torch.device(request.param))


@pytest.fixture(scope="module")
def found(alone: Processes, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two processes found: Gloo's on the CPU, NCCL's on GPUs."""
    folder = tmp_path_factory.mktemp("two")
    process = torchrun(str(Path(__file__).with_name("two_processes.py")), str(folder), alone.device.type)
    errors = process.communicate(timeout=300)[1]
    assert process.returncode == 0 and "Warning" not in errors, errors
    return torch.load(folder / "found.pt")


def without_fsdp(arguments: tuple[str, ...]) -> list[str]:
    return [argument for argument in arguments if argument != "--fsdp"]


@pytest.mark.parametrize("case", [case for case in GRADIENTS if "bf16" not in case])
def test_gradients_are_those_of_one_process_with_the_whole_batch(alone, found, case):
    expected = gradients_of(learner(alone), alone)
    assert found["gradients"][case].keys() == expected.keys()
    for name, gradient in expected.items():
        assert relative_error(found["gradients"][case][name], gradient) < 1e-5, name


@pytest.mark.parametrize("case", [case for case in GRADIENTS if "bf16" in case])
def test_sharded_gradients_in_bf16_are_as_accurate_as_autocast(alone, found, case):
    exact = gradients_of(learner(alone), alone)
    autocast = gradients_of(learner(alone, *without_fsdp(GRADIENTS[case])), alone)
    errors, allowed = (
        torch.tensor([relative_error(gradients[name], exact[name]) for name in exact])
        for gradients in (found["gradients"][case], autocast)
    )
    assert {gradient.dtype for gradient in found["gradients"][case].values()} == {torch.float32}
    assert 1e-4 < errors.mean() < 1.5 * allowed.mean()


@pytest.mark.parametrize("case", list(STATES))
def test_a_step_a_checkpoint_and_a_step_more_are_those_of_one_process(alone, found, case, tmp_path):
    expected = state_of(alone, tmp_path, *without_fsdp(STATES[case]))
    got = found["states"][case]
    assert got["scaler"] == expected["scaler"]
    assert got["scheduler"]["last_epoch"] == 2
    before = {name: value.cpu() for name, value in learner(alone).model.state_dict().items()}
    allowed = 2e-2 if "fp16" in case else 1e-4
    for part in ("model", "ema"):
        assert got[part].keys() == expected[part].keys()
        errors = {
            name: relative_error(got[part][name] - before[name], value - before[name])
            for name, value in expected[part].items()
        }
        assert max(errors.values()) < allowed, errors


def test_a_reason_to_stop_is_every_process_s(found):
    """5 is what the first gave, 6 the second."""
    assert found["highest"] == 6


def test_padding_counts_for_nothing_in_the_evaluation():
    world = Processes(0, 1, torch.device("cpu"))
    images, labels = torch.randn(6, 3, 32, 32), torch.tensor([0, 1, 2, PADDING, 4, PADDING])
    trained = learner(world)
    figures = [trained.evaluate([(images[kept], labels[kept])]) for kept in (labels >= -1, labels >= 0)]
    assert figures[0] == pytest.approx(figures[1], rel=1e-6)
    assert figures[0].keys() == {"loss", "accuracy", "ema_loss", "ema_accuracy"}
    assert trained.model.training
