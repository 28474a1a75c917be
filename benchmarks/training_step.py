"""Whole training steps for `benchmarks.block`: ConvNeXt-T's memory, and the time that dropped samples save ConvNeXt-L.

A step is forward under autocast, cross-entropy, backward and AdamW on random images. Ours is checked first, on fewer
images, as `convnext-kernels bench` does: output and gradients of eager in float32, and eager's own error in 16 bits.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.reporting import Figure, Row, Target, row_of
from benchmarks.timing import Call, Measured, measure_calls, refusal
from convnext_kernels import create_model, parity
from convnext_kernels.cli import tasks
from convnext_kernels.cli.tasks import EAGER, Task, check_parity, classification, parity_failure, randomise
from convnext_kernels.reference import create_reference_model

OURS, SAVING, RECOMPUTING, DROPPING = "ours", "ours, saving", "ours, recomputing", "ours, dropping"
RECOMPUTE_HIDDEN = {SAVING: False, RECOMPUTING: True}
"""What these are told; the others choose by themselves."""

PARITY_IMAGES = 8
SECONDS = {"convnext_tiny": 20, "convnext_large": 30}


@dataclass(frozen=True)
class Step:
    """A training step of one model.

    drop_path_rate: 0, or that of `DROPPING`, which is then compared with ours at 0; else ours is compared with eager.
    """

    model: str
    dtype: str
    batch: int
    resolution: int
    drop_path_rate: float = 0.0

    mode = "training step"

    def __str__(self) -> str:
        return f"{self.mode}, {self.dtype}, {self.shape}"

    @property
    def shape(self) -> str:
        return f"{self.model} {self.batch}x3x{self.resolution}x{self.resolution}"

    @property
    def entries(self) -> dict[str, Any]:
        """What a row says of it."""
        return {"mode": self.mode, **asdict(self)}

    @property
    def seconds(self) -> float:
        """What its checks, compilation and warm-up are expected to take."""
        return SECONDS[self.model]

    @property
    def baseline(self) -> str:
        return OURS if self.drop_path_rate else EAGER

    @property
    def contenders(self) -> list[str]:
        return [OURS, DROPPING] if self.drop_path_rate else [EAGER, OURS, RECOMPUTING]

    def task(self, contender: str, images: Tensor) -> Task:
        """The same random weights in PyTorch's form and ours, with a contender's options."""
        rate = self.drop_path_rate if contender == DROPPING else 0.0
        torch.manual_seed(0)
        with images.device:
            reference = create_reference_model(self.model, drop_path_rate=rate)
            randomise(reference)
            recompute_hidden = RECOMPUTE_HIDDEN.get(contender)
            ours = create_model(self.model, drop_path_rate=rate, recompute_hidden=recompute_hidden)
        ours.load_state_dict(reference.state_dict())
        dtype = parity.DTYPES[self.dtype]
        objective = classification(images, dtype)
        return Task(self.model, self.mode, reference, ours, images, dtype, objective, optimizer=True)

    def images(self, device: torch.device) -> Tensor:
        """Random images, normalised as photographs are."""
        generator = torch.Generator(device).manual_seed(0)
        size = (self.batch, 3, self.resolution, self.resolution)
        return torch.randn(size, generator=generator, device=device).to(memory_format=torch.channels_last)


def _seeded(module: nn.Module) -> nn.Module:
    """A copy that drops the same samples in every forward."""

    def seed(*_: object) -> None:
        torch.manual_seed(1)

    module = copy.deepcopy(module)
    module.register_forward_pre_hook(seed)
    return module


def check(task: Task) -> str | None:
    """Why ours gets no time: on some of the images it is further from eager in float32 than eager in 16 bits allows."""
    images = task.inputs[:PARITY_IMAGES]
    seeded = {EAGER: _seeded(task.reference), tasks.OURS: _seeded(task.ours)}
    objective = classification(images, task.dtype)
    task = replace(task, reference=seeded[EAGER], ours=seeded[tasks.OURS], inputs=images, objective=objective)
    return parity_failure(check_parity(task, {name: task.contender(module) for name, module in seeded.items()}))


def _figures(step: Step, contender: str, measured: Measured) -> list[Figure]:
    """Of a contender beside the baseline, with None for what was not measured."""
    timings, peaks, baseline = measured.timings, measured.peaks, step.baseline
    timed, weighed = ({contender, baseline} <= known.keys() for known in (timings, peaks))
    speedup = timings[contender].speedup_over(timings[baseline]) if timed else None
    memory = peaks[contender] / peaks[baseline] if weighed else None
    if step.drop_path_rate:
        return [Figure("speedup over drop path 0", speedup, Target(1.15))]
    return [
        Figure("peak memory over eager", memory, Target(0.45, at_most=True)),
        Figure("speedup over eager", speedup),
    ]


def rows_of(step: Step, measured: Measured) -> Iterator[Row]:
    """A row for each contender."""
    for contender in step.contenders:
        figures = [] if contender == step.baseline else _figures(step, contender, measured)
        yield row_of(step.shape, step.entries, contender, measured, figures)


def measure_step(step: Step, device: torch.device, rounds: int) -> list[Row]:
    """Checks and then times all contenders of a step, in turn, each launched as in training."""
    images = step.images(device)
    calls: dict[str, Call] = {}
    failures: dict[str, str] = {}
    for contender in step.contenders:
        task = step.task(OURS if contender == EAGER else contender, images)
        if contender != EAGER and (failure := refusal(partial(check, task))) is not None:
            failures[contender] = failure
        else:
            calls[contender], _ = task.work(task.contender(task.reference if contender == EAGER else task.ours))
    measured = measure_calls(calls, [images], device, rounds, graphs=False, peaks=True)
    measured.failures |= failures
    return list(rows_of(step, measured))


def plan_step(step: Step) -> list[Row]:
    """What would be measured of ours, with the targets."""
    ours = [name for name in step.contenders if name != step.baseline]
    return [Row(step.shape, step.entries, name, _figures(step, name, Measured())) for name in ours]
