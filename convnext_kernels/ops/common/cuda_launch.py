"""Calling the compiled library: on the tensors' device and PyTorch's current stream."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from convnext_kernels import build


def library() -> Any:
    """The compiled library; only a call whose backend was chosen comes here, so it is there."""
    return build.compiled_library()


def element_type(dtype: torch.dtype) -> Any:
    """A dtype as the library names it."""
    return getattr(library().ElementType, str(dtype).removeprefix("torch."))


def address(tensor: Tensor | None) -> int:
    """Of a tensor's first element; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def same_dtype(*parameters: Tensor | None) -> tuple[Tensor | None, ...]:
    """Parameters of one kernel, dense and of one dtype: float32 where they differ. They are small."""
    dtypes = {parameter.dtype for parameter in parameters if parameter is not None}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    return tuple(None if parameter is None else parameter.to(dtype).contiguous() for parameter in parameters)


def parameter_type(default: torch.dtype, *parameters: Tensor | None) -> Any:
    """The library's name for the dtype of parameters that `same_dtype` returned; of the activations if there are none."""
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
