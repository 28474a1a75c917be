"""Launching Triton kernels: on the tensors' device and PyTorch's current stream."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from convnext_kernels.backends import interpreting


def launch(
    kernel: Any, grid: tuple[int, ...], *arguments: Any, warps: int, registers: int | None = None, **constants: Any
) -> None:
    """Launches a Triton kernel on the device of its first argument, a tensor, and PyTorch's current stream there.

    Args:
        registers: the most that a thread may take; None leaves that to the compiler.
    """
    # Triton launches on the current device, whatever its arguments' device.
    first: Tensor = arguments[0]
    current: AbstractContextManager[Any] = torch.cuda.device(first.device) if first.is_cuda else nullcontext()
    with current:
        # A multiply and an add become one instruction and one rounding; from Triton 3.10 on only where asked for.
        kernel[grid](*arguments, num_warps=warps, maxnreg=registers, enable_fp_fusion=True, **constants)


def architecture(device: torch.device) -> int:
    """90 for compute capability 9.0; that also in Triton's interpreter, which has none."""
    if interpreting():
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def float32_precision() -> str:
    """PyTorch's setting for float32 matrix products, as `tl.dot` names it: "tf32" or "ieee"."""
    settings = torch.backends.cuda.matmul
    # PyTorch 2.9 named it anew; since then reading the old name raises where the new one was set.
    allowed = settings.fp32_precision == "tf32" if hasattr(settings, "fp32_precision") else settings.allow_tf32
    return "tf32" if allowed else "ieee"


def product_precision() -> str:
    """What kernels are told of it; Triton's interpreter, which has no TF32, multiplies in float32."""
    return "ieee" if interpreting() else float32_precision()


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple


def next_power_of_2(value: int) -> int:
    """The smallest power of two that is at least `value`, which must be positive."""
    return 1 << (value - 1).bit_length()
