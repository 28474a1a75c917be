"""Predicts the throughput of whole models from counts: bytes, operations, and the instructions of compiled kernels.

A model's time is the sum over its kernels in inference; each takes the longest of its bytes by the memory's speed, its
products by the published peak, and, for the depthwise convolution, the clocks that `benchmarks.static_report` counted.
Nothing is run. What really happens takes longer: see `LEFT_OUT`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernel_work import WORK, Shape
from convnext_kernels.ops.mlp.configs import fused_config
from convnext_kernels.variants import VARIANTS, Variant

STATIC_REPORT = Path(__file__).parent / "results" / "static_report.json"
BATCH, RGB = 256, 3

LEFT_OUT = (
    "launches, latencies, caches, unfilled tiles, what the products' kernels do besides multiplying, and clocks that "
    "fall under load, and take every product at the data sheet's peak: no run reaches them"
)

PAPER = {
    ("convnext_tiny", 224): 1943.5,
    ("convnext_small", 224): 1275.3,
    ("convnext_base", 224): 969.0,
    ("convnext_large", 224): 611.5,
    ("convnext_xlarge", 224): 424.4,
    ("convnext_base", 384): 336.6,
    ("convnext_large", 384): 211.4,
    ("convnext_xlarge", 384): 147.4,
}
"""Images per second on an A100 in TF32 and channels-last: ConvNeXt, arXiv 2201.03545, table 12."""


@dataclass(frozen=True)
class Precision:
    """A dtype as kernels see it, and which of `WORK`'s convolutions it takes."""

    name: str
    dtype: torch.dtype
    convolution: str


TF32 = Precision("TF32", torch.float32, "depthwise_conv_forward_on_cuda_cores<Traits<float, 7>>")
HALF = Precision("16 bits", torch.float16, "depthwise_conv_forward<Traits<*, 7, false>>")

PEAKS = {("80", TF32): 156e12, ("80", HALF): 312e12, ("90a", TF32): 494.5e12, ("90a", HALF): 989e12}
"""Operations per second of dense products: NVIDIA's data sheets of the A100 and the H200."""


@dataclass(frozen=True)
class Gpu:
    """What static_report.json assumes of a GPU and counted for it."""

    architecture: str
    assumed: dict[str, Any]
    kernels: dict[str, list[dict[str, Any]]]

    @property
    def name(self) -> str:
        return self.assumed["name"]

    def memory_seconds(self, elements: float, precision: Precision) -> float:
        """Of elements that pass through memory."""
        return elements * precision.dtype.itemsize / self.assumed["bytes_per_second"]

    def product_seconds(self, elements: float, flops: float, precision: Precision) -> float:
        """Of a kernel that multiplies matrices and reads and writes so many elements."""
        return max(self.memory_seconds(elements, precision), flops / PEAKS[self.architecture, precision])

    def convolution_seconds(self, shape: Shape, images: int, precision: Precision) -> float:
        """By the slowest pipe or memory; a map that was not predicted takes more or fewer passes through the loop."""
        (loop,) = WORK[precision.convolution].loops
        predictions = self.kernels[precision.convolution.replace("*", "__half")]
        nearest = min(predictions, key=lambda known: abs(known["size"] - shape.size))
        passes = loop.passes(shape) / loop.passes(Shape(nearest["channels"], nearest["size"]))
        clocks = max(passes * max(nearest["clocks"].values()), nearest["memory"])
        outputs = images * shape.channels * shape.size**2
        return outputs * clocks / self.assumed["multiprocessors"] / self.assumed["hertz"]


def gpus(path: Path = STATIC_REPORT) -> list[Gpu]:
    """The GPUs of a static report."""
    report = json.loads(path.read_text())
    return [
        Gpu(
            architecture,
            assumed,
            {
                kernel["kernel"]: kernel["predicted"]
                for kernel in report["kernels"]
                if kernel["architecture"] == architecture
            },
        )
        for architecture, assumed in report["assumed"].items()
    ]


def _mlp_seconds(gpu: Gpu, channels: int, tokens: int, precision: Precision) -> float:
    """With norm, layer scale and residual: one kernel where the library has one, else a norm and two products."""
    weights, flops = 8 * channels**2, 16 * channels**2 * tokens
    if precision is HALF and fused_config(channels, int(gpu.architecture.rstrip("a"))) is not None:
        return gpu.product_seconds(3 * channels * tokens + weights, flops, precision)
    norm = gpu.memory_seconds(2 * channels * tokens, precision)
    first = gpu.product_seconds(5 * channels * tokens + weights / 2, flops / 2, precision)
    return norm + first + gpu.product_seconds(6 * channels * tokens + weights / 2, flops / 2, precision)


def _stages(variant: Variant, resolution: int) -> Iterator[tuple[int, Shape]]:
    for stage, (depth, channels) in enumerate(zip(variant.depths, variant.dims, strict=True)):
        yield depth, Shape(channels, resolution // 4 >> stage)


def _patches_seconds(gpu: Gpu, inputs: int, shape: Shape, images: int, precision: Precision) -> float:
    """The stem, whose results are normalised, or downsampling, whose input is: a norm and a product of patches."""
    is_stem, tokens = inputs == RGB, images * shape.size**2
    width = inputs * (16 if is_stem else 4)
    norm = gpu.memory_seconds(2 * tokens * (shape.channels if is_stem else width), precision)
    elements = tokens * (width + shape.channels) + width * shape.channels
    return norm + gpu.product_seconds(elements, 2 * tokens * width * shape.channels, precision)


def images_per_second(gpu: Gpu, model: str, resolution: int, precision: Precision, images: int = BATCH) -> float:
    """Of a V1 model with four stages, in inference."""
    variant = VARIANTS[model]
    seconds, inputs = 0.0, RGB
    for depth, shape in _stages(variant, resolution):
        tokens = images * shape.size**2
        seconds += _patches_seconds(gpu, inputs, shape, images, precision)
        block = gpu.convolution_seconds(shape, images, precision)
        seconds += depth * (block + _mlp_seconds(gpu, shape.channels, tokens, precision))
        inputs = shape.channels
    seconds += gpu.memory_seconds(tokens * inputs + 1000 * inputs, precision)  # the head reads the last maps once
    return images / seconds


def table(path: Path = STATIC_REPORT) -> str:
    """The Markdown table, beside the paper's own figures, with what it leaves out as its caption."""
    devices, precisions = gpus(path), (TF32, HALF)
    columns = [(gpu, precision) for gpu in devices for precision in precisions]
    assumed = "; ".join(
        f"{gpu.name} {' and '.join(f'{PEAKS[gpu.architecture, precision] / 1e12:g}' for precision in precisions)} "
        f"TFLOP/s in {' and '.join(precision.name for precision in precisions)}, "
        f"{gpu.assumed['bytes_per_second'] / 1e12:g} TB/s"
        for gpu in devices
    )
    heads = ["model", "paper, A100, TF32", *(f"{gpu.name}, {precision.name}, bound" for gpu, precision in columns)]
    lines = [
        "Upper bounds, predicted and not measured: images per second in inference, from counted bytes, operations and "
        f"instructions, and from peaks ({assumed}). They leave out {LEFT_OUT}. The paper's column was measured.",
        "",
        f"| {' | '.join(heads)} |",
        f"| --- |{' --: |' * (len(heads) - 1)}",
    ]
    for (model, resolution), published in PAPER.items():
        cells = [f"{images_per_second(gpu, model, resolution, precision):.0f}" for gpu, precision in columns]
        lines.append(f"| {model} at {resolution} px | {published:.1f} | {' | '.join(cells)} |")
    return "\n".join(lines)
