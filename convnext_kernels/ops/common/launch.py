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
    settings = torch.backends.cuda.matmul
    # PyTorch 2.9 named it anew; since then reading the old name raises where the new one was set.
    allowed = settings.fp32_precision == "tf32" if hasattr(settings, "fp32_precision") else settings.allow_tf32
    return "tf32" if allowed else "ieee"


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple


def next_power_of_2(value: int) -> int:
    """The smallest power of two that is at least `value`, which must be positive."""
    return 1 << (value - 1).bit_length()
