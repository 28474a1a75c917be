"""Which modules of a model can be swapped, found before any is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from torch import nn

from convnext_kernels.accelerate.adapters import BlockAdapter
from convnext_kernels.accelerate.blocks import AcceleratedBlock
from convnext_kernels.accelerate.examine import examine_block, find_adapter, outside_reason
from convnext_kernels.accelerate.norms import AcceleratedNorm, beside_convolution, may_be_norm
from convnext_kernels.accelerate.probe import TOLERANCE, block_difference, norm_difference, plain_attributes
from convnext_kernels.accelerate.swap import Swapped

Filter = Callable[[str, nn.Module], bool]

ALREADY = "it is accelerated already"


class Step(NamedTuple):
    """One swap to be made.

    Attributes:
        module: what is swapped.
        kind: the class whose forward it gets.
        wiring: what that forward needs to know of the host.
        host: library and class, for the report.
    """

    module: nn.Module
    kind: type[Swapped]
    wiring: Any
    host: str


def plan_blocks(model: nn.Module, filter: Filter | None) -> Iterator[tuple[str, Step | str]]:
    """For each ConvNeXt block the swap, or the reason against it."""
    differences: dict[Any, float] = {}
    for name, module in model.named_modules():
        adapter, outside = find_adapter(module), outside_reason(module)
        if adapter is None and outside is None:
            continue
        if filter is not None and not filter(name, module):
            yield name, "the filter left it out"
        elif isinstance(module, Swapped):
            yield name, ALREADY
        elif adapter is None:
            yield name, str(outside)
        else:
            yield name, plan_block(module, adapter, differences)


def plan_block(block: nn.Module, adapter: BlockAdapter, differences: dict[Any, float]) -> Step | str:
    """The swap of a block, or the reason against it; `differences` keeps what was found for blocks that are alike."""
    wiring = examine_block(block, adapter)
    if isinstance(wiring, str):
        return wiring
    key = type(block), wiring, plain_attributes(block)
    try:
        if key not in differences:
            differences[key] = block_difference(block, wiring)
    except Exception as error:
        return f"its host's forward failed on a copy with random parameters: {type(error).__name__}: {error}"
    if not differences[key] <= TOLERANCE:
        return f"its branch differs from ours by {differences[key]:.1e} on random parameters"
    return Step(block, AcceleratedBlock, wiring, f"{adapter.library} {type(block).__name__}")


def plan_norms(model: nn.Module, blocks: Iterable[str], filter: Filter | None) -> Iterator[tuple[str, Step]]:
    """The layer norms that ours can take the place of, outside of the blocks, whose names are given."""
    inside = {id(module) for name in blocks for module in model.get_submodule(name).modules()}
    parents = ((prefix, parent) for prefix, parent in model.named_modules() if beside_convolution(parent))
    for prefix, parent in parents:
        for name, module in parent.named_children():
            path = f"{prefix}.{name}" if prefix else name
            if id(module) in inside or isinstance(module, Swapped) or not may_be_norm(module):
                continue
            if (filter is None or filter(path, module)) and is_norm_over_channels(module):
                yield path, Step(module, AcceleratedNorm, None, type(module).__name__)


def is_norm_over_channels(module: nn.Module) -> bool:
    """Whether a norm is what ours is, tried on a copy."""
    try:
        return norm_difference(module) <= TOLERANCE
    except Exception:  # one over the last dimension, say, cannot take images
        return False
