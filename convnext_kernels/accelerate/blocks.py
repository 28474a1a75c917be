"""A host's ConvNeXt block with our operator as its forward."""

# Without postponed annotations: TorchScript cannot read those of `run_block`.

import warnings
from dataclasses import dataclass
from functools import cache
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from convnext_kernels import functional
from convnext_kernels.accelerate.adapters import BlockAdapter
from convnext_kernels.accelerate.swap import Swapped, as_host
from convnext_kernels.ops.common.checks import autocast_dtype
from convnext_kernels.parameters import parameter_of

GRN_EPS = 1e-6
"""Of the hosts whose response norm has it in its code rather than in an attribute."""


SAME_AS_HOST = "same_as_host"
"""Attribute of functions that may be the forward of a module below a block: they compute what its host's does."""


class Parts(NamedTuple):
    """A block's modules by the role they have; None: the block has none."""

    conv: Any
    norm: Any
    linear1: Any
    linear2: Any
    grn: Any = None
    drop_path: Any = None


OBEYED: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Conv2d: ("stride", "padding", "padding_mode", "dilation"),
    nn.GELU: ("approximate",),
    nn.Dropout: ("p",),
}
"""Attributes of modules below a block that its host's forward reads at every call and ours only before the swap."""

Structure = tuple[tuple[str, Any, tuple[tuple[str, Any], ...], Any], ...]
"""Name, class, attributes in OBEYED and, in the same form, structure of each child of a module."""


@dataclass(frozen=True)
class Wiring:
    """How our operator is called with what lies in a host's block.

    Attributes:
        adapter: where the parts lie.
        paths: of each of `Parts`, split at the dots; None: there is none.
        structure: the modules below the block when it was examined.
        activation: "gelu" or "gelu_tanh".
    """

    adapter: BlockAdapter
    paths: tuple[tuple[str, ...] | None, ...]
    structure: Structure
    activation: str

    def parts(self, block: nn.Module) -> Parts:
        return Parts(*[None if path is None else _module_at(block, path) for path in self.paths])


def _module_at(module: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        module = module._modules[name]  # a third of what getattr takes, and this is done at every call
    return module


def structure_of(module: nn.Module) -> Structure:
    children = module.named_children()
    return tuple((name, type(child), _obeyed(child), structure_of(child)) for name, child in children)


def _obeyed(module: nn.Module) -> tuple[tuple[str, Any], ...]:
    names = (name for kind in type(module).__mro__ for name in OBEYED.get(kind, ()))
    return tuple((name, getattr(module, name)) for name in names)


def change_below(module: nn.Module, structure: Structure, prefix: str = "") -> str | None:
    """What has come over the modules below one since it was examined that its host's forward would obey and ours would
    not: hooks, other modules, other forwards, attributes. None: nothing."""
    children = module._modules
    for name, kind, attributes, below in structure:
        child = children.get(name)
        if child is None or type(child) is not kind:
            now, was = _told_apart(type(child), kind)
            return f"its `{prefix}{name}` is a {now} and was a {was}"
        if child._forward_hooks or child._forward_pre_hooks or child._backward_hooks or child._backward_pre_hooks:
            return f"hooks sit on its `{prefix}{name}`"
        if "forward" in child.__dict__ and not _has_same_forward(child, kind):
            return f"the forward of its `{prefix}{name}` has been replaced"
        for attribute, value in attributes:
            if (now := getattr(child, attribute)) != value:
                return f"the {attribute} of its `{prefix}{name}` is {now!r} and was {value!r}"
        if below and (change := change_below(child, below, f"{prefix}{name}.")):
            return change
    return None


def _told_apart(one: type, other: type) -> tuple[str, str]:
    """The names of two classes, with their modules' where they share one, as layers and their quantised ones do."""
    if one.__name__ != other.__name__:
        return one.__name__, other.__name__
    return f"{one.__module__}.{one.__name__}", f"{other.__module__}.{other.__name__}"


def _has_same_forward(module: nn.Module, kind: Any) -> bool:
    """Whether a module's own forward is its class's, which `kernelize` sets for want of a layer, or a layer of ours."""
    forward = module.__dict__["forward"]
    # Not `getattr(forward, "__func__", None)`, which torch.compile of PyTorch 2.11 and older takes for None.
    own = isinstance(forward, MethodType) and forward.__func__ is kind.forward and forward.__self__ is module
    return own or getattr(forward, SAME_AS_HOST, False)


@cache
def _warn_host_forward(name: str, change: str) -> None:
    warnings.warn(f"an accelerated {name} runs its host's forward: {change}", stacklevel=2)


class AcceleratedBlock(Swapped):
    """A host's block with `functional.convnext_block` as its forward.

    Parameters are read at every call, and so are the modules: while something has come over them that only the host's
    forward would obey, that one runs, with one warning (none in what torch.compile compiles).
    """

    wiring: Wiring

    def forward(self, input: Tensor | None = None, **named: Any) -> Tensor:
        if input is None:
            (input,) = named.values()
        change = change_below(self, self.wiring.structure)
        if change is not None:
            if self.folded:
                raise RuntimeError(
                    f"a folded {type(self).__name__} cannot run its host's forward, which would be due: {change};"
                    " accepted: blocks in which nothing has changed since convnext_kernels.fold_"
                )
            if not torch.compiler.is_compiling():  # a warning would break the graph
                _warn_host_forward(type(self).__name__, change)
            return super().forward(input)
        return wired_forward(self, self.wiring, input, self.chained, self.float32_residual)


def wired_forward(
    block: nn.Module, wiring: Wiring, input: Tensor, chained: bool = False, float32_residual: bool = False
) -> Tensor:
    """What a host's block computes, by our operator; checkpointed where the host does it."""
    arguments = block_arguments(block, wiring, input)
    adapter = wiring.adapter
    options = chained, adapter.follows_input, float32_residual
    if adapter.checkpoint and getattr(block, adapter.checkpoint, False) and input.requires_grad:
        return checkpoint(run_block, input, arguments, *options, use_reentrant=False)
    return run_block(input, arguments, *options)


class BlockArguments(NamedTuple):
    """Those of `functional.convnext_block` in a host's shapes; a tuple because TorchScript has no other mixed type."""

    conv_weight: Tensor
    conv_bias: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    weight1: Tensor
    bias1: Tensor | None
    weight2: Tensor
    bias2: Tensor | None
    layer_scale: Tensor | None
    drop_path_factor: Tensor | None
    grn_weight: Tensor | None
    grn_bias: Tensor | None
    dilation: int
    eps: float
    grn_eps: float
    activation: str


def block_arguments(block: nn.Module, wiring: Wiring, input: Tensor) -> BlockArguments:
    """The arguments of `functional.convnext_block` out of a host's block, with drop path drawn as the host draws it."""
    conv, norm, linear1, linear2, grn, drop_path = wiring.parts(block)
    name = wiring.adapter.layer_scale
    layer_scale = None if name is None else getattr(block, name, None)
    weight, bias = wiring.adapter.grn_parameters
    factor = None
    if drop_path is not None and drop_path.training and drop_rate(drop_path):
        factor = drop_path(branch_of_ones(input, layer_scale))
    return BlockArguments(
        conv_weight=parameter_of(conv, "weight"),
        conv_bias=parameter_of(conv, "bias"),
        norm_weight=parameter_of(norm, "weight"),
        norm_bias=parameter_of(norm, "bias"),
        weight1=parameter_of(linear1, "weight"),
        bias1=parameter_of(linear1, "bias"),
        weight2=parameter_of(linear2, "weight"),
        bias2=parameter_of(linear2, "bias"),
        layer_scale=layer_scale,
        drop_path_factor=factor,
        grn_weight=None if grn is None else getattr(grn, weight),
        grn_bias=None if grn is None else getattr(grn, bias),
        dilation=conv.dilation[0],
        eps=norm.eps,
        grn_eps=getattr(grn, "eps", GRN_EPS),
        activation=wiring.activation,
    )


def drop_rate(drop_path: nn.Module) -> float:
    """The probability that stochastic depth drops a sample, under the names that it has in the hosts."""
    for name in ("drop_prob", "p"):  # PyTorch 2.8 does not compile a `next` with a default
        if hasattr(drop_path, name):
            return getattr(drop_path, name) or 0.0
    return 0.0


@torch.jit.ignore
@torch.fx.wrap
def branch_of_ones(input: Tensor, layer_scale: Tensor | None) -> Tensor:
    """[N, 1, 1, 1] in the dtype that the host's branch has there, on which its random numbers depend."""
    dtype = autocast_dtype(input) or input.dtype
    if layer_scale is not None:
        dtype = torch.promote_types(dtype, layer_scale.dtype)
    return input.new_ones((input.shape[0], 1, 1, 1), dtype=dtype)


def flattened(arguments: BlockArguments) -> dict[str, Any]:
    """The arguments of a block in the shapes that our operators take."""
    # PyTorch 2.8 does not compile `_asdict`.
    flat: dict[str, Any] = dict(zip(BlockArguments._fields, arguments, strict=True))
    flat.update({name: flat[name].flatten(1) for name in ("weight1", "weight2")})
    vectors = ("layer_scale", "drop_path_factor", "grn_weight", "grn_bias")
    flat.update({name: flat[name].flatten() for name in vectors if flat[name] is not None})
    return flat


@torch.jit.ignore
@torch.fx.wrap
def run_block(
    input: Tensor, arguments: BlockArguments, chained: bool, follows_input: bool, float32_residual: bool
) -> Tensor:
    """`functional.convnext_block` with a host's shapes of parameters, in the host's dtype and layout of the result.

    The script of an fx graph calls back to it, and therefore cannot be saved.
    """
    output = functional.convnext_block(input, **flattened(arguments), float32_residual=float32_residual)
    output = as_host(output, input, chained)
    images = follows_input and input.is_contiguous() and not input.is_contiguous(memory_format=torch.channels_last)
    return output.contiguous() if images else output
