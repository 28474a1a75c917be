"""A record as `python -m benchmarks` would write it on a GPU, with invented times: for tests of what reads records."""

import random
from collections.abc import Iterator
from typing import Any

from benchmarks import block, ceilings, depthwise, mlp, models
from benchmarks.kernel_work import SHAPES
from benchmarks.parts import PARTS, WIDTHS, Part
from benchmarks.record import FORMAT, KIND
from benchmarks.suite import DONE, LEFT_OUT
from benchmarks.timing import Measured
from convnext_kernels.cli.measure import Timing
from convnext_kernels.cli.tasks import EAGER, OURS
from convnext_kernels.variants import VARIANTS

BYTES_PER_MS, FLOPS_PER_MS = 4.0e9, 6.5e11
SLOWNESS = {
    **{"cuda": 1.3, "triton": 1.6, "ours": 1.35, "ours, saving": 1.35, "ours, recomputing": 1.5, OURS: 1.4},
    **{"copy": 1.0, "large product": 1.0, "bare products": 1.5, "PyTorch": 3.6, EAGER: 3.4, "timm eager": 3.6},
    **{"torchvision eager": 3.5, "transformers eager": 3.9, "torch.compile": 2.4, "torch.compile max-autotune": 2.1},
    **{depthwise.NO_BIAS: 3.0, **{name: 1.4 for name in models.INSIDE}},
    **{name: 0.9 if name.startswith(OURS) else 2.5 for name in models.GRAPHED},
}
"""Times the least that memory and arithmetic allow."""


def measured(contenders, milliseconds: float, memory: float, seed: str) -> Measured:
    """Invented times and peaks of contenders."""
    draw = random.Random(seed)
    times = {
        name: Timing([milliseconds * SLOWNESS[name] * draw.uniform(0.94, 1.06) for _ in range(6)])
        for name in contenders
    }
    peaks = {name: int(memory * (0.4 if name.startswith(("ours", OURS)) else 1)) for name in contenders}
    return Measured(times, peaks=peaks, clocks={"clocks.sm": "1980", "temperature.gpu": "45"})


def least(bytes: float, flops: float) -> float:
    """Milliseconds."""
    return max(bytes / BYTES_PER_MS, flops / FLOPS_PER_MS)


def of_models(arguments: list[str]) -> Iterator[dict[str, Any]]:
    for case in models.choose_cases(models._parser().parse_args(arguments)):
        if case.compiler is not None and (case.dtype != "bfloat16" or case.model not in TUNED_MODELS):
            continue
        variant = VARIANTS[case.model]
        stages = zip(variant.depths, variant.dims, strict=True)
        flops = sum(16 * depth * width**2 * 49 * (16 if variant.isotropic else 1) for depth, width in stages)
        flops *= case.batch * (case.resolution / 224) ** 2 * (3 if case.mode == models.STEP else 1)
        flops *= 8 if case.dtype == models.TF32 else 4
        contenders = [name for name in case.contenders if "torchvision" not in name or case.model in TORCHVISION]
        memory = case.batch * sum(variant.depths) * variant.dims[0] * 56**2 * 40
        times = measured(contenders, flops / FLOPS_PER_MS + 0.4, memory, str(case))
        yield from (row.as_dict() for row in models.rows_of(case, times))


TORCHVISION = ("convnext_tiny", "convnext_small", "convnext_base", "convnext_large")
TUNED_MODELS = ("convnext_tiny", "convnext_base")


def of_depthwise() -> Iterator[dict[str, Any]]:
    for name in depthwise.OPERATIONS:
        for shape in SHAPES:
            case = depthwise.Case(name, "bfloat16", 256, shape)
            times = measured(case.contenders, least(case.bytes, 98 * case.elements), 0, str(case))
            yield from (depthwise.asdict(row) for row in depthwise._rows_of(case, times))


def of_mlp() -> Iterator[dict[str, Any]]:
    for case in mlp.choose_cases(mlp._parser().parse_args([])):
        contenders = [mlp.LARGE_PRODUCT, mlp.PRODUCTS, mlp.PYTORCH, "triton"]
        times = measured(contenders, least(case.bytes, case.flops), 0, str(case))
        times.timings[mlp.COPY] = Timing([2 * mlp.COPY_BYTES / BYTES_PER_MS] * 6)
        times.failures["cuda"] = "not available: mlp: backend 'cuda' cannot run this call: there is no such kernel"
        yield from (row.as_dict() for row in mlp.rows_of(case, times))


def of_blocks() -> Iterator[dict[str, Any]]:
    options = block._parser().parse_args(["--mode", "forward,backward", "--no-compile", "--channels", *WIDTHS])
    for case in block.choose_cases(options):
        times = measured(case.contenders, least(case.bytes, case.flops), 4 * case.bytes, str(case))
        yield from (row.as_dict() for row in block.rows_of(case, times))


def of_ceilings() -> Iterator[dict[str, Any]]:
    for dtype in ("bfloat16", "float16"):
        times = Measured()
        times.timings[mlp.COPY] = Timing([2 * mlp.COPY_BYTES / BYTES_PER_MS] * 6)
        times.timings[mlp.LARGE_PRODUCT] = Timing([2 * mlp.PRODUCT_SIZE**3 / FLOPS_PER_MS] * 6)
        case = ceilings.Case(dtype)
        yield from (row.as_dict() for row in ceilings.rows_of(case, times))


def _content(part: Part) -> dict[str, Any]:
    makers = {"ceilings": of_ceilings, "depthwise": of_depthwise, "mlp": of_mlp, "blocks": of_blocks}
    if part.module == "benchmarks.models":
        rows = of_models(list(part.arguments))
    else:
        rows = makers.get(part.name, lambda: iter(()))()
    return {"results": list(rows), "unmeasured": {}}


def gpu_record() -> dict[str, Any]:
    """Every part of a GPU, with invented times; one case was left out for the time."""
    parts = {}
    for part in PARTS:
        results = list(part.read(_content(part))) if part.gpu else []
        state, reason = (DONE, None) if part.gpu else (LEFT_OUT, "for machines without a GPU")
        entry = {"state": state, "reason": reason, "does": part.does, "seconds": 60.0 * part.minutes}
        parts[part.name] = entry | {"results": results, "unmeasured": {}}
    parts["models"]["unmeasured"] = {"inference, tf32, one": "left out for the time: 2 minutes"}
    versions = {"convnext_kernels": "0.1.0", "python": "3.11.7", "torch": "2.15.0", "triton": "3.9.0", "cuda": "13.2"}
    return {
        **{"kind": KIND, "format": FORMAT, "state": "complete", "gpu": True, "device": "Invented GPU"},
        **{"driver": "580.1", "machine": {"gpus": [], "cpu": "Invented CPU"}, "versions": versions},
        **{"commit": "0123456789abcdef", "date": "2026-01-02T03:04:05+00:00", "minutes": 8.0, "parity": {}},
        **{"clocks": {"clocks.sm": "1980"}, "parts": parts},
    }
