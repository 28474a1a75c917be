"""Times the MLP on a GPU, beside the least time that its memory traffic and its products could take.

At the widths and token counts of the models' stages, PyTorch, our kernels, the bare matrix products alone, a large copy
and a large product take turns in the same run, from CUDA graphs over inputs that exceed the L2 cache. The floor is the
larger of the bytes at the copy's rate and the products at the large product's. Ours is checked first against float64.
Without a GPU the traffic and the arithmetic are counted, and the targets listed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product

import torch
from torch import Tensor

from benchmarks.reporting import Figure, Row, Target, add_arguments, row_of, run_cases
from benchmarks.timing import (
    Measured,
    Results,
    Tensors,
    floor,
    measure_calls,
    parity_failure,
    refusal,
)
from convnext_kernels import functional, parity
from convnext_kernels.cli.errors import at_least, command, names
from convnext_kernels.cli.measure import SAMPLE_MILLISECONDS, rotation
from convnext_kernels.variants import VARIANTS

FORWARD, BACKWARD = "forward", "forward + backward"
COPY, LARGE_PRODUCT, PRODUCTS, PYTORCH = "copy", "large product", "bare products", "PyTorch"
OURS = ("cuda", "triton")
DTYPES = {name: parity.DTYPES[name] for name in ("bfloat16", "float16")}
CHANNELS = (96, 192, 384, 768, 128, 256, 512, 1024, 1536)
"""Those of ConvNeXt-T first."""

MODELS = ("tiny", "small", "base", "large", "xlarge")
BATCHES = (128, 256)
LEAST_TOKENS, MOST_TOKENS = 100_352, 802_816

ROUNDS, SETUP_SECONDS = 12, {FORWARD: 3, BACKWARD: 11}
COPY_BYTES, PRODUCT_SIZE = 2**30, 8192
PARITY_TOKENS = 4099
"""No multiple of a tile."""

ARGUMENTS = ("input", "weight1", "bias1", "weight2", "bias2", "layer_scale", "residual")


def floor_target(channels: int) -> Target | None:
    """How many times the floor the forward may take."""
    if channels >= 384:
        return Target(1.25, at_most=True)
    return Target(1.6, at_most=True) if channels <= 192 else None


def stage_tokens(channels: int) -> list[int]:
    """The tokens of the models' stages of that width at 224 px, of those in question; the least of these if none is."""
    counts = {
        batch * (56 >> stage) ** 2
        for model, batch in product(MODELS, BATCHES)
        for stage, width in enumerate(VARIANTS[f"convnext_{model}"].dims)
        if width == channels
    }
    return sorted(count for count in counts if LEAST_TOKENS <= count <= MOST_TOKENS) or [LEAST_TOKENS]


@dataclass(frozen=True)
class Case:
    """The MLP of one width on so many tokens."""

    mode: str
    dtype: str
    channels: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.mode}, {self.dtype}, {self.shape}"

    @property
    def shape(self) -> str:
        return f"{self.tokens} tokens x {self.channels}"

    @property
    def backward(self) -> bool:
        return self.mode == BACKWARD

    @property
    def bytes(self) -> int:
        """Through memory if hidden activations never are: input, residual and output; backward the output's gradient,
        the input and its gradient; both weights, backward once more and their gradients."""
        elements = 3 * self.channels * self.tokens + 8 * self.channels**2
        if self.backward:
            elements += 3 * self.channels * self.tokens + 2 * 8 * self.channels**2
        return elements * DTYPES[self.dtype].itemsize

    @property
    def flops(self) -> int:
        """Of the two products, backward of four more; none is computed twice."""
        return (48 if self.backward else 16) * self.channels**2 * self.tokens

    @property
    def entries(self) -> dict[str, object]:
        """What a row says of it."""
        return {**asdict(self), "bytes": self.bytes, "flops": self.flops}

    def draw(self, device: torch.device, seed: int) -> dict[str, Tensor]:
        """Random arguments; layer scale near 1, so that the residual hides nothing."""
        generator = torch.Generator(device).manual_seed(seed)
        normal = partial(torch.randn, generator=generator, device=device)
        channels, hidden, dtype = self.channels, 4 * self.channels, DTYPES[self.dtype]
        tokens = (1, self.tokens, channels)
        tensors = {
            "input": normal(tokens),
            "residual": normal(tokens),
            "weight1": normal(hidden, channels) / channels**0.5,
            "bias1": 0.1 * normal(hidden),
            "weight2": normal(channels, hidden) / hidden**0.5,
            "bias2": 0.1 * normal(channels),
            "layer_scale": 1 + 0.1 * normal(channels),
            "grad_output": normal(tokens),
        }
        return self.leaves({name: tensor.to(dtype) for name, tensor in tensors.items()})

    def leaves(self, tensors: Tensors) -> dict[str, Tensor]:
        """The tensors, detached, those that backward gives a gradient of as leaves."""
        return {
            name: tensor.detach().requires_grad_(self.backward and name in ARGUMENTS)
            for name, tensor in tensors.items()
        }


def ceilings(dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Buffers of a large copy, factors of a large product, random."""
    source = torch.randn(COPY_BYTES // 4, device=device)
    factors = torch.randn(2, PRODUCT_SIZE, PRODUCT_SIZE, device=device).to(dtype)
    return {"source": source, "destination": torch.empty_like(source), "left": factors[0], "right": factors[1]}


def bare_products(case: Case, tensors: Tensors) -> Results:
    """The products of the MLP, with nothing else: two, backward four more."""
    tokens, weight1, weight2 = tensors["input"][0], tensors["weight1"], tensors["weight2"]
    hidden = torch.mm(tokens, weight1.t())
    results = [torch.mm(hidden, weight2.t())]
    if case.backward:
        grads = tensors["grad_output"][0]
        grad_hidden = torch.mm(grads, weight2)
        results += [torch.mm(grads.t(), hidden), torch.mm(grad_hidden.t(), tokens), torch.mm(grad_hidden, weight1)]
    return results


def mlp(case: Case, function: Callable[..., Tensor], tensors: Tensors) -> Results:
    """The output and, backward, the gradient of every argument."""
    arguments = {name: tensors[name] for name in ARGUMENTS}
    with torch.set_grad_enabled(case.backward):
        output = function(**arguments)
    if not case.backward:
        return [output]
    return [output.detach(), *torch.autograd.grad(output, list(arguments.values()), tensors["grad_output"])]


def run(case: Case, contender: str, tensors: Tensors) -> Results:
    """One call of a contender."""
    if contender in OURS:
        return mlp(case, partial(functional.mlp, backend=contender), tensors)
    if contender == PYTORCH:
        return mlp(case, parity.DEFINITIONS["mlp"], tensors)
    with torch.no_grad():
        if contender == PRODUCTS:
            return bare_products(case, tensors)
        if contender == LARGE_PRODUCT:
            return [torch.mm(tensors["left"], tensors["right"])]
        return [tensors["destination"].copy_(tensors["source"])]


def check(case: Case, contender: str, device: torch.device) -> str | None:
    """Why one of our backends gets no time: its error on fewer tokens is beyond `parity`'s limit."""
    small = replace(case, tokens=PARITY_TOKENS)
    tensors = small.draw(device, seed=1)
    exact = run(small, PYTORCH, small.leaves({name: tensor.double() for name, tensor in tensors.items()}))
    return parity_failure(run(small, contender, tensors), run(small, PYTORCH, tensors), exact, DTYPES[case.dtype])


def _ours_figures(case: Case, over_floor: float | None, over: Mapping[str, float | None]) -> list[Figure]:
    """With None for what was not measured."""
    targeted = not case.backward
    return [
        Figure("time over floor", over_floor, floor_target(case.channels) if targeted else None),
        Figure(f"speedup over {PRODUCTS}", over.get(PRODUCTS), Target(1) if targeted else None),
        Figure(f"speedup over {PYTORCH}", over.get(PYTORCH)),
    ]


def rows_of(case: Case, measured: Measured) -> Iterator[Row]:
    """A row for each contender."""
    timings = measured.timings
    bounds = {
        COPY: case.bytes / (2 * COPY_BYTES),
        LARGE_PRODUCT: case.flops / (2 * PRODUCT_SIZE**3),
    }
    known = [(share, timings[name]) for name, share in bounds.items() if name in timings]
    least = floor(known) if len(known) == len(bounds) else None
    for contender in (COPY, LARGE_PRODUCT, PRODUCTS, PYTORCH, *OURS):
        timing, figures = timings.get(contender), []
        if timing is not None and contender in OURS:
            over_floor = None if least is None else least.speedup_over(timing)
            peers = [name for name in (PRODUCTS, PYTORCH) if name in timings]
            figures = _ours_figures(case, over_floor, {name: timing.speedup_over(timings[name]) for name in peers})
        yield row_of(case.shape, case.entries, contender, measured, figures)


def measure_case(case: Case, device: torch.device, rounds: int) -> list[Row]:
    """Checks and then times all contenders of a case, in turn."""
    failures = {name: reason for name in OURS if (reason := refusal(partial(check, case, name, device))) is not None}
    dtype = DTYPES[case.dtype]
    images = 2 * case.channels * case.tokens * dtype.itemsize
    limits = ceilings(dtype, device)
    inputs = [{**case.draw(device, seed), **limits} for seed in range(rotation(images, device))]
    contenders = [name for name in (COPY, LARGE_PRODUCT, PRODUCTS, PYTORCH, *OURS) if name not in failures]
    measured = measure_calls({name: partial(run, case, name) for name in contenders}, inputs, device, rounds)
    measured.failures |= failures
    return list(rows_of(case, measured))


def plan(case: Case) -> list[Row]:
    """What would be measured of ours, with the counts and the targets."""
    counts = [Figure("MB", case.bytes / 1e6), Figure("GFLOP", case.flops / 1e9)]
    return [Row(case.shape, case.entries, "ours", [*counts, *_ours_figures(case, None, {})])]


def seconds(case: Case, rounds: int) -> float:
    """What a case is expected to take: samples, and compiling, drawing, checking and warming up."""
    return rounds * (4 + len(OURS)) * SAMPLE_MILLISECONDS / 1e3 + SETUP_SECONDS[case.mode]


def _parser() -> argparse.ArgumentParser:
    description = (__doc__ or "").split("\n\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mlp", description=description)
    parser.add_argument("--channels", type=int, nargs="+", metavar="C", help=f"({' '.join(map(str, CHANNELS))})")
    parser.add_argument("--tokens", type=int, nargs="+", metavar="N", help="(those of the models' stages)")
    parser.add_argument("--dtype", nargs="+", metavar="NAME", help=f"{', '.join(DTYPES)} (bfloat16)")
    parser.add_argument("--mode", nargs="+", metavar="NAME", help="forward, backward (both)")
    add_arguments(parser, ROUNDS, minutes=5)
    return parser


def choose_cases(options: argparse.Namespace) -> list[Case]:
    """At the largest token count of every width forward, then forward + backward; forward at the others."""
    modes = names("--mode", options.mode, ("forward", "backward"), ("forward", "backward"))
    dtypes = names("--dtype", options.dtype, DTYPES, ["bfloat16"])
    channels = [at_least("--channels", width, 1) for width in options.channels or CHANNELS]
    tokens = [at_least("--tokens", count, 1) for count in options.tokens or ()]
    largest, others = [], []
    for dtype, width in product(dtypes, channels):
        *fewer, most = sorted(tokens or stage_tokens(width))
        largest.append(Case(FORWARD, dtype, width, most))
        others += [Case(FORWARD, dtype, width, count) for count in fewer]
    backward = [replace(case, mode=BACKWARD) for case in largest]
    if "forward" not in modes:
        return backward
    return [*largest, *(backward if "backward" in modes else ()), *others]


@command("mlp")
def main(arguments: list[str] | None = None) -> int:
    """Returns 0; 1 where one of our backends is wrong; 2 where the arguments do not fit."""
    options = _parser().parse_args(arguments)
    return run_cases(options, choose_cases(options), measure_case, plan, partial(seconds, rounds=options.rounds))


if __name__ == "__main__":
    sys.exit(main())
