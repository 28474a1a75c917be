"""Times whole models on a GPU, inference and training steps, beside the same models of other libraries.

Ours, the published model in eager PyTorch, and timm's, torchvision's and transformers' where they are installed and
have it, all channels-last, take turns in the same run; in cases of their own those models accelerated, beside our own,
and torch.compile, so that its compilation costs no other results when time is up. Inference of batches runs from CUDA
graphs, training steps are launched as they are in training, single images both ways. Ours is checked first. Images and
weights are random; a model passes through more than the L2 cache by itself.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import import_module
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.block import COMPILE_MODE
from benchmarks.reporting import Figure, Row, Target, add_arguments, row_of, run_cases
from benchmarks.timing import NOT_AVAILABLE, Measured, failure_of, measure_calls, refusal
from benchmarks.training_step import PARITY_IMAGES
from convnext_kernels import accelerate, graphed
from convnext_kernels.cli.errors import command, names
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

INFERENCE, STEP, LATENCY = "inference", "training step", "latency"
TUNED = f"{COMPILED} max-autotune"
COMPILE_MODES = {COMPILED: "default", TUNED: COMPILE_MODE}
TF32 = "tf32"
PRECISIONS = {"bfloat16": torch.bfloat16, "float16": torch.float16, TF32: torch.float32, "float32": torch.float32}

ROUNDS = 6
SETUP_SECONDS = {INFERENCE: 1.5, STEP: 5.0, LATENCY: 1.5}
COMPILE_SECONDS = {INFERENCE: 1.0, STEP: 2.0}
"""Expected for each block of a model; `TUNED` takes twice as long."""


@dataclass(frozen=True)
class Network:
    """A model at a resolution, with the images of a large batch in inference and in training."""

    model: str
    resolution: int
    batch: int
    step_batch: int


NETWORKS = (
    Network("convnext_tiny", 224, 256, 256),
    Network("convnext_base", 224, 256, 256),
    Network("convnextv2_tiny", 224, 256, 256),
    Network("convnextv2_base", 224, 256, 128),
    Network("convnext_small", 224, 256, 256),
    Network("convnext_large", 224, 128, 128),
    Network("convnext_xlarge", 224, 128, 128),
    Network("convnext_base", 384, 64, 64),
    Network("convnext_large", 384, 64, 32),
    Network("convnext_isotropic_small", 224, 256, 256),
)
"""What tells most first, should time run out."""

TIER = 4
"""So many networks are measured in every mode before the others, and in other dtypes than the first beside those."""

V2_OVER_COMPILED = {"convnextv2_tiny": 1.2, "convnextv2_base": 1.2}
OVER_COMPILED = {"convnext_tiny": 1.7, "convnext_base": 1.45, "convnext_large": 1.25}
SPEEDUPS = {
    (INFERENCE, EAGER): {
        **{"convnext_tiny": 3.0, "convnext_small": 2.6, "convnext_base": 2.3, "convnext_large": 1.8},
        **{"convnext_xlarge": 1.6, "convnextv2_tiny": 3.0, "convnextv2_base": 3.0},
    },
    (INFERENCE, TUNED): {
        **{"convnext_tiny": 2.2, "convnext_small": 1.9, "convnext_base": 1.7, "convnext_large": 1.4},
        **{"convnext_xlarge": 1.25, **V2_OVER_COMPILED},
    },
    (INFERENCE, COMPILED): V2_OVER_COMPILED,
    (STEP, EAGER): {"convnext_tiny": 2.2, "convnext_base": 1.8, "convnext_large": 1.5},
    (STEP, COMPILED): OVER_COMPILED,
    (STEP, TUNED): OVER_COMPILED,
}
"""Least speedups of large batches of 224 px in bfloat16, by mode and peer."""

LATENCY_SPEEDUP = 2.86
"""Of a single image from a CUDA graph, over eager PyTorch: 0.35 times its latency."""

MOST_MEMORY, MOST_TIME = 0.45, 1.03
"""Of eager's peak in training; of our own model's time where another library's is accelerated."""


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

INSIDE = {f"{OURS} in {library.split()[0]}": library for library in LIBRARIES}
"""Those models with their blocks run by our kernels."""

GRAPHED = {f"{name}, graphed": name for name in (OURS, EAGER)}
"""Models in a CUDA graph as a user would capture them; see `convnext_kernels.graphed`."""


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
    """One model at one batch size, beside the other libraries or, where `compiler` names it, torch.compile.

    accelerated: our own model beside the other libraries' with their blocks run by our kernels.
    """

    mode: str
    model: str
    dtype: str
    batch: int
    resolution: int
    compiler: str | None = None
    accelerated: bool = False

    def __str__(self) -> str:
        peers = "accelerated libraries" if self.accelerated else self.compiler or "eager"
        return f"{self.mode}, {self.dtype}, {self.shape}, beside {peers}"

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
        if self.accelerated:
            return [OURS, *INSIDE]
        if self.mode == LATENCY:
            return [EAGER, *reversed(GRAPHED), OURS]
        return [EAGER, *LIBRARIES, OURS] if self.compiler is None else [self.compiler, OURS]

    def target(self, peer: str) -> Target | None:
        """What our speed over a peer's should be at least."""
        if self.dtype != "bfloat16" or self.resolution != 224:
            return None
        if self.mode == LATENCY:
            return Target(LATENCY_SPEEDUP) if peer == EAGER else None
        least = SPEEDUPS.get((self.mode, peer), {}).get(self.model) if self.batch > 1 else None
        return None if least is None else Target(least)

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
        if self.mode != STEP:
            return Task(self.model, self.mode, reference, ours, images.to(dtype), dtype)
        objective = classification(images, dtype)
        return Task(self.model, self.mode, reference, ours, images, dtype, objective, optimizer=True)

    def peer(self, library: str, device: torch.device) -> nn.Module | str | None:
        """See `find_peer`."""
        with device:
            peer = find_peer(library, self.model)
        return peer.to(memory_format=torch.channels_last) if isinstance(peer, nn.Module) else peer

    def work(self, contender: str, task: Task) -> Work | str | None:
        """What to call of a contender; why it has none, or None where there is no such model."""
        if contender in LIBRARIES or contender in INSIDE:
            peer = self.peer(INSIDE.get(contender, contender), task.inputs.device)
            if not isinstance(peer, nn.Module):
                return peer
            task = replace(task, reference=peer, ours=peer)
        if contender in INSIDE:
            task = replace(task, ours=copy.deepcopy(task.ours))
            accelerate(task.ours)
        is_ours = contender.startswith(OURS)
        if is_ours and (failure := refusal(partial(check, task))) is not None:
            return failure
        module = task.contender(task.ours if is_ours else task.reference)
        if contender in GRAPHED:
            return graphed(module, task.inputs)
        if contender in COMPILE_MODES:
            torch.compiler.reset()
            compiled: Any = torch.compile(module, mode=COMPILE_MODES[contender], dynamic=False)
            module = compiled
        return task.work(module)[0]


def check(task: Task) -> str | None:
    """Why ours gets no time, on some of the images; see `check_parity`."""
    images = task.inputs[:PARITY_IMAGES]
    objective = None if task.objective is None else classification(images, task.dtype)
    task = replace(task, inputs=images, objective=objective)
    modules = {EAGER: task.contender(task.reference), OURS: task.contender(task.ours)}
    return parity_failure(check_parity(task, modules))


def _figures(case: Case, contender: str, measured: Measured) -> Iterator[Figure]:
    """Of one of ours beside its peers: speedups and memory; of other libraries' models beside our own, the time."""
    timings, peaks = measured.timings, measured.peaks
    timing = timings[contender]
    if case.accelerated:
        if OURS in timings and contender != OURS:
            over = timings[OURS].speedup_over(timing)
            yield Figure(f"time over {OURS}", over, Target(MOST_TIME, at_most=True))
        return
    for peer in case.contenders:
        if peer in timings and not peer.startswith(OURS):
            yield Figure(f"speedup over {peer}", timing.speedup_over(timings[peer]), case.target(peer))
    if {contender, EAGER} <= peaks.keys() and case.mode != LATENCY:
        target = Target(MOST_MEMORY, at_most=True) if case.mode == STEP and case.dtype == "bfloat16" else None
        yield Figure(f"peak memory over {EAGER}", peaks[contender] / peaks[EAGER], target)


def rows_of(case: Case, measured: Measured) -> Iterator[Row]:
    """A row for each contender that there is."""
    for contender in case.contenders:
        if contender not in {**measured.timings, **measured.failures}:
            continue
        figures = []
        if contender in measured.timings:
            figures.append(Figure("images/s", case.batch / measured.timings[contender].median * 1e3))
            figures += _figures(case, contender, measured) if contender.startswith(OURS) else []
        yield row_of(case.shape, asdict(case), contender, measured, figures)


def _prepare(case: Case, device: torch.device) -> tuple[Task, dict[str, Work], dict[str, str]]:
    """The task, what to call of each contender, and why of some there is nothing."""
    task = case.task(device)
    works: dict[str, Work] = {}
    failures: dict[str, str] = {}
    for contender in case.contenders:
        try:
            work = case.work(contender, task)
        except Exception as error:  # the others' results count all the same
            work = failure_of(error)
        if isinstance(work, str):
            failures[contender] = work
        elif work is not None:
            works[contender] = work
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


def _of_network(network: Network, dtype: str, modes: Sequence[str], compiler: str | None) -> Iterator[Case]:
    """Large batches in inference, training steps, then single images; beside accelerated libraries in one dtype."""
    of = {"model": network.model, "dtype": dtype, "resolution": network.resolution, "compiler": compiler}
    if "inference" in modes:
        yield Case(INFERENCE, batch=network.batch, **of)
    if "step" in modes:
        yield Case(STEP, batch=network.step_batch, **of)
    if "inference" in modes:
        yield Case(INFERENCE if compiler else LATENCY, batch=1, **of)
    if compiler is None and dtype == "bfloat16":
        if "inference" in modes:
            yield Case(INFERENCE, batch=network.batch, accelerated=True, **of)
        if "step" in modes:
            yield Case(STEP, batch=network.step_batch, accelerated=True, **of)


def choose_cases(options: argparse.Namespace) -> list[Case]:
    """The first networks in the first dtype first, then what is of one of both; torch.compile network by network."""
    known = {network.model for network in NETWORKS}
    models = names("--model", options.model, known, list(known))
    dtypes = names("--dtype", options.dtype, PRECISIONS, ["bfloat16", "float16", TF32])
    modes = names("--mode", options.mode, ("inference", "step"), ("inference", "step"))
    networks = [network for network in NETWORKS if network.model in models]
    ranked: list[tuple[tuple[int, ...], Case]] = []
    for (i, dtype), (j, network) in product(enumerate(dtypes), enumerate(networks)):
        if options.compile:
            compiled = [case for name in COMPILE_MODES for case in _of_network(network, dtype, modes, name)]
            ranked += [((i, j, n % (len(compiled) // 2)), case) for n, case in enumerate(compiled)]
        else:
            cases = enumerate(_of_network(network, dtype, modes, None))
            ranked += [((j // TIER + (i > 0), n), case) for n, case in cases]
    return [case for _, case in sorted(ranked, key=lambda pair: pair[0])]


@command("models")
def main(arguments: list[str] | None = None) -> int:
    """Returns 0; 1 where ours is wrong; 2 where the arguments do not fit."""
    options = _parser().parse_args(arguments)
    return run_cases(options, choose_cases(options), measure_case, plan, partial(seconds, rounds=options.rounds))


if __name__ == "__main__":
    sys.exit(main())
