"""Times whole models on a GPU, inference and training steps, beside the same models of other libraries.

Ours, the published model in eager PyTorch, and timm's, torchvision's and transformers' where they are installed and
have it, all channels-last, take turns in the same run; in cases of its own torch.compile, so that its compilation costs
no other results when time is up. Inference runs from CUDA graphs, training steps are launched as they are in training.
Ours is checked first. Images and weights are random; a model passes through more than the L2 cache by itself.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import import_module
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.block import COMPILE_MODE
from benchmarks.reporting import Figure, Row, add_arguments, row_of, run_cases
from benchmarks.timing import NOT_AVAILABLE, Measured, measure_calls, refusal
from benchmarks.training_step import PARITY_IMAGES
from convnext_kernels.cli.errors import CommandError, names
from convnext_kernels.cli.measure import SAMPLE_MILLISECONDS, Work
from convnext_kernels.cli.tasks import (
    COMPILED,
    EAGER,
    OURS,
    Task,
    build_models,
    check_parity,
    classification,
    full_float32,
    parity_failure,
    randomise,
)
from convnext_kernels.variants import VARIANTS

INFERENCE, STEP = "inference", "training step"
TUNED = f"{COMPILED} max-autotune"
COMPILE_MODES = {COMPILED: "default", TUNED: COMPILE_MODE}
TF32 = "tf32"
PRECISIONS = {"bfloat16": torch.bfloat16, "float16": torch.float16, TF32: torch.float32, "float32": torch.float32}

ROUNDS = 6
SETUP_SECONDS = {INFERENCE: 1.5, STEP: 3.0}
COMPILE_SECONDS = {INFERENCE: 1.5, STEP: 3.0}
"""Expected for each block of a model; `TUNED` takes twice as long."""


@dataclass(frozen=True)
class Network:
    """A model at a resolution, with the images of a large batch in inference and in training."""

    model: str
    resolution: int
    batch: int
    step_batch: int


NETWORKS = (
    Network("convnext_tiny", 224, 128, 128),
    Network("convnext_base", 224, 128, 64),
    Network("convnextv2_tiny", 224, 128, 128),
    Network("convnext_small", 224, 128, 128),
    Network("convnext_large", 224, 128, 32),
    Network("convnext_xlarge", 224, 128, 32),
    Network("convnextv2_base", 224, 128, 64),
    Network("convnext_base", 384, 64, 32),
    Network("convnext_large", 384, 64, 16),
    Network("convnext_isotropic_small", 224, 128, 128),
)
"""What tells most first, should time run out."""


def _timm(model: str) -> nn.Module | None:
    timm = import_module("timm")
    return timm.create_model(model) if timm.is_model(model) else None


def _torchvision(model: str) -> nn.Module | None:
    builder = getattr(import_module("torchvision.models"), model, None)
    return builder() if builder else None


class _Logits(nn.Module):
    """transformers' model with a tensor as its output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images).logits


def _transformers(model: str) -> nn.Module | None:
    transformers, variant = import_module("transformers"), VARIANTS[model]
    if variant.isotropic:
        return None
    version = "ConvNextV2" if variant.use_grn else "ConvNext"
    sizes = {"depths": list(variant.depths), "hidden_sizes": list(variant.dims), "num_labels": 1000}
    config = getattr(transformers, f"{version}Config")(**sizes)
    return _Logits(getattr(transformers, f"{version}ForImageClassification")(config))


LIBRARIES: dict[str, Callable[[str], nn.Module | None]] = {
    "timm eager": _timm,
    "torchvision eager": _torchvision,
    "transformers eager": _transformers,
}
"""A model with random weights by its name, None where the library has none of it."""


def find_peer(library: str, model: str) -> nn.Module | str | None:
    """A library's model, its weights drawn as ours are; why it cannot be built, or None where there is none."""
    try:
        peer = LIBRARIES[library](model)
    except (ImportError, RuntimeError) as error:  # RuntimeError: of a torchvision that does not fit PyTorch
        return f"{NOT_AVAILABLE}: {str(error).splitlines()[0]}"
    if peer is not None:
        randomise(peer)
    return peer


@contextmanager
def tf32() -> Iterator[None]:
    """Within the context products and convolutions of float32 round to TF32."""
    with full_float32():
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        yield


@dataclass(frozen=True)
class Case:
    """One model at one batch size, beside the other libraries or, where `compiler` names it, torch.compile."""

    mode: str
    model: str
    dtype: str
    batch: int
    resolution: int
    compiler: str | None = None

    def __str__(self) -> str:
        return f"{self.mode}, {self.dtype}, {self.shape}, beside {self.compiler or 'eager'}"

    @property
    def shape(self) -> str:
        return f"{self.model} {self.batch}x3x{self.resolution}x{self.resolution}"

    @property
    def seconds(self) -> float:
        """What building, checking, compilation and warm-up are expected to take."""
        if self.compiler is None:
            return SETUP_SECONDS[self.mode]
        blocks = sum(VARIANTS[self.model].depths)
        return COMPILE_SECONDS[self.mode] * blocks * (2 if self.compiler == TUNED else 1)

    @property
    def contenders(self) -> list[str]:
        return [EAGER, *LIBRARIES, OURS] if self.compiler is None else [self.compiler, OURS]

    def precision(self) -> AbstractContextManager[None]:
        """float32 as PyTorch is to compute it."""
        return tf32() if self.dtype == TF32 else nullcontext()

    def images(self, device: torch.device) -> Tensor:
        """Random images, normalised as photographs are."""
        generator = torch.Generator(device).manual_seed(0)
        size = (self.batch, 3, self.resolution, self.resolution)
        return torch.randn(size, generator=generator, device=device).to(memory_format=torch.channels_last)

    def task(self, device: torch.device) -> Task:
        """The same random weights in PyTorch's form and ours."""
        images, dtype = self.images(device), PRECISIONS[self.dtype]
        with device:
            reference, ours = (
                model.to(memory_format=torch.channels_last) for model in build_models(self.model, device)
            )
        if self.mode == INFERENCE:
            return Task(self.model, self.mode, reference, ours, images.to(dtype), dtype)
        objective = classification(images, dtype)
        return Task(self.model, self.mode, reference, ours, images, dtype, objective, optimizer=True)

    def module(self, contender: str, task: Task) -> nn.Module | str | None:
        """A contender as it is timed; see `find_peer`."""
        if contender in LIBRARIES:
            with task.inputs.device:
                peer = find_peer(contender, self.model)
            if not isinstance(peer, nn.Module):
                return peer
            return task.contender(peer.to(memory_format=torch.channels_last))
        module = task.contender(task.ours if contender == OURS else task.reference)
        if contender not in COMPILE_MODES:
            return module
        torch.compiler.reset()
        compiled: Any = torch.compile(module, mode=COMPILE_MODES[contender], dynamic=False)
        return compiled


def check(task: Task) -> str | None:
    """Why ours gets no time, on some of the images; see `check_parity`."""
    images = task.inputs[:PARITY_IMAGES]
    objective = None if task.objective is None else classification(images, task.dtype)
    task = replace(task, inputs=images, objective=objective)
    modules = {EAGER: task.contender(task.reference), OURS: task.contender(task.ours)}
    return parity_failure(check_parity(task, modules))


def _ours_figures(case: Case, measured: Measured) -> list[Figure]:
    timings, peaks = measured.timings, measured.peaks
    peers = [name for name in case.contenders if name != OURS and name in timings]
    figures = [Figure(f"speedup over {name}", timings[OURS].speedup_over(timings[name])) for name in peers]
    if {OURS, EAGER} <= peaks.keys():
        figures.append(Figure(f"peak memory over {EAGER}", peaks[OURS] / peaks[EAGER]))
    return figures


def rows_of(case: Case, measured: Measured) -> Iterator[Row]:
    """A row for each contender that there is."""
    for contender in case.contenders:
        if contender not in {**measured.timings, **measured.failures}:
            continue
        figures = []
        if contender in measured.timings:
            figures.append(Figure("images/s", case.batch / measured.timings[contender].median * 1e3))
            figures += _ours_figures(case, measured) if contender == OURS else []
        yield row_of(case.shape, asdict(case), contender, measured, figures)


def _prepare(case: Case, device: torch.device) -> tuple[Task, dict[str, Work], dict[str, str]]:
    """The task, what to call of each contender, and why of some there is nothing."""
    task = case.task(device)
    works: dict[str, Work] = {}
    failures: dict[str, str] = {}
    for contender in case.contenders:
        failure = refusal(partial(check, task)) if contender == OURS else None
        module = case.module(contender, task) if failure is None else failure
        if isinstance(module, str):
            failures[contender] = module
        elif module is not None:
            works[contender], _ = task.work(module)
    return task, works, failures


def measure_case(case: Case, device: torch.device, rounds: int) -> list[Row]:
    """Checks ours and then times all contenders of a case, in turn."""
    with case.precision():
        task, works, failures = _prepare(case, device)
        graphs = case.mode == INFERENCE
        measured = measure_calls(works, [task.inputs], device, rounds, graphs=graphs, peaks=True)
    measured.failures |= failures
    return list(rows_of(case, measured))


def plan(case: Case) -> list[Row]:
    """What would be measured of ours."""
    return [Row(case.shape, asdict(case), OURS, [Figure("images/s", None)])]


def seconds(case: Case, rounds: int) -> float:
    """What a case is expected to take."""
    return case.seconds + rounds * len(case.contenders) * SAMPLE_MILLISECONDS / 1e3


def _parser() -> argparse.ArgumentParser:
    description = (__doc__ or "").split("\n\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models", description=description)
    models = ", ".join(dict.fromkeys(network.model for network in NETWORKS))
    parser.add_argument("--model", nargs="+", metavar="NAME", help=f"{models} (all)")
    parser.add_argument("--dtype", nargs="+", metavar="NAME", help=f"{', '.join(PRECISIONS)} (all but float32)")
    parser.add_argument("--mode", nargs="+", metavar="NAME", help="inference, step (both)")
    parser.add_argument("--compile", action="store_true", help="beside torch.compile in place of eager")
    add_arguments(parser, ROUNDS, minutes=5)
    return parser


def choose_cases(options: argparse.Namespace) -> list[Case]:
    """In bfloat16 first; of each dtype large batches in inference, training steps, then single images."""
    known = {network.model for network in NETWORKS}
    models = names("--model", options.model, known, list(known))
    dtypes = names("--dtype", options.dtype, PRECISIONS, ["bfloat16", "float16", TF32])
    modes = names("--mode", options.mode, ("inference", "step"), ("inference", "step"))
    batches: list[tuple[str, Callable[[Network], int]]] = []
    if "inference" in modes:
        batches.append((INFERENCE, lambda network: network.batch))
    if "step" in modes:
        batches.append((STEP, lambda network: network.step_batch))
    if "inference" in modes:
        batches.append((INFERENCE, lambda network: 1))
    networks = [network for network in NETWORKS if network.model in models]
    compilers: list[str | None] = [TUNED, COMPILED] if options.compile else [None]
    cases = [
        Case(mode, network.model, dtype, batch(network), network.resolution, compiler)
        for dtype, compiler, (mode, batch), network in product(dtypes, compilers, batches, networks)
    ]
    if options.compile:  # the first model in every mode before any other
        cases.sort(key=lambda case: [network.model for network in NETWORKS].index(case.model))
    return cases


def main(arguments: list[str] | None = None) -> int:
    """Returns 0; 1 where ours is wrong; 2 where the arguments do not fit."""
    options = _parser().parse_args(arguments)
    try:
        return run_cases(options, choose_cases(options), measure_case, plan, partial(seconds, rounds=options.rounds))
    except CommandError as error:
        print(f"models: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
