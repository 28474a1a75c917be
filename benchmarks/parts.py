"""The parts of `python -m benchmarks` as data: what each runs, for how long, and what its results rest on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from benchmarks.record import bench_results, depthwise_results, dispatch_results, results
from convnext_kernels.variants import VARIANTS

BLOCK = frozenset({"convnext_block", "depthwise_conv2d", "depthwise_conv2d_layer_norm", "layer_norm", "mlp"})
"""The operators that a block rests on."""

DEPTHWISE = {"layer_norm_backward": "layer_norm", "conv_layer_norm": "depthwise_conv2d_layer_norm"}
"""Of the modes of `benchmarks.depthwise` those that are not the convolution's."""

BENCH = "convnext_kernels.cli"
WIDTHS = ("96", "192", "384", "768", "128", "256", "512", "1024", "1536", "2048")


def _of_model(case: dict[str, Any]) -> frozenset[str]:
    variant = VARIANTS[case["model"]]
    return BLOCK | {"patch_linear"} | ({"global_response_norm"} if variant.use_grn else frozenset())


@dataclass(frozen=True)
class Part:
    """A module that is run as a process of its own, so that it can neither hang nor spoil the others.

    Attributes:
        does: in words, for the plan and the report.
        minutes: its share of the run's minutes.
        limits_itself: whether it takes `--minutes`.
        output: its option for the JSON that it writes.
        gpu: whether it is for a GPU, or for machines without one.
        read: results from the JSON that it writes.
        operators: what a case rests on.
    """

    name: str
    does: str
    module: str
    minutes: float
    arguments: tuple[str, ...] = ()
    limits_itself: bool = True
    gpu: bool = True
    output: str = "--json"
    read: Callable[[dict[str, Any]], Iterable[dict[str, Any]]] = results
    operators: Callable[[dict[str, Any]], frozenset[str]] = lambda case: frozenset()


def _on_a_cpu(name: str, does: str, minutes: float, *arguments: str) -> Part:
    command = ("bench", "--device", "cpu", "--no-compile", *arguments)
    return Part(
        *(name, does, BENCH, minutes, command),
        limits_itself=False,
        gpu=False,
        read=bench_results,
        operators=_of_model,
    )


PARTS = (
    Part("library", "finds the compiled library or builds it", "benchmarks.library", 1.0, limits_itself=False),
    Part(
        *("kernels", "compiles the Triton kernels of blocks, on all cores", "benchmarks.kernels", 0.5),
        limits_itself=False,
    ),
    Part("parity", "the operators' tests that are marked gpu, what tells most first", "benchmarks.gpu_tests", 0.75),
    Part("ceilings", "a large copy, large products in bfloat16 and float16", "benchmarks.ceilings", 0.25),
    Part(
        *("depthwise", "depthwise convolution and LayerNorm beside a copy and PyTorch", "benchmarks.depthwise", 0.75),
        arguments=("--quick", "--batch", "256", "--dtype", "bfloat16", "float16"),
        read=depthwise_results,
        operators=lambda case: frozenset({DEPTHWISE.get(case["mode"], "depthwise_conv2d")}),
    ),
    Part(
        *("mlp", "the MLP beside its floor, bare products and PyTorch", "benchmarks.mlp", 0.5, ("--rounds", "6")),
        operators=lambda case: frozenset({"mlp"}),
    ),
    Part(
        *("blocks", "a block of every width beside eager", "benchmarks.block", 0.5),
        arguments=("--rounds", "6", "--mode", "forward,backward", "--no-compile", "--channels", *WIDTHS),
        operators=lambda case: BLOCK,
    ),
    Part(
        *("models", "whole models beside eager, timm, torchvision and transformers", "benchmarks.models", 2.25),
        operators=_of_model,
    ),
    Part(
        *("compiled", "whole models beside torch.compile, default and max-autotune", "benchmarks.models", 1.5),
        arguments=("--compile",),
        operators=_of_model,
    ),
    Part(
        *("dispatch", "the host side of every operator's call, without its kernels", "pytest", 0.5),
        arguments=("tests/test_dispatch_overhead.py", "--benchmark-only", "-q", "-n0"),
        limits_itself=False,
        gpu=False,
        output="--benchmark-json",
        read=dispatch_results,
    ),
    _on_a_cpu(
        *("cpu_models", "the smallest models on tiny images, where the calls themselves count", 0.75),
        *("--model", "convnext_atto,convnextv2_atto", "--batch-size", "2", "--resolution", "64"),
    ),
    _on_a_cpu(
        *("cpu_blocks", "the blocks of ConvNeXt-T's stages, one image", 0.75),
        *("--model", "convnext_tiny", "--mode", "block", "--batch-size", "1", "--runs", "5"),
    ),
)
