"""What the papers train with: layer-wise learning rates, their schedule, the moving average, frozen stages."""

from __future__ import annotations

import math
import re
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from convnext_kernels.checkpoints import load_checkpoint, read_checkpoint, to_official
from convnext_kernels.reference import ReferenceBlock, ReferenceConvNeXt

BLOCKS_PER_LAYER = 3
"""Blocks of a stage that share a learning rate, as in the official fine-tuning recipe."""


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks of our model and of the plain one."""
    return [module for module in model.modules() if isinstance(module, ReferenceBlock)]


def layer_of(name: str, depths: tuple[int, ...]) -> int:
    """The layer of a parameter, 0 for the stem and one more than the last block's for final norm and classifier.

    A stage is cut into layers of three blocks, the first of which also has the downsampling in front of the stage. With
    depths (3, 3, 27, 3) these are the official 12 layers.
    """
    if name.startswith(("stem.", "downsample_layers.0.")):
        return 0
    place = re.match(r"(?:downsample_layers|stages)\.(\d+)\.(\d+)", name.replace("blocks.", "stages.0."))
    stage, block = map(int, place.groups()) if place else (len(depths), 0)
    return 1 + sum(-(-depth // BLOCKS_PER_LAYER) for depth in depths[:stage]) + block // BLOCKS_PER_LAYER


def parameter_groups(
    model: ReferenceConvNeXt, lr: float, weight_decay: float, layer_decay: float
) -> list[dict[str, Any]]:
    """Groups for an optimizer: a layer's learning rate is `layer_decay` of the next one's; no weight decay for biases,
    norms, layer scale and response norm. Frozen parameters are in none."""
    last = layer_of("head.weight", model.depths)
    groups: dict[tuple[int, bool], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and not name.endswith((".gamma", ".beta"))
            groups.setdefault((layer_of(name, model.depths), decays), []).append(parameter)
    return [
        {"params": parameters, "lr": lr * layer_decay ** (last - layer), "weight_decay": weight_decay * decays}
        for (layer, decays), parameters in groups.items()
    ]


def schedule_factor(step: int, warmup: int, total: int, final: float) -> float:
    """What the learning rate is multiplied by at a step: a linear rise over `warmup` steps, then half a cosine down to
    `final` at step `total`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(total - warmup, 1)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def schedule(
    optimizer: torch.optim.Optimizer, warmup: int, total: int, final: float
) -> torch.optim.lr_scheduler.LambdaLR:
    """`schedule_factor` on every group's learning rate."""
    factor = partial(schedule_factor, warmup=warmup, total=total, final=final)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def follow(average: nn.Module, model: nn.Module, decay: float) -> None:
    """A step of the moving average: `decay` of what it was and the rest of the model's weights."""
    # `AveragedModel` would copy its count of steps to the GPU, and wait for it, in every step.
    get_ema_multi_avg_fn(decay)(list(average.parameters()), list(model.parameters()), None)


def freeze(model: ReferenceConvNeXt, stages: int) -> None:
    """Keeps the first stages, and the stem, as they are.

    Raises:
        ValueError: the model has no more stages than these.
    """
    if stages >= len(model.depths):
        raise ValueError(f"--freeze: got {stages}; accepted: less than {len(model.depths)}, the model's stages")
    for name, parameter in model.named_parameters():
        place = re.match(r"(?:downsample_layers|stages)\.(\d+)\.", name)
        parameter.requires_grad_(place is None or int(place[1]) >= stages)


@torch.no_grad()
def initialise(model: ReferenceConvNeXt, path: str, head_scale: float) -> str:
    """Loads weights to start from, in any format that `load_checkpoint` reads; a classifier of other classes than the
    model's is left out, and the model's own scaled. Returns what was done."""
    _, parameters = to_official(read_checkpoint(path))
    head = parameters.get("head.bias")
    is_other_head = head is None or len(head) != model.num_classes
    report = load_checkpoint(model, parameters, ignore_head=is_other_head)
    if is_other_head:
        model.head.weight *= head_scale
    return str(report)


def recompute_blocks(model: nn.Module) -> None:
    """Keeps no activations inside blocks for backward, which runs each block again."""
    for block in blocks_of(model):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
