"""Launching Triton kernels: on the tensors' device and PyTorch's current stream."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Makes the tensor's device current, as Triton launches on the current one whatever its arguments' device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def float32_precision() -> str:
    """PyTorch's setting for float32 matrix products, as `tl.dot` names it: "tf32" or "ieee"."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple


def next_power_of_2(value: int) -> int:
    """The smallest power of two that is at least `value`, which must be positive."""
    return 1 << (value - 1).bit_length()
