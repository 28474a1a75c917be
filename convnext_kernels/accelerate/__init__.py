"""Running the ConvNeXt blocks of models that other libraries built on our kernels, and taking it back."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from itertools import pairwise

from torch import nn

from convnext_kernels.accelerate.plan import ALREADY, Filter, Step, plan_blocks, plan_norms
from convnext_kernels.accelerate.report import Report
from convnext_kernels.accelerate.swap import Swapped, restore_obstacle, swap, unswap

__all__ = ["Report", "accelerate", "restore"]


def accelerate(model: nn.Module, *, filter: Filter | None = None, float32_residual: bool = False) -> Report:
    """Lets every ConvNeXt block of a model, and the layer norms beside its stem's and downsampling convolutions, run
    our kernels, in place.

    Known are the blocks of the official repositories (V1, V2, isotropic, detection, segmentation), timm, torchvision,
    transformers (ConvNeXT, ConvNeXTV2, DINOv3, memory fusers), dinov3, SAM 2 and mmpretrain, and copies of them: what
    counts is how a block is built, not where it was imported from. Before a swap it is tried on a copy of the block
    with random parameters in float64; a block that computes anything else than ours is left as it was.

    A swapped module keeps its place, class (for isinstance), name, parameters, their names and hooks on itself; only
    its forward is ours. Copies, pickles, `.to()`, checkpointing, DDP, FSDP2, torch.compile, torch.export,
    torch.fx.symbolic_trace and torch.jit.trace work; torch.jit.script restores what it compiles, with a warning. Drop
    path is drawn by the host's own module, so that a seed gives the same masks. While hooks, parametrisations, other
    modules or other attributes (of convolutions, GELU, dropout) lie in a block, its host's forward runs, with a
    warning. Under autocast, blocks that follow each other hand on 16-bit tensors, and the last of a row returns
    float32, as the host's do; with `float32_residual` all of them do, as all of the host's.

    Args:
        model: any module that has such blocks, or is one.
        filter: called with the name and module of each block or norm; where it returns false that one is left alone.
        float32_residual: of the blocks that are converted, see `functional.convnext_block`.

    Returns:
        The names of what was converted; of blocks that were not, with the reasons.

    Raises:
        TypeError: `model` is no module. Whatever stops a swap midway; the model is then as it was before.

    Warns:
        UserWarning: nothing in the model was accelerated.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}; accepted: a torch.nn.Module")
    blocks = dict(plan_blocks(model, filter))
    skipped = {name: reason for name, reason in blocks.items() if isinstance(reason, str)}
    plan = {name: step for name, step in blocks.items() if isinstance(step, Step)}
    if plan or ALREADY in skipped.values():
        plan.update(plan_norms(model, blocks, filter))
    _carry_out(plan.values(), float32_residual)
    _chain(model)
    report = Report(tuple(plan), skipped, {name: step.host for name, step in plan.items()})
    if not plan and set(skipped.values()) != {ALREADY}:
        found = f"\n{report}" if skipped else " it has no ConvNeXt block"
        warnings.warn(f"accelerate changed nothing in this {type(model).__name__}:{found}", stacklevel=2)
    return report


def restore(model: nn.Module) -> tuple[str, ...]:
    """Gives every accelerated module of a model its host's forward back.

    Nothing else had been changed, so the model is what it was before `accelerate`, its parameters as they are now. One
    block of a row can be given; under autocast the block before it then hands on 16-bit tensors as it did.

    Returns:
        The names of the restored modules.

    Raises:
        RuntimeError: something was wrapped around an accelerated module since (such as `fully_shard`), or its
            parameters have been folded; nothing is changed then.
    """
    swapped = {name: module for name, module in model.named_modules() if isinstance(module, Swapped)}
    for name, module in swapped.items():
        if obstacle := restore_obstacle(module):
            raise RuntimeError(
                f"restore: `{name}` {obstacle}; accepted: modules neither folded nor wrapped since accelerate"
            )
    for module in swapped.values():
        unswap(module)
    return tuple(swapped)


def _carry_out(steps: Iterable[Step], float32_residual: bool) -> None:
    """Makes all swaps or none."""
    done: list[Swapped] = []
    try:
        for step in steps:
            done.append(swap(step.module, step.kind, step.wiring))
            done[-1].float32_residual = float32_residual
    except BaseException:
        for module in done:
            unswap(module)
        raise


def _chain(model: nn.Module) -> None:
    """Tells each accelerated module whether ours or a convolution takes its result next."""
    for container in model.modules():
        if isinstance(container, nn.Sequential | nn.ModuleList):
            for module, following in pairwise(container):
                if isinstance(module, Swapped):
                    module.chained = isinstance(following, Swapped | nn.Conv2d)
