"""Calling the compiled library: on the tensors' device and PyTorch's current stream."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from convnext_kernels import build
from convnext_kernels.ops.common.layouts import to_channels_last


def library() -> Any:
    """The compiled library; only a call whose backend was chosen comes here, so it is there."""
    return build.compiled_library()


@cache
def element_type(dtype: torch.dtype) -> Any:
    """A dtype as the library names it."""
    return getattr(library().ElementType, str(dtype).removeprefix("torch."))


def address(tensor: Tensor | None) -> int:
    """Of a tensor's first element; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def images(input: Tensor) -> Tensor:
    """[N, C, H, W] as [N, H, W, C], in its own memory where channels lie side by side there, else copied."""
    rows = input.permute(0, 2, 3, 1)
    return rows if rows.stride(3) == 1 or rows.shape[3] == 1 else to_channels_last(input)


def image_strides(rows: Tensor) -> tuple[int, ...]:
    """Of image, row and pixel of [N, H, W, C]; 0 where there is but one, whose stride in PyTorch can be anything."""
    return tuple(stride if size > 1 else 0 for size, stride in zip(rows.shape[:3], rows.stride()[:3], strict=True))


def same_dtype(*parameters: Tensor | None) -> tuple[Tensor | None, ...]:
    """Parameters of one kernel, dense and of one dtype: float32 where they differ. They are small."""
    dtypes = {parameter.dtype for parameter in parameters if parameter is not None}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    return tuple(None if parameter is None else parameter.to(dtype).contiguous() for parameter in parameters)


def as_float32(vector: Tensor | None) -> Tensor | None:
    """A vector that kernels read in float32 alone, such as factors of images."""
    return None if vector is None else vector.float()


def parameter_type(default: torch.dtype, *parameters: Tensor | None) -> Any:
    """The library's name for the dtype of what `same_dtype` returned; the activations' where that is all None."""
    return element_type(next((parameter.dtype for parameter in parameters if parameter is not None), default))


def _device_and_stream(device: torch.device) -> tuple[AbstractContextManager[Any], int]:
    """A context in which the device is the current one, and the address of its current stream."""
    index = torch.cuda.current_device() if device.index is None else device.index
    stream: int = torch._C._cuda_getCurrentRawStream(index)
    current: AbstractContextManager[Any] = nullcontext()
    if index != torch.cuda.current_device():
        current = torch.cuda.device(index)
    return current, stream


def launch(function: str, device: torch.device, **arguments: Any) -> None:
    """Calls a launcher of the library for tensors on `device`."""
    current, stream = _device_and_stream(device)
    with current:
        getattr(library(), function)(**arguments, stream=stream)


def partial_sums(partials: Tensor) -> Tensor:
    """Sums [splits, elements] in float32 over the splits, in an order that their number alone fixes."""
    count, elements = partials.shape
    sums = partials.new_empty(elements)
    launch(
        "partial_sums", partials.device, partials=address(partials), count=count, elements=elements, sums=address(sums)
    )
    return sums
