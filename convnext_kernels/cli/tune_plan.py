"""Which kernels `tune` measures, and in which order: those that take most of the models' time first."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import torch

from convnext_kernels.backends import machine_reasons
from convnext_kernels.cli.workloads import PRECISIONS, Workload, workloads
from convnext_kernels.ops.common.launch import architecture
from convnext_kernels.ops.common.tuning import Name
from convnext_kernels.variants import VARIANTS

BATCH = 64
FIRST_MAP, ISOTROPIC_MAP = 56, 14
"""Height and width of the first stage's maps, and of an isotropic model's, for images of 224 pixels."""

PREDICTED_ARCHITECTURE = 90


@dataclass(frozen=True)
class Stage:
    """So many blocks of one size, on maps of that height and width, with GRN or without."""

    depth: int
    channels: int
    width: int
    grn: bool


def stages_of(model: str) -> list[Stage]:
    """A published model's."""
    variant = VARIANTS[model]
    return [
        Stage(depth, channels, ISOTROPIC_MAP if variant.isotropic else FIRST_MAP >> stage, variant.use_grn)
        for stage, (depth, channels) in enumerate(zip(variant.depths, variant.dims, strict=True))
    ]


def stages_of_width(channels: int) -> list[Stage]:
    """One block of every kind that the published models have of that width; of any width a single one."""
    known = {stage for model in VARIANTS for stage in stages_of(model) if stage.channels == channels}
    blocks = {Stage(1, stage.channels, stage.width, stage.grn) for stage in known}
    return sorted(blocks, key=lambda stage: (stage.width, stage.grn)) or [Stage(1, channels, ISOTROPIC_MAP, True)]


def _is_replaced(workload: Workload, device: torch.device) -> bool:
    """Whether the compiled library runs in place of a kernel of Triton's, which is then launched only by name."""
    operator, dtype = workload.tunable.name.split(".")[0], PRECISIONS[workload.precision][0]
    in_cuda = find_spec(f"convnext_kernels.ops.{operator}.cuda_kernel") is not None
    return in_cuda and device.type == "cuda" and not machine_reasons("cuda", device, dtype, False)


def planned(networks: Collection[Sequence[Stage]], precisions: Sequence[str], device: torch.device) -> list[Workload]:
    """Every kernel to be measured, once for each key: by its predicted share in the networks' time, which all weigh
    the same; last those that the compiled library replaces on that device."""
    target = architecture(device) if device.type == "cuda" else PREDICTED_ARCHITECTURE
    found: dict[Name, Workload] = {}
    shares: defaultdict[Name, float] = defaultdict(float)
    for precision in precisions:
        for network in networks:
            seconds: defaultdict[Name, float] = defaultdict(float)
            for stage in network:
                image = BATCH, stage.channels, stage.width, stage.width
                for workload in workloads(image, precision, target, stage.grn):
                    if len(workload.tunable.candidates(workload.key)) > 1:
                        found.setdefault(workload.name, workload)
                        seconds[workload.name] += stage.depth * workload.seconds
            total = sum(seconds.values())
            for name, of_kernel in seconds.items():
                shares[name] += of_kernel / total
    return sorted(found.values(), key=lambda workload: (_is_replaced(workload, device), -shares[workload.name]))
