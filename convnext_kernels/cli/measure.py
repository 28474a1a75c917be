"""How time and memory are measured."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor

Work = Callable[[Any], object]

SAMPLE_MILLISECONDS = 50.0
"""A sample repeats short work for at least this long: a timer's and a scheduler's noise stays below a percent."""

WARM_UP_CALLS = {"cpu": 2, "cuda": 10}
"""After the first; work of which so many take longer than two samples gets fewer."""

CALLS_BEFORE_CAPTURE = 3


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call, one sample for each round."""

    samples: list[float]

    @property
    def median(self) -> float:
        return median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.samples) == 1:
            return self.samples[0], self.samples[0]
        lower, _, upper = quantiles(self.samples, n=4, method="inclusive")
        return lower, upper

    def speedup_over(self, baseline: Timing) -> float:
        """The median over rounds of the baseline's time divided by this one's: what drifts in between cancels."""
        return median(theirs / ours for theirs, ours in zip(baseline.samples, self.samples, strict=True))


def rotation(nbytes: int, device: torch.device) -> int:
    """How many inputs of a size take turns, so that the others are over twice the GPU's L2 cache; on a CPU one."""
    if device.type != "cuda":
        return 1
    return 1 + math.ceil(2 * torch.cuda.get_device_properties(device).L2_cache_size / nbytes)


def rotating_inputs(inputs: Tensor) -> list[Tensor]:
    """The batch and copies of it, the images in another order, as many as `rotation` says."""
    copies = range(1, rotation(inputs.nbytes, inputs.device))
    return [inputs, *(inputs.roll(shift, 0).contiguous(memory_format=torch.channels_last) for shift in copies)]


def over(call: Callable[[Any], object], inputs: Sequence[Any]) -> Work:
    """Calls on every input; all results are alive at once."""
    return lambda _: [call(input) for input in inputs]


def warm_up(work: Work, device: torch.device) -> None:
    """What compiles or chooses an algorithm does so here, on a stream of its own as PyTorch wants before a capture."""
    if device.type != "cuda":
        work(None)
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(CALLS_BEFORE_CAPTURE):
            work(None)
    torch.cuda.current_stream(device).wait_stream(stream)
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()  # no other stream would get what this one has cached


def captured(work: Work) -> Work:
    """The same from a CUDA graph: what is launched, but not the time that it takes to launch."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work(None)
    return lambda _: graph.replay()


def _sample_cpu(work: Work, inputs: Iterator[Any], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        work(next(inputs))
    return (time.perf_counter() - start) * 1e3 / calls


def _sample_cuda(work: Work, inputs: Iterator[Any], calls: int) -> float:
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        work(next(inputs))
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / calls


def measure(works: Mapping[str, Work], inputs: Tensor, rounds: int, advance: Callable[[], None]) -> dict[str, Timing]:
    """Times several contenders in turn, A B C A B C ..., after a warm-up of each.

    Args:
        works: what to call on a batch, by contender.
        inputs: the batch; on a GPU it is rotated through copies larger than the L2 cache.
        rounds: how many samples of each contender.
        advance: called after each sample.
    """
    return measure_over(works, rotating_inputs(inputs), inputs.device, rounds, advance)


def measure_over(
    works: Mapping[str, Work], inputs: Sequence[Any], device: torch.device, rounds: int, advance: Callable[[], None]
) -> dict[str, Timing]:
    """As `measure`, with inputs that take turns."""
    kind = device.type
    sample = _sample_cuda if kind == "cuda" else _sample_cpu
    batches = cycle(inputs)
    calls = {}
    for name, work in works.items():
        first = sample(work, batches, 1)
        warm_up_calls = min(WARM_UP_CALLS[kind], math.ceil(2 * SAMPLE_MILLISECONDS / first))
        calls[name] = max(1, math.ceil(SAMPLE_MILLISECONDS / sample(work, batches, warm_up_calls)))
    samples: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            samples[name].append(sample(work, batches, calls[name]))
            advance()
    return {name: Timing(values) for name, values in samples.items()}


def peak_memory(work: Work, inputs: Tensor) -> int:
    """Bytes that one call allocates at its peak, beyond what is allocated before it.

    A GPU's allocator keeps this count. On a CPU the profiler records what PyTorch's allocator gives and takes.
    """
    if inputs.is_cuda:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated(inputs.device)
        torch.cuda.reset_peak_memory_stats(inputs.device)
        work(inputs)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(inputs.device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would complain that there is no GPU
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        work(inputs)
    allocated = peak = 0
    memory_events = (event for event in profile.kineto_results.events() if event.name() == "[memory]")
    for event in sorted(memory_events, key=lambda event: event.start_ns()):
        allocated += event.nbytes()
        peak = max(peak, allocated)
    return peak
