"""How far an operator is from the truth: its error against float64, beside PyTorch's own in the same dtype.

Two measures are taken, ||out - exact|| / ||exact|| and max|out - exact| / max|exact|; the one nearer its limit counts.
The limit is 1.5 times PyTorch's error plus one unit of rounding (half of eps) for the norm, two for the maximum. In
small tensors both errors are a matter of luck, also of the processor's order of summation: what is over the limit is
drawn four more times, and the means decide. Every scale (layer scale, norm weights) is drawn near 1: at the 1e-6 that
layer scale starts from, any kernel would pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import wraps
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from convnext_kernels.functional import OPERATORS as FUNCTIONS
from convnext_kernels.functional import explain
from convnext_kernels.ops.common.launch import float32_precision

OPERATORS = tuple(FUNCTIONS)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
FACTOR = 1.5
ROUNDING_UNITS = (1, 2)
"""What is allowed beyond that, in units of rounding, for the norm and for the maximum."""

DRAWS = 5
"""Of the arguments, where the first is over the limit. A large error in one of them, or a NaN, is one in their mean."""

_SCALES = ("layer_scale", "norm_weight", "grn_weight")
_NOT_DIFFERENTIABLE = ("drop_path_factor",)


@dataclass(frozen=True)
class Case:
    """One call of an operator: the shapes of its tensor arguments, its other options and the input's layout."""

    operator: str
    name: str
    shapes: Mapping[str, tuple[int, ...]]
    options: Mapping[str, Any] = field(default_factory=dict)
    layout: str = "channels_last"

    def draw(self, dtype: torch.dtype, device: torch.device | str, seed: int) -> dict[str, Tensor]:
        """Random arguments whose values `dtype` holds exactly, in the case's layout."""
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for name, shape in self.shapes.items():
            values = torch.randn(shape, generator=generator, dtype=torch.float64)
            if name in _NOT_DIFFERENTIABLE:
                values = 1.25 * (torch.arange(shape[0]) % 3 != 1).double()
            elif name in _SCALES or (name == "weight" and len(shape) == 1):
                values = 1 + 0.1 * values
            elif len(shape) > 1 and name not in ("input", "residual"):
                values = values / values[0].numel() ** 0.5
            tensors[name] = values.to(dtype).to(device)
            if name in ("input", "residual"):
                tensors[name] = LAYOUTS[self.layout](tensors[name])
        return tensors


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def _sliced(tensor: Tensor) -> Tensor:
    return _channels_last(torch.cat([tensor, tensor], dim=1))[:, : tensor.shape[1]]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last": _channels_last,
    "contiguous": lambda tensor: tensor.contiguous(),
    "permuted": lambda tensor: tensor.transpose(-1, -2).contiguous().transpose(-1, -2),
    "sliced": _sliced,
    "expanded": lambda tensor: tensor.narrow(tensor.dim() // 2, 0, 1).expand(tensor.shape),
}
"""Ways in which a tensor of given values can lie in memory (an expanded one repeats its first row or token)."""


@dataclass(frozen=True)
class Comparison:
    """The error of one tensor that one call produced."""

    operator: str
    case: str
    dtype: str
    backend: str
    tensor: str
    error: float
    torch_error: float
    limit: float

    @property
    def passed(self) -> bool:
        """Whether the error is within the limit; NaN never is."""
        return self.error <= self.limit


def _depthwise_conv2d(input: Tensor, weight: Tensor, bias: Tensor | None = None, *, dilation: int = 1) -> Tensor:
    padding = dilation * (weight.shape[-1] // 2)
    return F.conv2d(input, weight, bias, padding=padding, dilation=dilation, groups=input.shape[1])


def _over_channels_last(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(function)
    def run(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if input.dim() == 3:
            return function(input, *args, **kwargs)
        return function(input.permute(0, 2, 3, 1), *args, **kwargs).permute(0, 3, 1, 2)

    return run


@_over_channels_last
def _layer_norm(
    input: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-6
) -> Tensor:
    return F.layer_norm(input, input.shape[-1:], weight, bias, eps)


def _depthwise_conv2d_layer_norm(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    *,
    dilation: int = 1,
    eps: float = 1e-6,
) -> Tensor:
    return _layer_norm(_depthwise_conv2d(input, weight, bias, dilation=dilation), norm_weight, norm_bias, eps=eps)


@_over_channels_last
def _global_response_norm(input: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-6) -> Tensor:
    norms = input.norm(dim=tuple(range(1, input.dim() - 1)), keepdim=True)
    return weight * (input * (norms / (norms.mean(-1, keepdim=True) + eps))) + bias + input


def _mlp(
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    *,
    layer_scale: Tensor | None = None,
    drop_path_factor: Tensor | None = None,
    residual: Tensor | None = None,
    grn_weight: Tensor | None = None,
    grn_bias: Tensor | None = None,
    grn_eps: float = 1e-6,
    activation: str = "gelu",
    recompute_hidden: bool = False,  # changes what is saved, and no value
) -> Tensor:
    rows = input.permute(0, 2, 3, 1) if input.dim() == 4 else input
    rows = F.gelu(F.linear(rows, weight1, bias1), approximate="tanh" if activation == "gelu_tanh" else "none")
    if grn_weight is not None and grn_bias is not None:
        rows = _global_response_norm(rows.flatten(1, -2), grn_weight, grn_bias, eps=grn_eps).view(rows.shape)
    rows = F.linear(rows, weight2, bias2)
    if layer_scale is not None:
        rows = layer_scale * rows
    output = rows.permute(0, 3, 1, 2) if input.dim() == 4 else rows
    if drop_path_factor is not None:
        output = drop_path_factor.view(-1, *[1] * (input.dim() - 1)) * output
    return output if residual is None else residual + output


def _convnext_block(
    input: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    *,
    layer_scale: Tensor | None = None,
    drop_path_factor: Tensor | None = None,
    grn_weight: Tensor | None = None,
    grn_bias: Tensor | None = None,
    dilation: int = 1,
    eps: float = 1e-6,
    grn_eps: float = 1e-6,
    activation: str = "gelu",
    recompute_hidden: bool | None = None,  # changes what is saved, and no value
    float32_residual: bool = False,  # concerns autocast alone
) -> Tensor:
    norm = (norm_weight, norm_bias)
    return _mlp(
        _depthwise_conv2d_layer_norm(input, conv_weight, conv_bias, *norm, dilation=dilation, eps=eps),
        weight1,
        bias1,
        weight2,
        bias2,
        layer_scale=layer_scale,
        drop_path_factor=drop_path_factor,
        residual=input,
        grn_weight=grn_weight,
        grn_bias=grn_bias,
        grn_eps=grn_eps,
        activation=activation,
    )


def _patch_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.conv2d(input, weight, bias, stride=weight.shape[-1])


DEFINITIONS: dict[str, Callable[..., Tensor]] = {
    "convnext_block": _convnext_block,
    "depthwise_conv2d": _depthwise_conv2d,
    "depthwise_conv2d_layer_norm": _depthwise_conv2d_layer_norm,
    "global_response_norm": _global_response_norm,
    "layer_norm": _layer_norm,
    "mlp": _mlp,
    "patch_linear": _patch_linear,
}
"""Every operator as PyTorch users write it, differentiated by autograd: what PyTorch's own error is measured on."""


def _arguments(case: Case, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    required = {
        "convnext_block": ("conv_bias", "norm_weight", "norm_bias", "bias1", "bias2"),
        "depthwise_conv2d_layer_norm": ("bias", "norm_weight", "norm_bias"),
        "mlp": ("bias1", "bias2"),
    }
    absent = {name: None for name in required.get(case.operator, ())}
    return {**absent, **tensors, **case.options}


def _results(
    function: Callable[..., Tensor], case: Case, tensors: Mapping[str, Tensor], dtype: torch.dtype, seed: int
) -> dict[str, Tensor]:
    leaves = {name: tensor.detach().to(dtype) for name, tensor in tensors.items()}
    wanted = [name for name in leaves if name not in _NOT_DIFFERENTIABLE]
    for name in wanted:
        leaves[name].requires_grad_()
    output = function(**_arguments(case, leaves))
    generator = torch.Generator().manual_seed(output.numel() + seed)
    # Rounded to bfloat16, the gradient that comes in is exact in every dtype.
    grad_output = torch.randn(output.shape, generator=generator).bfloat16().to(dtype).to(output.device)
    gradients = torch.autograd.grad(output, [leaves[name] for name in wanted], LAYOUTS[case.layout](grad_output))
    return {"output": output.detach(), **{f"grad {name}": g for name, g in zip(wanted, gradients, strict=True)}}


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Within the context, memory that PyTorch allocates uninitialised holds NaN, so that an unwritten element shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    deterministic: Any = torch.utils.deterministic  # typed so because the module defines its settings as properties
    fill = deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        deterministic.fill_uninitialized_memory = fill


def errors(result: Tensor, exact: Tensor) -> tuple[float, float]:
    """||result - exact|| / ||exact|| and max|result - exact| / max|exact|."""
    difference, exact = (result.detach().double() - exact).flatten(), exact.flatten()
    tiny = torch.finfo(torch.float64).tiny
    return (
        float(difference.norm() / exact.norm().clamp_min(tiny)),
        float(difference.abs().max() / exact.abs().max().clamp_min(tiny)),
    )


Measured = Sequence[tuple[float, float]]
"""Our error and PyTorch's in each of the two measures."""


def _measure(
    case: Case, dtype: torch.dtype, device: torch.device | str, backend: str, seed: int
) -> dict[str, Measured]:
    """Of the output and every gradient, by name."""
    tensors = case.draw(dtype, device, seed)
    definition, function = DEFINITIONS[case.operator], FUNCTIONS[case.operator]
    exact = _results(definition, case, tensors, torch.float64, seed)
    # PyTorch's convolutions round float32 to TF32 unless told not to, its products only where told to, as ours do.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=float32_precision() == "tf32"):
        theirs = _results(definition, case, tensors, dtype, seed)
    with poisoned_memory():
        ours = _results(lambda **arguments: function(**arguments, backend=backend), case, tensors, dtype, seed)
    return {
        name: list(zip(errors(ours[name], truth), errors(theirs[name], truth), strict=True))
        for name, truth in exact.items()
    }


def _mean(draws: Sequence[Measured]) -> Measured:
    return [
        (fmean(ours for ours, _ in measure), fmean(theirs for _, theirs in measure))
        for measure in zip(*draws, strict=True)
    ]


def _judge(case: Case, dtype: torch.dtype, backend: str, tensor: str, measured: Measured) -> Comparison:
    """By the measure that is nearer its limit."""
    candidates = [
        (our_error, torch_error, FACTOR * torch_error + units * torch.finfo(dtype).eps / 2)
        for (our_error, torch_error), units in zip(measured, ROUNDING_UNITS, strict=True)
    ]
    # A NaN compares false with everything: it must come out on top.
    worst = max(candidates, key=lambda c: float("inf") if c[0] != c[0] else c[0] / c[2])
    return Comparison(case.operator, case.name, str(dtype).removeprefix("torch."), backend, tensor, *worst)


def compare(
    case: Case, dtype: torch.dtype, device: torch.device | str, backend: str, seed: int = 0
) -> list[Comparison]:
    """Runs a case in float64, in PyTorch and in ours, and compares the output and every gradient.

    Where one is over its limit the case is drawn again, and the means of `DRAWS` are its errors.
    """
    draws = [_measure(case, dtype, device, backend, seed)]
    comparisons = [_judge(case, dtype, backend, name, measured) for name, measured in draws[0].items()]
    if all(comparison.passed for comparison in comparisons):
        return comparisons
    draws += [_measure(case, dtype, device, backend, seed + n) for n in range(1, DRAWS)]
    return [
        comparison
        if comparison.passed
        else _judge(case, dtype, backend, comparison.tensor, _mean([draw[comparison.tensor] for draw in draws]))
        for comparison in comparisons
    ]


def unsupported(case: Case, dtype: torch.dtype, device: torch.device | str, backend: str) -> list[str]:
    """Why a backend cannot run a case; empty if it can."""
    arguments = _arguments(case, case.draw(dtype, device, 0))
    return list(explain(case.operator, **arguments, backend=backend).reasons[backend])


def _image_cases(small: bool) -> list[tuple[int, int, int, int]]:
    shapes = [(1, 24, 1, 1), (3, 40, 2, 2), (2, 96, 5, 3), (1, 24, 25, 41)]
    return shapes if small else [*shapes, (3, 128, 14, 14), (2, 96, 56, 56), (2, 384, 14, 14), (4, 768, 7, 7)]


def _filter_cases(operator: str, small: bool, norms: tuple[str, ...] = ()) -> list[Case]:
    cases = []
    for batch, width, height, length in _image_cases(small):
        shapes = {"input": (batch, width, height, length), "weight": (width, 1, 7, 7), "bias": (width,)}
        shapes |= {name: (width,) for name in norms}
        cases.append(Case(operator, f"{batch}x{width}x{height}x{length}", shapes))
    shapes = {"input": (2, 40, 9, 6), "weight": (40, 1, 3, 3), **{name: (40,) for name in norms}}
    cases.append(Case(operator, "3x3, no bias", shapes))
    cases.append(Case(operator, "3x3, dilation 2", shapes, {"dilation": 2}))
    cases.append(Case(operator, "5x5, contiguous", {**shapes, "weight": (40, 1, 5, 5)}, layout="contiguous"))
    cases.append(
        Case(operator, "7x7, dilation 4, sliced", {**shapes, "weight": (40, 1, 7, 7)}, {"dilation": 4}, "sliced")
    )
    return cases


def _norm_cases(operator: str, small: bool) -> list[Case]:
    cases = []
    for batch, width, height, length in _image_cases(small):
        shapes = {"input": (batch, width, height, length), "weight": (width,), "bias": (width,)}
        cases.append(Case(operator, f"{batch}x{width}x{height}x{length}", shapes))
    tokens = {"input": (3, 17, 128), "weight": (128,), "bias": (128,)}
    cases.append(Case(operator, "tokens 3x17x128", tokens))
    cases.append(Case(operator, "sliced", {"input": (2, 40, 6, 5), "weight": (40,), "bias": (40,)}, layout="sliced"))
    if operator == "layer_norm":
        cases.append(Case(operator, "no affine", {"input": (2, 40, 6, 5)}))
        cases.append(Case(operator, "no bias", {"input": (2, 40, 6, 5), "weight": (40,)}, {"eps": 1e-5}))
    return cases


def _mlp_cases(small: bool) -> list[Case]:
    cases = []
    for batch, width, height, length in _image_cases(small):
        image, hidden = (batch, width, height, length), 4 * width
        weights = {"weight1": (hidden, width), "bias1": (hidden,), "weight2": (width, hidden), "bias2": (width,)}
        block = {"layer_scale": (width,), "drop_path_factor": (batch,), "residual": image}
        cases.append(Case("mlp", f"{batch}x{width}x{height}x{length}", {"input": image, **weights, **block}))
        if width in (96, 128):
            options = {"recompute_hidden": True}
            cases.append(replace(cases[-1], name=f"{cases[-1].name}, recomputed", options=options))
    image, hidden, width = (3, 40, 5, 4), 160, 40
    matrices = {"input": image, "weight1": (hidden, width), "weight2": (width, hidden)}
    biases = {"bias1": (hidden,), "bias2": (width,)}
    grn = {"grn_weight": (hidden,), "grn_bias": (hidden,)}
    cases.append(Case("mlp", "no bias, scale or residual", matrices))
    cases.append(Case("mlp", "tanh, contiguous", {**matrices, **biases}, {"activation": "gelu_tanh"}, "contiguous"))
    recompute = {"recompute_hidden": True}
    block = {"layer_scale": (width,), "drop_path_factor": (3,), "residual": image}
    cases.append(Case("mlp", "recomputed", {**matrices, **biases, **block}, recompute))
    cases.append(Case("mlp", "recomputed, GRN", {**matrices, **biases, **grn, "residual": image}, recompute))
    cases.append(
        Case("mlp", "drop path only, sliced", {**matrices, **biases, "drop_path_factor": (3,)}, layout="sliced")
    )
    cases.append(Case("mlp", "GRN, residual", {**matrices, **biases, "residual": image, **grn}))
    cases.append(
        Case("mlp", "GRN, tokens", {**matrices, **biases, "input": (2, 9, 40), **grn, "layer_scale": (width,)})
    )
    return cases


def _block_cases(small: bool) -> list[Case]:
    cases = []
    # Of a single token, or of a response norm over one, the largest error is a matter of luck: of the reference's own
    # in float32 1 to 4 of 25 seeds are beyond the limit.
    for batch, width, height, length in [(32, 24, 1, 1), *_image_cases(small)[1:]]:
        hidden = 4 * width
        conv = {"conv_weight": (width, 1, 7, 7), "conv_bias": (width,)}
        norm = {"norm_weight": (width,), "norm_bias": (width,)}
        weights = {"weight1": (hidden, width), "bias1": (hidden,), "weight2": (width, hidden), "bias2": (width,)}
        branch = {"input": (batch, width, height, length), **conv, **norm, **weights}
        scales = {"layer_scale": (width,), "drop_path_factor": (batch,)}
        name, grn = f"{batch}x{width}x{height}x{length}", {"grn_weight": (hidden,), "grn_bias": (hidden,)}
        v1 = Case("convnext_block", f"V1 {name}", {**branch, **scales}, {"recompute_hidden": False})
        cases.append(v1)
        if height * length > 1:
            cases.append(replace(v1, name=f"{v1.name}, recomputed", options={"recompute_hidden": True}))
            cases.append(Case("convnext_block", f"V2 {name}", {**branch, **grn}))
    image = {"input": (3, 40, 6, 5), "conv_weight": (40, 1, 3, 3), "weight1": (64, 40), "weight2": (40, 64)}
    cases.append(Case("convnext_block", "weights alone, sliced", image, layout="sliced"))
    shapes, options = {**image, "norm_bias": (40,)}, {"activation": "gelu_tanh", "dilation": 2, "eps": 1e-3}
    cases.append(Case("convnext_block", "tanh, dilation 2, contiguous", shapes, options, "contiguous"))
    return cases


def _patch_cases(small: bool) -> list[Case]:
    sizes = [(1, 3, 8, 12, 40, 4), (2, 3, 17, 22, 24, 4), (3, 40, 5, 7, 80, 2), (1, 24, 2, 2, 48, 2)]
    if not small:
        sizes += [(2, 3, 224, 224, 96, 4), (2, 96, 56, 56, 192, 2), (2, 384, 14, 14, 768, 2)]
    cases = []
    for batch, width, height, length, outputs, size in sizes:
        shapes = {"input": (batch, width, height, length), "weight": (outputs, width, size, size), "bias": (outputs,)}
        cases.append(Case("patch_linear", f"{batch}x{width}x{height}x{length} to {outputs}, {size}x{size}", shapes))
    no_bias = {"input": (2, 24, 6, 6), "weight": (40, 24, 2, 2)}
    cases.append(Case("patch_linear", "no bias, contiguous", no_bias, layout="contiguous"))
    return cases


def cases(operator: str, small: bool) -> list[Case]:
    """The calls that an operator is checked on; `small` leaves out those too slow for Triton's interpreter."""
    if operator == "convnext_block":
        return _block_cases(small)
    if operator == "depthwise_conv2d":
        return _filter_cases(operator, small)
    if operator == "depthwise_conv2d_layer_norm":
        return _filter_cases(operator, small, ("norm_weight", "norm_bias"))
    if operator in ("layer_norm", "global_response_norm"):
        return _norm_cases(operator, small)
    if operator == "mlp":
        return _mlp_cases(small)
    if operator == "patch_linear":
        return _patch_cases(small)
    raise ValueError(f"operator: got {operator!r}; accepted: {', '.join(OPERATORS)}")
