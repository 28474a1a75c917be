"""What the benchmarks on a GPU share: the machine, parity with PyTorch, and the timing of calls that take turns."""

from __future__ import annotations

import subprocess
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from convnext_kernels import parity
from convnext_kernels.backends import BackendError
from convnext_kernels.cli.errors import first_line
from convnext_kernels.cli.machine import device_name, provenance
from convnext_kernels.cli.measure import Timing, captured, measure_over, over, peak_memory, warm_up

Results = Sequence[Tensor]
Tensors = Mapping[str, Tensor]
Call = Callable[[Any], object]
"""What a contender does with one input of those that take turns."""

NOT_AVAILABLE, PARITY_FAILED = "not available", "parity failed"


def find_gpu() -> torch.device | None:
    """The current GPU, None where PyTorch can use none."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None


def _nvidia_smi(*arguments: str) -> str | None:
    """What nvidia-smi says in CSV, or None where it says nothing."""
    command = ["nvidia-smi", *arguments, "--format=csv,noheader,nounits"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def driver() -> str | None:
    """The release of NVIDIA's driver, or None where nvidia-smi does not say."""
    answer = _nvidia_smi("--query-gpu=driver_version")
    return answer.split()[0] if answer else None


def clocks(device: torch.device) -> dict[str, str] | None:
    """The GPU's clocks in MHz, power in W and temperature in degrees Celsius, or None where nvidia-smi does not say."""
    if device.type != "cuda":
        return None
    fields = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    chosen = () if uuid is None else ("-i", f"GPU-{str(uuid).removeprefix('GPU-')}")
    answer = _nvidia_smi(f"--query-gpu={','.join(fields)}", *chosen)
    if answer is None:
        return None
    return dict(zip(fields, (value.strip() for value in answer.splitlines()[0].split(",")), strict=False))


def header(device: torch.device | None, **settings: Any) -> dict[str, Any]:
    """Where results come from: the GPU (or, where nothing is timed, the processor), driver, versions, commit, date."""
    name = device_name(device or torch.device("cpu"))
    return {"gpu": device is not None, "device": name, "driver": driver(), **settings, **provenance()}


@contextmanager
def fair() -> Iterator[None]:
    """Within the context cuDNN takes its best algorithm, float32 is float32, and our operators never run as PyTorch."""
    cudnn = torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False)
    with cudnn, warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*runs the plain PyTorch reference on a GPU")
        yield


def failure_of(error: Exception) -> str:
    """The type of an error and the first line of what it says; where it came from is printed on stderr."""
    traceback.print_exception(error, limit=-8)
    return first_line(error)


def parity_failure(ours: Results, theirs: Results, exact: Results, dtype: torch.dtype) -> str | None:
    """Why ours is wrong: an error beyond `parity`'s limit for PyTorch's own in that dtype. None where it is right."""
    for i, (our, their, truth) in enumerate(zip(ours, theirs, exact, strict=True)):
        measures = zip(parity.errors(our, truth), parity.errors(their, truth), parity.ROUNDING_UNITS, strict=True)
        for our_error, their_error, units in measures:
            limit = parity.FACTOR * their_error + units * torch.finfo(dtype).eps / 2
            if not our_error <= limit:  # a NaN is not
                return f"{PARITY_FAILED}: result {i} off by {our_error:.1e}, limit {limit:.1e}"
    return None


def refusal(check: Callable[[], str | None]) -> str | None:
    """Why a contender gets no time: what a check says, or that it could not run. None where it may be timed."""
    try:
        return check()
    except BackendError as error:
        return f"{NOT_AVAILABLE}: {error}"
    except Exception as error:  # whatever a contender runs into is a result, not the end of the benchmark
        return failure_of(error)


@dataclass
class Measured:
    """Of each contender its times for one call, or why there are none.

    peaks: bytes that a call allocates at its peak, where this was asked for.
    no_graphs: why calls were launched one by one instead of from CUDA graphs.
    clocks: after the last call.
    """

    timings: dict[str, Timing] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)
    no_graphs: str | None = None
    clocks: dict[str, str] | None = None


def _peak(call: Call, input: Any, device: torch.device) -> int:
    """Of the second call: the first allocates what a stream keeps."""
    call(input)
    return peak_memory(lambda _: call(input), torch.empty(0, device=device))


def measure_calls(
    calls: Mapping[str, Call],
    inputs: Sequence[Any],
    device: torch.device,
    rounds: int,
    *,
    graphs: bool = True,
    peaks: bool = False,
) -> Measured:
    """Times contenders in turn, each over all inputs; one that raises is left out, with the reason.

    Args:
        calls: of each contender, on one input.
        inputs: so many that the others exceed the L2 cache; see `cli.measure.rotation`.
        graphs: time CUDA graphs, unless a contender cannot be captured: then, to be fair, none is.
        peaks: measure each contender's peak of memory first.
    """
    measured, works = Measured(), {}
    for name, call in calls.items():
        try:
            warm_up(work := over(call, inputs), device)
            if peaks:
                measured.peaks[name] = _peak(call, inputs[0], device)
            works[name] = work
        except Exception as error:
            measured.failures[name] = failure_of(error)
    if graphs and device.type == "cuda":
        try:
            works = {name: captured(work) for name, work in works.items()}
        except RuntimeError as error:
            measured.no_graphs = failure_of(error)
    timings = measure_over(works, [None], device, rounds, lambda: None)
    measured.clocks = clocks(device)
    measured.timings = {
        name: Timing([sample / len(inputs) for sample in timing.samples]) for name, timing in timings.items()
    }
    return measured


def floor(bounds: Sequence[tuple[float, Timing]]) -> Timing:
    """The least time that each round allowed: the largest, over what bounds it, of a share times the bound's time."""
    rounds = zip(*(timing.samples for _, timing in bounds), strict=True)
    return Timing([max(share * sample for (share, _), sample in zip(bounds, times, strict=True)) for times in rounds])
