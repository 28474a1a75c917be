"""Each tunable kernel as a ConvNeXt block of some width launches it: what `tune` times."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from math import prod
from typing import Any

import torch
from torch import Tensor

from convnext_kernels.ops.common.matmul_configs import (
    LONG_MATMUL,
    MATMUL,
    Kind,
    aligned,
    few_programs,
    operand_bits,
    scales_operands,
)
from convnext_kernels.ops.common.tuning import Key, Name, Tunable
from convnext_kernels.ops.convnext_block.configs import RECOMPUTED_CHANNELS
from convnext_kernels.ops.depthwise_conv import configs as depthwise_conv
from convnext_kernels.ops.depthwise_conv_layer_norm import configs as depthwise_conv_layer_norm
from convnext_kernels.ops.layer_norm import configs as layer_norm
from convnext_kernels.ops.mlp import configs as mlp
from convnext_kernels.ops.response_norm import configs as response_norm

PRECISIONS = {
    "float32": (torch.float32, "highest"),
    "tf32": (torch.float32, "high"),
    "float16": (torch.float16, "highest"),
    "bfloat16": (torch.bfloat16, "highest"),
}
"""Name of a precision: the tensors' dtype and PyTorch's setting for float32 matrix products."""

BYTES_PER_SECOND, FLOPS_PER_SECOND = 4.3e12, 8e14
FLOPS_OF_CUDA_CORES = 12
"""How much more an operation without matrix units takes."""

EPS = 1e-6
STATISTICS = ("rstd", "scale")
"""Tensors in float32 whatever the dtype of the others, and positive."""


@contextmanager
def multiplying(precision: str) -> Iterator[torch.dtype]:
    """Within the context float32 is multiplied as the precision says; yields its dtype."""
    dtype, setting = PRECISIONS[precision]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        yield dtype
    finally:
        torch.set_float32_matmul_precision(before)


@dataclass(frozen=True)
class Workload:
    """A launch of one kernel: its key, precision, the tensors by shape, and the call with those that launches it.

    flops: on the matrix units, or what takes these as long.
    """

    tunable: Tunable[Any]
    key: Key
    precision: str
    shapes: Mapping[str, tuple[int, ...]]
    call: Callable[..., Any]
    flops: int = 0

    @property
    def seconds(self) -> float:
        """What an H200 takes at least, to tell large kernels from small ones: of its arguments and its arithmetic."""
        nbytes = sum(prod(shape) * self._dtype(name).itemsize for name, shape in self.shapes.items())
        return max(nbytes / BYTES_PER_SECOND, self.flops / FLOPS_PER_SECOND)

    @property
    def name(self) -> Name:
        """What a table finds its measurement by."""
        return self.tunable.name, str(PRECISIONS[self.precision][0]).removeprefix("torch."), self.key

    def __str__(self) -> str:
        sizes = (f"{name} {size}" for name, size in zip(self.tunable.parameters, self.key, strict=True))
        return f"{self.tunable.name}, {self.precision}: {', '.join(sizes)}"

    def draw(self, device: torch.device, seed: int) -> dict[str, Tensor]:
        """Random tensors; images in channels-last memory."""
        generator, tensors = torch.Generator(device).manual_seed(seed), {}
        for name, shape in self.shapes.items():
            values = torch.randn(shape, generator=generator, device=device, dtype=self._dtype(name))
            layout = self._layout(name, shape)
            tensors[name] = (values.abs() if name in STATISTICS else values).contiguous(memory_format=layout)
        return tensors

    def empty(self) -> dict[str, Tensor]:
        """Such tensors on the CPU, of memory that nothing has touched: kernels are compiled by them."""
        return {
            name: torch.empty(shape, dtype=self._dtype(name), memory_format=self._layout(name, shape))
            for name, shape in self.shapes.items()
        }

    def _dtype(self, name: str) -> torch.dtype:
        return torch.float32 if name in STATISTICS else PRECISIONS[self.precision][0]

    @staticmethod
    def _layout(name: str, shape: tuple[int, ...]) -> torch.memory_format:
        return torch.channels_last if len(shape) == 4 and "weight" not in name else torch.contiguous_format

    def run(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """The results of the call."""
        with multiplying(self.precision):
            results = self.call(**tensors)
        return [results] if isinstance(results, Tensor) else [result for result in results if result.numel()]


def _kernels(operator: str) -> Any:
    """An operator's Triton kernels, imported where one is called: Triton may not be installed."""
    return import_module(f"convnext_kernels.ops.{operator}.triton_kernel")


def _common(name: str) -> Any:
    return import_module(f"convnext_kernels.ops.common.triton_{name}")


def _convolution(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return _kernels("depthwise_conv").forward(input, weight, bias, 1)


def _weight_gradient(grad: Tensor, input: Tensor, weight: Tensor) -> Sequence[Tensor]:
    return _kernels("depthwise_conv").backward(grad, input, weight, 1, [False, True, True])


def _convolution_and_norm(input: Tensor, weight: Tensor, bias: Tensor) -> Sequence[Tensor]:
    return _kernels("depthwise_conv_layer_norm").forward_normalized(input, weight, bias, 1, EPS, None)


def _norm(input: Tensor, weight: Tensor, bias: Tensor) -> Sequence[Tensor]:
    return _kernels("layer_norm").forward(input, weight, bias, EPS, False)


def _norm_backward(grad: Tensor, input: Tensor, rstd: Tensor) -> Sequence[Tensor]:
    return _kernels("layer_norm").backward(grad, input, None, None, rstd, [True, False, False])


def _response_norm(input: Tensor, weight: Tensor, bias: Tensor) -> Sequence[Tensor]:
    return _kernels("response_norm").forward(input, weight, bias, EPS)


def _response_norm_backward(grad: Tensor, input: Tensor, weight: Tensor, bias: Tensor) -> Sequence[Tensor]:
    grad = grad.clone()  # it is changed in place
    return grad, *_kernels("response_norm").activated_backward(grad, input, weight, bias, EPS, "gelu")


def _one_kernel_mlp(
    input: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, residual: Tensor
) -> Sequence[Tensor]:
    parameters = (weight1, bias1, weight2, bias2)
    return _kernels("mlp").forward(input, *parameters, None, None, residual, None, None, EPS, "gelu", True, False)


def _product(
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    scale_bias: Tensor | None = None,
) -> Tensor:
    """A layer: the first one, with its activation, or the second, with a residual and perhaps of images it scales."""
    matmul, (columns, inner) = _common("matmul"), weight.shape
    out = tokens.new_empty((tokens.shape[0], columns))
    epilogue = matmul.Epilogue(bias=bias, activation="gelu" if residual is None else None, residual=residual)
    operands = matmul.matrix(tokens), matmul.matrix(weight).transposed, matmul.matrix(out)
    image_scale = None if scale is None else _common("images").ImageScale(scale, scale_bias)
    matmul.matmul(*operands, (len(tokens), columns, inner), epilogue, image_scale)
    return out


def _derivative(grad: Tensor, weight2: Tensor, tokens: Tensor, weight1: Tensor, bias1: Tensor) -> Sequence[Tensor]:
    """Gradient of the pre-activation, which is computed again."""
    matmul, (channels, hidden_width) = _common("matmul"), weight2.shape
    out, hidden = (grad.new_empty((grad.shape[0], hidden_width)) for _ in range(2))
    recomputed = matmul.matrix(tokens), matmul.matrix(weight1).transposed
    epilogue = matmul.Epilogue(activation="gelu", derivative=True, hidden=hidden, recomputed=recomputed, bias=bias1)
    operands = matmul.matrix(grad), matmul.matrix(weight2), matmul.matrix(out)
    matmul.matmul(*operands, (len(grad), hidden_width, channels), epilogue)
    return out, hidden


def _saved_derivative(grad: Tensor, weight2: Tensor, pre_activation: Tensor) -> Sequence[Tensor]:
    """Gradient of a pre-activation that was saved."""
    matmul, (channels, hidden_width) = _common("matmul"), weight2.shape
    out, hidden = (grad.new_empty((grad.shape[0], hidden_width)) for _ in range(2))
    epilogue = matmul.Epilogue(activation="gelu", derivative=True, hidden=hidden, pre_activation=pre_activation)
    operands = matmul.matrix(grad), matmul.matrix(weight2), matmul.matrix(out)
    matmul.matmul(*operands, (len(grad), hidden_width, channels), epilogue)
    return out, hidden


def _over_tokens(a: Tensor, b: Tensor) -> Sequence[Tensor]:
    """Gradient of a weight, and its layer's bias."""
    matmul, (count, rows) = _common("matmul"), a.shape
    return matmul.long_matmul(matmul.matrix(a).transposed, matmul.matrix(b), (rows, b.shape[1], count))


def _filters(image: tuple[int, int, int, int], size: int, precision: str) -> Iterator[Workload]:
    _, channels, _, width = image
    key = depthwise_conv.width_class(width), channels, size
    layer = {"input": image, "weight": (channels, 1, size, size), "bias": (channels,)}
    gradient = {"grad": image, "input": image, "weight": layer["weight"]}
    flops = 2 * size**2 * prod(image) * FLOPS_OF_CUDA_CORES
    yield Workload(depthwise_conv.FORWARD, key, precision, layer, _convolution, flops)
    yield Workload(depthwise_conv.WEIGHT_GRADIENT, (channels, size), precision, gradient, _weight_gradient, flops)
    if channels <= depthwise_conv_layer_norm.MAXIMUM_FUSED_CHANNELS:
        yield Workload(depthwise_conv_layer_norm.FUSED, key, precision, layer, _convolution_and_norm, flops)


def _norms(image: tuple[int, int, int, int], precision: str) -> Iterator[Workload]:
    batch, channels, height, width = image
    forward = {"input": image, "weight": (channels,), "bias": (channels,)}
    backward = {"grad": image, "input": image, "rstd": (batch * height * width,)}
    yield Workload(layer_norm.FORWARD, (channels,), precision, forward, _norm)
    yield Workload(layer_norm.BACKWARD, (channels,), precision, backward, _norm_backward)


def _response_norms(image: tuple[int, int, int, int], precision: str) -> Iterator[Workload]:
    batch, channels, height, width = image
    hidden = 4 * channels
    tokens = batch, height * width, hidden
    shapes = {"input": tokens, "weight": (hidden,), "bias": (hidden,)}
    for tunable in (response_norm.SUMS, response_norm.APPLY):
        yield Workload(tunable, (hidden,), precision, shapes, _response_norm)
    shapes = {"grad": tokens, **shapes}
    yield Workload(response_norm.ACTIVATED_BACKWARD, (hidden,), precision, shapes, _response_norm_backward)


def _bits(precision: str) -> int:
    with multiplying(precision) as dtype:
        return operand_bits(dtype)


def _layers(
    images: int, tokens_per_image: int, channels: int, precision: str, architecture: int, grn: bool
) -> Iterator[Workload]:
    """The MLP's products over the tokens of so many images."""
    count, hidden, bits = images * tokens_per_image, 4 * channels, _bits(precision)
    tokens, activations = (count, channels), (count, hidden)
    layer1, layer2 = {"weight1": (hidden, channels), "bias1": (hidden,)}, {"weight2": (channels, hidden)}

    def product(
        columns: int, inner: int, kind: Kind, call: Callable[..., Any], shapes: dict[str, tuple[int, ...]]
    ) -> Workload:
        few = few_programs(count, columns)
        key = columns, inner, bits, int(aligned(kind, columns, inner)), int(few), architecture
        return Workload(MATMUL, key, precision, shapes, call, flops=2 * count * channels * hidden)

    shapes = {"tokens": tokens, "weight": (hidden, channels), "bias": (hidden,)}
    yield product(hidden, channels, Kind.PLAIN, _product, shapes)
    shapes = {"tokens": activations, "weight": (channels, hidden), "bias": (channels,), "residual": tokens}
    yield product(channels, hidden, Kind.PLAIN, _product, shapes)
    if channels % 16 == 0:  # else what holds for the product holds for this one
        if grn and scales_operands(tokens_per_image, architecture):
            image_scale = {"scale": (images, hidden), "scale_bias": (hidden,)}
            yield product(channels, hidden, Kind.SCALED, _product, {**shapes, **image_scale})
        shapes = {"grad": tokens, **layer2}
        if channels <= RECOMPUTED_CHANNELS:
            yield product(hidden, channels, Kind.RECOMPUTED, _derivative, {**shapes, "tokens": tokens, **layer1})
        else:
            yield product(
                hidden, channels, Kind.DERIVATIVE, _saved_derivative, {**shapes, "pre_activation": activations}
            )


def _products(image: tuple[int, int, int, int], precision: str, architecture: int, grn: bool) -> Iterator[Workload]:
    batch, channels, height, width = image
    count, hidden, bits = batch * height * width, 4 * channels, _bits(precision)
    flops = 2 * count * channels * hidden
    if bits == 16 and mlp.fused_config(channels, architecture) is not None:
        layer1, layer2 = {"weight1": (hidden, channels), "bias1": (hidden,)}, {"weight2": (channels, hidden)}
        shapes = {"input": image, **layer1, **layer2, "bias2": (channels,), "residual": image}
        yield Workload(mlp.FUSED, (channels, architecture), precision, shapes, _one_kernel_mlp, 2 * flops)
    # One image may have few programs, which other tiles are for.
    block = height * width, channels, precision, architecture, grn
    layers = [layer for images in (1, batch) for layer in _layers(images, *block)]
    yield from {layer.name: layer for layer in layers}.values()

    tokens, activations = (count, channels), (count, hidden)
    long_matmul = partial(Workload, LONG_MATMUL, precision=precision, call=_over_tokens, flops=flops)
    for rows, columns, a, b in ((hidden, channels, activations, tokens), (channels, hidden, tokens, activations)):
        kind = int(aligned(Kind.PLAIN, rows, columns))
        yield long_matmul(key=(rows, columns, bits, kind, architecture), shapes={"a": a, "b": b})


def workloads(
    image: tuple[int, int, int, int], precision: str, architecture: int, grn: bool, size: int = 7
) -> list[Workload]:
    """The kernels of a block on images [N, C, H, W].

    Args:
        precision: one of `PRECISIONS`.
        architecture: as `ops.common.launch.architecture` gives it.
        grn: with those of global response normalisation.
        size: of the filters.
    """
    products = _products(image, precision, architecture, grn)
    found = [*_filters(image, size, precision), *_norms(image, precision), *products]
    return [*found, *(_response_norms(image, precision) if grn else ())]
