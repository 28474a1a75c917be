"""Times ConvNeXt blocks and training steps on a GPU, with their peaks of memory, beside eager and torch.compile.

At the stages of ConvNeXt-T, forward (16-bit weights) and forward + backward (autocast, float32 weights) of our block,
the published one in eager PyTorch (and timm's, where that is installed) take turns in the same run, from CUDA graphs
over inputs that exceed the L2 cache; later ours and torch.compile, so that its tuning can be left out when time is up.
Ours is checked first against float64. Then whole training steps: see `benchmarks.training_step`. Without a GPU the
traffic and the arithmetic are counted, and the targets listed.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.reporting import Figure, Row, Target, add_arguments, row_of, run_cases
from benchmarks.timing import Measured, Results, measure_calls, parity_failure, refusal
from benchmarks.training_step import OURS, RECOMPUTE_HIDDEN, RECOMPUTING, SAVING, Step, measure_step, plan_step
from convnext_kernels import ConvNeXtBlock, parity
from convnext_kernels.cli.errors import at_least, command, names
from convnext_kernels.cli.measure import SAMPLE_MILLISECONDS, rotation
from convnext_kernels.cli.tasks import COMPILED, EAGER, randomise
from convnext_kernels.reference import ReferenceBlock

try:
    from timm.models.convnext import ConvNeXtBlock as TimmBlock
except (ImportError, RuntimeError):  # RuntimeError: of a torchvision that does not fit PyTorch
    TimmBlock = None

FORWARD, BACKWARD = "forward", "forward + backward"
TIMM = "timm eager"
DTYPES = {name: parity.DTYPES[name] for name in ("bfloat16", "float16")}
SIZES = {96: 56, 192: 28, 384: 14, 768: 7, 128: 56, 256: 28, 512: 14, 1024: 7, 1536: 7, 2048: 7}
"""The height and width of the maps at 224 px by channels: ConvNeXt-T's stages, and the other widths up to XL."""

DEFAULT_WIDTHS = ["96", "192", "384", "768"]

BATCH, RESOLUTION, ROUNDS = 256, 224, 12
SECONDS = {(FORWARD, False): 3, (BACKWARD, False): 6, (FORWARD, True): 14, (BACKWARD, True): 22}
"""What checks, compilation and warm-up are expected to take, by mode and whether torch.compile tunes.

Of ours the kernels are compiled before; see `benchmarks.kernels`."""

COMPILE_MODE = "max-autotune-no-cudagraphs"
"""All contenders are captured in CUDA graphs, torch.compile's without the copies that its own graphs make."""

TARGETS = {
    (FORWARD, False): {96: 3.0, 192: 3.0, 384: 1.8, 768: 1.4},
    (FORWARD, True): {96: 2.0, 192: 2.0, 384: 1.4, 768: 1.2},
    (BACKWARD, False): {96: 2.2, 192: 2.2, 384: 1.5, 768: 1.25},
    (BACKWARD, True): {96: 1.7, 192: 1.7, 384: 1.3, 768: 1.1},
}
"""Least speedups, by mode and whether over torch.compile, and by channels."""

PASSES = {FORWARD: 5, BACKWARD: 16}
"""How often an image's bytes pass through memory in fused kernels that write no hidden activations, each argument and
result once: convolution with LayerNorm 2, MLP 3; backward MLP 3, LayerNorm 3, convolution with the residual's gradient
3, filter gradient 2."""

MODES = ("forward", "backward", "step")
STEPS = {"convnext_tiny": 0.0, "convnext_large": 0.5}
"""The models whose training steps are timed, with their rates of stochastic depth; see `Step`."""

TIMM_NAMES = {"dwconv": "conv_dw", "pwconv1": "mlp.fc1", "pwconv2": "mlp.fc2"}


@dataclass(frozen=True)
class Case:
    """One block at one shape, beside eager blocks or torch.compile."""

    mode: str
    dtype: str
    batch: int
    channels: int
    size: int
    compiled: bool

    def __str__(self) -> str:
        return f"{self.mode}, {self.dtype}, {self.shape}, beside {', '.join(self.peers)}"

    @property
    def shape(self) -> str:
        return f"{self.batch}x{self.channels}x{self.size}x{self.size}"

    @property
    def backward(self) -> bool:
        return self.mode == BACKWARD

    @property
    def peers(self) -> list[str]:
        if self.compiled:
            return [COMPILED]
        return [EAGER] if TimmBlock is None else [EAGER, TIMM]

    @property
    def ours(self) -> list[str]:
        return [SAVING, RECOMPUTING] if self.backward else [OURS]

    @property
    def contenders(self) -> list[str]:
        return [*self.peers, *self.ours]

    @property
    def tokens(self) -> int:
        return self.batch * self.size**2

    @property
    def bytes(self) -> int:
        """Through memory in fused kernels, each image once for each kernel; parameters are not counted."""
        return PASSES[self.mode] * self.channels * self.tokens * DTYPES[self.dtype].itemsize

    @property
    def flops(self) -> int:
        """Of the convolution and the products; backward twice the forward's."""
        return (98 + 16 * self.channels) * self.channels * self.tokens * (3 if self.backward else 1)

    @property
    def entries(self) -> dict[str, Any]:
        """What a row says of it."""
        return {**asdict(self), "tokens": self.tokens, "bytes": self.bytes, "flops": self.flops}

    @property
    def seconds(self) -> float:
        """What its checks, compilation and warm-up are expected to take."""
        return SECONDS[self.mode, self.compiled]

    def draw(self, device: torch.device, seed: int) -> dict[str, Tensor]:
        """A random input, and the output's gradient in both dtypes that an output can have under autocast."""
        generator = torch.Generator(device).manual_seed(seed)
        size, dtype = (self.batch, self.channels, self.size, self.size), DTYPES[self.dtype]
        input, grad_output = (
            torch.randn(size, generator=generator, device=device).to(dtype, memory_format=torch.channels_last)
            for _ in range(2)
        )
        return {
            "input": input.requires_grad_(self.backward),
            str(dtype): grad_output,
            "torch.float32": grad_output.float(),
        }

    def modules(self, device: torch.device) -> dict[str, nn.Module]:
        """Every contender with the same random weights, as it is timed; eager always, since ours is checked by it."""
        torch.manual_seed(0)
        reference = ReferenceBlock(self.channels, layer_scale_init_value=1.0)
        randomise(reference)
        blocks: dict[str, nn.Module] = {EAGER: reference}
        for name in self.ours:
            recompute_hidden = RECOMPUTE_HIDDEN.get(name)
            blocks[name] = ConvNeXtBlock(self.channels, layer_scale_init_value=1.0, recompute_hidden=recompute_hidden)
            blocks[name].load_state_dict(reference.state_dict())
        if TIMM in self.peers:
            blocks[TIMM] = timm_block(reference)
        dtype = torch.float32 if self.backward else DTYPES[self.dtype]
        for block in blocks.values():
            block.to(device, dtype, memory_format=torch.channels_last).train(self.backward)
        if self.compiled:
            torch.compiler.reset()
            blocks[COMPILED] = torch.compile(copy.deepcopy(reference), mode=COMPILE_MODE, dynamic=False)
        return blocks


def timm_block(reference: ReferenceBlock) -> nn.Module:
    """timm's block with the same weights."""
    block = TimmBlock(reference.dwconv.in_channels, ls_init_value=1.0)
    states = reference.state_dict()
    for ours, theirs in TIMM_NAMES.items():
        states = {key.replace(f"{ours}.", f"{theirs}."): value for key, value in states.items()}
    block.load_state_dict(states)
    return block


def run(case: Case, module: nn.Module, tensors: Mapping[str, Tensor]) -> Results:
    """The output and, backward, the gradients of the input and of every parameter; float64 is exempt from autocast."""
    input, dtype = tensors["input"], DTYPES[case.dtype]
    autocast = case.backward and input.dtype != torch.float64
    with torch.set_grad_enabled(case.backward), torch.autocast(input.device.type, dtype, enabled=autocast):
        output = module(input)
    if not case.backward:
        return [output]
    return [output.detach(), *torch.autograd.grad(output, [input, *module.parameters()], tensors[str(output.dtype)])]


def check(case: Case, modules: Mapping[str, nn.Module], contender: str, device: torch.device) -> str | None:
    """Why one of ours gets no time: its error on two images is beyond `parity`'s limit."""
    small, dtype = replace(case, batch=2), DTYPES[case.dtype]
    tensors = small.draw(device, seed=1)
    doubles = {"input": tensors["input"].detach().double().requires_grad_(case.backward)}
    doubles["torch.float64"] = tensors["torch.float32"].double()
    exact = run(small, copy.deepcopy(modules[EAGER]).double(), doubles)
    ours, theirs = (run(small, modules[name], tensors) for name in (contender, EAGER))
    return parity_failure(ours, theirs, exact, dtype)


def _figures(case: Case, over: float | None, memory: float | None) -> list[Figure]:
    target = TARGETS[case.mode, case.compiled].get(case.channels)
    peer = COMPILED if case.compiled else "eager"
    figures = [Figure(f"speedup over {peer}", over, target and Target(target))]
    return [*figures, Figure(f"peak memory over {peer}", memory)] if case.backward else figures


def rows_of(case: Case, measured: Measured) -> Iterator[Row]:
    """A row for each contender; ours beside the fastest peer and the one of least memory."""
    timings, peaks = measured.timings, measured.peaks
    peers = [name for name in case.peers if name in timings]
    for contender in case.contenders:
        figures = []
        if contender in case.ours and contender in timings:
            over = min((timings[contender].speedup_over(timings[name]) for name in peers), default=None)
            memory = max((peaks[contender] / peaks[name] for name in peers if name in peaks), default=None)
            figures = _figures(case, over, memory)
        yield row_of(case.shape, case.entries, contender, measured, figures)


def measure_block(case: Case, device: torch.device, rounds: int) -> list[Row]:
    """Checks and then times all contenders of a case, in turn."""
    modules = case.modules(device)
    checks = {name: refusal(partial(check, case, modules, name, device)) for name in case.ours}
    failures = {name: reason for name, reason in checks.items() if reason is not None}
    inputs = [case.draw(device, 0)]
    images = inputs[0]["input"].nbytes * (2 if case.backward else 1)
    inputs += [case.draw(device, seed) for seed in range(1, rotation(images, device))]
    calls = {name: partial(run, case, modules[name]) for name in case.contenders if name not in failures}
    measured = measure_calls(calls, inputs, device, rounds, peaks=case.backward)
    measured.failures |= failures
    return list(rows_of(case, measured))


def plan_block(case: Case) -> list[Row]:
    """What would be measured of ours, with the counts and the targets."""
    counts = [Figure("MB", case.bytes / 1e6), Figure("GFLOP", case.flops / 1e9)]
    return [Row(case.shape, case.entries, name, [*counts, *_figures(case, None, None)]) for name in case.ours]


def measure(case: Case | Step, device: torch.device, rounds: int) -> list[Row]:
    """The rows of a block or of a training step."""
    return measure_step(case, device, rounds) if isinstance(case, Step) else measure_block(case, device, rounds)


def plan(case: Case | Step) -> list[Row]:
    """What would be measured, where there is no GPU."""
    return plan_step(case) if isinstance(case, Step) else plan_block(case)


def choose_cases(options: argparse.Namespace) -> list[Case | Step]:
    """What needs no torch.compile first, so that its tuning costs no other results when time is up."""
    modes = names("--mode", options.mode, MODES, MODES)
    dtypes = names("--dtype", options.dtype, DTYPES, ["bfloat16"])
    sizes = {str(channels): size for channels, size in SIZES.items()}
    widths = names("--channels", options.channels, sizes, [width for width in DEFAULT_WIDTHS if width in sizes])
    batch, step_batch = at_least("--batch", options.batch, 1), at_least("--step-batch", options.step_batch, 1)
    eager, compiled = (
        [
            Case(mode, dtype, batch, int(width), sizes[width], beside_compiled)
            for mode, dtype, width in product((FORWARD, BACKWARD), dtypes, widths)
            if mode.split()[-1] in modes
        ]
        for beside_compiled in (False, True)
    )
    steps = [Step(model, dtype, step_batch, RESOLUTION, rate) for dtype in dtypes for model, rate in STEPS.items()]
    return [*eager, *(steps if "step" in modes else ()), *(() if options.no_compile else compiled)]


def seconds(case: Case | Step, rounds: int) -> float:
    """What a case is expected to take."""
    return case.seconds + rounds * len(case.contenders) * SAMPLE_MILLISECONDS / 1e3


def _parser() -> argparse.ArgumentParser:
    description = (__doc__ or "").split("\n\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.block", description=description)
    parser.add_argument(
        "--channels", nargs="+", metavar="C", help=f"{', '.join(map(str, SIZES))} ({' '.join(DEFAULT_WIDTHS)})"
    )
    parser.add_argument("--batch", type=int, default=BATCH, metavar="N", help="images of a block (%(default)d)")
    parser.add_argument("--step-batch", type=int, default=128, metavar="N", help="of a training step (%(default)d)")
    parser.add_argument("--dtype", nargs="+", metavar="NAME", help=f"{', '.join(DTYPES)} (bfloat16)")
    parser.add_argument("--mode", nargs="+", metavar="NAME", help=f"{', '.join(MODES)} (all)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    add_arguments(parser, ROUNDS, minutes=5)
    return parser


@command("block")
def main(arguments: list[str] | None = None) -> int:
    """Returns 0; 1 where ours is wrong; 2 where the arguments do not fit."""
    options = _parser().parse_args(arguments)
    return run_cases(options, choose_cases(options), measure, plan, partial(seconds, rounds=options.rounds))


if __name__ == "__main__":
    sys.exit(main())
