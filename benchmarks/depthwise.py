"""Times the depthwise convolution, its gradients and LayerNorm on a GPU, as fractions of the speed of a device copy.

At every shape a copy of as many bytes, PyTorch (for convolutions cuDNN, channels-last) and our kernels take turns in
the same run. What is timed is checked first, on two images, against float64. Each contender's calls run from a CUDA
graph, over inputs and outputs that take turns so that the others exceed twice the L2 cache.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import groupby, product
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor

from benchmarks.kernel_work import SHAPES, Shape
from benchmarks.reporting import measure_all
from benchmarks.timing import (
    PARITY_FAILED,
    Measured,
    Results,
    Tensors,
    find_gpu,
    header,
    measure_calls,
    parity_failure,
    refusal,
)
from convnext_kernels import parity
from convnext_kernels.cli.errors import CommandError, at_least, command, names, positive, writable
from convnext_kernels.cli.measure import SAMPLE_MILLISECONDS, rotation
from convnext_kernels.cli.output import console

COPY, PYTORCH, NO_BIAS = "copy", "PyTorch", "PyTorch, no bias"
OURS = ("cuda", "triton")
BATCHES = (64, 256)
ROUNDS, QUICK_ROUNDS = 30, 5
SETUP_SECONDS = 2
KERNEL_SIZE, EPS = 7, 1e-6


@dataclass(frozen=True)
class Operation:
    """What is timed.

    images: the arguments of an image's size.
    moved: how often an image's bytes pass through memory: each such argument and result once.
    ours: the results, by one of our backends.
    theirs: the same in PyTorch, in any dtype.
    without_bias: where PyTorch adds or sums the bias in another pass, what cuDNN alone does; it is timed, not compared.
    of_copy: the target, as a fraction of the copy's speed, at a map of that height and width; None for none.
    over_pytorch: the target, as a multiple of PyTorch's speed.
    """

    images: tuple[str, ...]
    moved: int
    ours: Callable[[Tensors, str], Results]
    theirs: Callable[[Tensors], Results]
    of_copy: Callable[[int], float | None] = lambda size: None
    over_pytorch: float | None = None
    without_bias: Callable[[Tensors], Results] | None = None


def _conv_gradients(tensors: Tensors, wanted: list[bool]) -> Results:
    input, channels, padding = tensors["input"], tensors["input"].shape[1], KERNEL_SIZE // 2
    geometry = ([channels], [1, 1], [padding, padding], [1, 1], False, [0, 0], channels)
    gradients = torch.ops.aten.convolution_backward(tensors["grad_output"], input, tensors["weight"], *geometry, wanted)
    return [gradient for gradient, want in zip(gradients, wanted, strict=True) if want]


def _our_conv_gradients(tensors: Tensors, wanted: list[bool], backend: str) -> Results:
    arguments = (tensors["grad_output"], tensors["input"], tensors["weight"])
    gradients = torch.ops.convnext_kernels.depthwise_conv2d_backward(*arguments, 1, wanted, backend)
    return [gradient for gradient, want in zip(gradients, wanted, strict=True) if want]


def _convolution(tensors: Tensors, with_bias: bool = True) -> Tensor:
    input, bias = tensors["input"], tensors["bias"] if with_bias else None
    return F.conv2d(input, tensors["weight"], bias, padding=KERNEL_SIZE // 2, groups=input.shape[1])


def _our_convolution(tensors: Tensors, backend: str) -> Results:
    arguments = (tensors["input"], tensors["weight"], tensors["bias"])
    return [torch.ops.convnext_kernels.depthwise_conv2d(*arguments, 1, backend)]


def _rows(images: Tensor) -> Tensor:
    return images.permute(0, 2, 3, 1)


def _convolution_layer_norm(tensors: Tensors) -> Results:
    rows = _rows(_convolution(tensors))
    rows = F.layer_norm(rows, rows.shape[-1:], tensors["norm_weight"], tensors["norm_bias"], EPS)
    return [rows.permute(0, 3, 1, 2)]


def _our_convolution_layer_norm(tensors: Tensors, backend: str) -> Results:
    arguments = [tensors[name] for name in ("input", "weight", "bias", "norm_weight", "norm_bias")]
    return [torch.ops.convnext_kernels.depthwise_conv2d_layer_norm(*arguments, 1, EPS, False, backend)[0]]


def _norm_gradients(tensors: Tensors) -> Results:
    rows, grads = _rows(tensors["input"]), _rows(tensors["grad_output"])
    # On a CPU PyTorch takes statistics of the input's dtype alone.
    dtype = torch.promote_types(rows.dtype, torch.float32) if rows.is_cuda else rows.dtype
    statistics = [tensors[name].view(*rows.shape[:-1], 1).to(dtype) for name in ("mean", "rstd")]
    affine = (tensors["norm_weight"], tensors["norm_bias"])
    backward = torch.ops.aten.native_layer_norm_backward
    grad_input, *parameters = backward(grads, rows, rows.shape[-1:], *statistics, *affine, [True] * 3)
    return [grad_input.permute(0, 3, 1, 2), *parameters]


def _our_norm_gradients(tensors: Tensors, backend: str) -> Results:
    arguments = [tensors[name] for name in ("grad_output", "input", "norm_weight", "mean", "rstd")]
    return torch.ops.convnext_kernels.layer_norm_backward(*arguments, [True] * 3, backend)


def _by_size(large: float, small: float) -> Callable[[int], float]:
    """A target for maps of 28 or more pixels and one for those below."""
    return lambda size: large if size >= 28 else small


INPUT, FILTER = [True, False, False], [False, True, True]

OPERATIONS = {
    "forward": Operation(
        ("input",),
        2,
        _our_convolution,
        lambda tensors: [_convolution(tensors)],
        _by_size(0.8, 0.6),
        3,
        lambda tensors: [_convolution(tensors, with_bias=False)],
    ),
    "input_gradient": Operation(
        ("input", "grad_output"),
        2,
        lambda tensors, backend: _our_conv_gradients(tensors, INPUT, backend),
        lambda tensors: _conv_gradients(tensors, INPUT),
        _by_size(0.8, 0.6),
    ),
    "filter_gradient": Operation(
        ("input", "grad_output"),
        2,
        lambda tensors, backend: _our_conv_gradients(tensors, FILTER, backend),
        lambda tensors: _conv_gradients(tensors, FILTER),
        lambda size: 0.6,
        4,
        lambda tensors: _conv_gradients(tensors, [False, True, False]),
    ),
    "layer_norm_backward": Operation(("input", "grad_output"), 3, _our_norm_gradients, _norm_gradients),
    "conv_layer_norm": Operation(
        ("input",), 2, _our_convolution_layer_norm, _convolution_layer_norm, lambda size: 0.75
    ),
}


@dataclass(frozen=True)
class Case:
    """One operation at one shape."""

    operation: str
    dtype: str
    batch: int
    shape: Shape

    def __str__(self) -> str:
        shape = f"{self.batch}x{self.shape.channels}x{self.shape.size}x{self.shape.size}"
        return f"{self.operation}, {self.dtype}, {shape}"

    @property
    def of(self) -> Operation:
        return OPERATIONS[self.operation]

    @property
    def contenders(self) -> list[str]:
        return [COPY, PYTORCH, *([NO_BIAS] if self.of.without_bias else []), *OURS]

    @property
    def elements(self) -> int:
        return self.batch * self.shape.channels * self.shape.size**2

    @property
    def bytes(self) -> int:
        """Those that pass through memory if every image does so once; parameters and statistics are not counted."""
        return self.of.moved * self.elements * parity.DTYPES[self.dtype].itemsize

    @property
    def flops(self) -> int:
        """Of the convolution; those of a norm are not counted."""
        return 2 * KERNEL_SIZE**2 * self.elements if self.operation != "layer_norm_backward" else 0

    def draw(self, device: torch.device, seed: int) -> dict[str, Tensor]:
        """Random arguments, and two buffers that a copy of as many bytes runs between."""
        dtype, channels = parity.DTYPES[self.dtype], self.shape.channels
        generator = torch.Generator(device).manual_seed(seed)
        normal = partial(torch.randn, generator=generator, device=device)
        size = (self.batch, channels, self.shape.size, self.shape.size)
        tensors = {name: normal(size).to(dtype, memory_format=torch.channels_last) for name in self.of.images}
        tensors["weight"] = (normal(channels, 1, KERNEL_SIZE, KERNEL_SIZE) / KERNEL_SIZE).to(dtype)
        tensors["bias"], tensors["norm_bias"] = (normal(channels).to(dtype) for _ in range(2))
        tensors["norm_weight"] = (1 + 0.1 * normal(channels)).to(dtype)
        rows = _rows(tensors["input"]).float()
        deviation, mean = torch.std_mean(rows, dim=-1, correction=0)
        tensors["mean"], tensors["rstd"] = mean.flatten(), (deviation**2 + EPS).rsqrt().flatten()
        tensors["source"] = normal(self.bytes // 8)
        tensors["destination"] = torch.empty_like(tensors["source"])
        return tensors


@dataclass(frozen=True)
class Row:
    """What was measured of one contender; `failure` says why there is no time. Targets are None where there is none."""

    operation: str
    dtype: str
    batch: int
    channels: int
    size: int
    contender: str
    bytes: int
    flops: int
    milliseconds: float | None = None
    quartiles: tuple[float, float] | None = None
    samples: list[float] | None = None
    terabytes_per_second: float | None = None
    of_copy: float | None = None
    of_copy_target: float | None = None
    over_pytorch: float | None = None
    over_pytorch_target: float | None = None
    no_graphs: str | None = None
    clocks: dict[str, str] | None = None
    failure: str | None = None


def run(case: Case, contender: str, tensors: Tensors) -> Results:
    """One call of a contender."""
    if contender == COPY:
        return [tensors["destination"].copy_(tensors["source"])]
    if contender == NO_BIAS and case.of.without_bias:
        return case.of.without_bias(tensors)
    return case.of.theirs(tensors) if contender == PYTORCH else case.of.ours(tensors, contender)


def check(case: Case, contender: str, device: torch.device) -> str | None:
    """Why one of our backends gets no time: its error on two images is beyond `parity`'s limit."""
    small = replace(case, batch=2)
    tensors = small.draw(device, seed=1)
    exact = case.of.theirs({name: tensor.double() for name, tensor in tensors.items()})
    ours, theirs = (run(small, name, tensors) for name in (contender, PYTORCH))
    return parity_failure(ours, theirs, exact, parity.DTYPES[case.dtype])


def _rows_of(case: Case, measured: Measured) -> Iterator[Row]:
    for contender in case.contenders:
        failure = measured.failures.get(contender)
        empty = Row(
            *(
                case.operation,
                case.dtype,
                case.batch,
                case.shape.channels,
                case.shape.size,
                contender,
                case.bytes,
                case.flops,
            ),
            failure=failure,
        )
        if failure is not None:
            yield empty
            continue
        timings = measured.timings
        timing, ours = timings[contender], contender in OURS
        over = {name: timing.speedup_over(timings[name]) for name in (COPY, PYTORCH) if name in timings}
        yield replace(
            empty,
            milliseconds=timing.median,
            quartiles=timing.quartiles,
            samples=timing.samples,
            terabytes_per_second=case.bytes / timing.median / 1e9,
            of_copy=over.get(COPY),
            of_copy_target=case.of.of_copy(case.shape.size) if ours else None,
            over_pytorch=None if contender == COPY else over.get(PYTORCH),
            over_pytorch_target=case.of.over_pytorch if ours else None,
            no_graphs=measured.no_graphs,
            clocks=measured.clocks,
        )


def measure_case(case: Case, device: torch.device, rounds: int) -> list[Row]:
    """Checks and then times all contenders of a case, in turn."""
    failures = {name: reason for name in OURS if (reason := refusal(partial(check, case, name, device))) is not None}
    argument_bytes = len(case.of.images) * case.bytes // case.of.moved
    inputs = [case.draw(device, seed) for seed in range(rotation(argument_bytes, device))]
    contenders = [name for name in case.contenders if name not in failures]
    measured = measure_calls({name: partial(run, case, name) for name in contenders}, inputs, device, rounds)
    measured.failures |= failures
    return list(_rows_of(case, measured))


def _against(value: float | None, target: float | None, unit: str = "") -> list[str]:
    """A value and its target, green where that is met."""
    if value is None:
        return ["", ""]
    if target is None:
        return [f"{value:.2f}{unit}", ""]
    return [f"[{'green' if value >= target else 'red'}]{value:.2f}{unit}[/]", f"{target:g}{unit}"]


def _cells(row: Row) -> list[str]:
    shape = f"{row.batch}x{row.channels}x{row.size}x{row.size}"
    if row.milliseconds is None or row.quartiles is None:
        return [shape, row.contender, "[red]none[/red]"]
    lower, upper = row.quartiles
    return [
        shape,
        row.contender,
        f"{row.milliseconds:.4f}",
        f"{lower:.4f} - {upper:.4f}",
        f"{row.terabytes_per_second:.2f}",
        *_against(row.of_copy, row.of_copy_target),
        *_against(row.over_pytorch, row.over_pytorch_target, "x"),
    ]


def tables(rows: Sequence[Row]) -> Iterator[Table]:
    """One table for each operation and dtype, with the targets."""

    def title(row: Row) -> tuple[str, str]:
        return row.operation, row.dtype

    for (operation, dtype), of_operation in groupby(sorted(rows, key=title), key=title):
        table = Table(title=f"{operation}, {dtype}")
        table.add_column("shape")
        table.add_column("contender")
        for column in ("ms", "quartiles, ms", "TB/s", "of copy", "target", "over PyTorch", "target"):
            table.add_column(column, justify="right")
        for row in of_operation:
            table.add_row(*_cells(row), end_section=row.contender == OURS[-1])
        yield table


def _parser() -> argparse.ArgumentParser:
    description = (__doc__ or "").split("\n\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.depthwise", description=description)
    parser.add_argument("--batch", type=int, nargs="+", metavar="N", help="images (64 256; quick: 64)")
    parser.add_argument("--dtype", nargs="+", metavar="NAME", help=f"{', '.join(parity.DTYPES)} (bfloat16)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"{', '.join(OPERATIONS)} (all)")
    parser.add_argument("--quick", action="store_true", help=f"one batch, {QUICK_ROUNDS} rounds instead of {ROUNDS}")
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), metavar="N", help="begin nothing that would end later (no limit)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number, the machine and the versions")
    return parser


def seconds(rounds: int) -> float:
    """What a case is expected to take: samples, and compiling, drawing, checking and warming up."""
    return SETUP_SECONDS + rounds * (3 + len(OURS)) * SAMPLE_MILLISECONDS / 1e3


@command("depthwise")
def main(arguments: list[str] | None = None) -> int:
    """Returns 0; 1 where one of our backends is wrong; 2 where arguments or machine do not allow what was asked."""
    options = _parser().parse_args(arguments)
    batches = [at_least("--batch", batch, 1) for batch in options.batch or BATCHES[: 1 if options.quick else None]]
    dtypes = names("--dtype", options.dtype, parity.DTYPES, ["bfloat16"])
    only = names("--only", options.only, OPERATIONS, tuple(OPERATIONS))
    minutes, path, device = positive("--minutes", options.minutes), writable("--json", options.json), find_gpu()
    if device is None:
        raise CommandError("needs an NVIDIA GPU that PyTorch can use; there is none")
    cases = [Case(name, *case) for *case, name in product(dtypes, batches, SHAPES, only)]
    rounds = QUICK_ROUNDS if options.quick else ROUNDS
    head = header(device, rounds=rounds)
    rows, unmeasured = measure_all(
        *(cases, lambda case: measure_case(case, device, rounds), asdict, head, path),
        *(lambda case: seconds(rounds), minutes),
    )
    return report(rows, unmeasured)


def report(rows: Sequence[Row], unmeasured: Mapping[str, str]) -> int:
    """Prints the tables and every failure once; returns the exit code."""
    out = console()
    out.print(*tables(rows))
    failures = [f"{row.operation}, {row.contender}: {row.failure}" for row in rows if row.failure]
    for reason in dict.fromkeys([*failures, *(f"{case}: {reason}" for case, reason in unmeasured.items())]):
        out.print(reason, style="red", markup=False)
    return 1 if any((row.failure or "").startswith(PARITY_FAILED) for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
