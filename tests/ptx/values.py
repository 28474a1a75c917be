"""Types of PTX in NumPy: how registers' bits become numbers and numbers bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from ptx.machine import Machine

Array = np.ndarray[Any, Any]
Read = Callable[["Machine"], Array]

KINDS: dict[str, Any] = {
    "pred": np.bool_,
    **{f"s{bits}": np.dtype(f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"{letter}{bits}": np.dtype(f"uint{bits}") for bits in (8, 16, 32, 64) for letter in "ub"},
    "f16": np.float16,
    "bf16": np.uint16,  # NumPy has none: its bits
    "f32": np.float32,
    "f64": np.float64,
}
"""What NumPy calls the types of PTX."""

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
"""By bytes of an element."""

FLOATS = ("f16", "bf16", "f32", "f64")


def widen(values: Array, kind: str) -> Array:
    """Floating-point numbers as float32, or float64 as they are."""
    if kind == "bf16":
        return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return values.astype(np.float32) if kind == "f16" else values


def narrow(values: Array, kind: str) -> Array:
    """Floating-point numbers rounded to nearest even."""
    if kind != "bf16":
        return values.astype(KINDS[kind])
    bits = np.atleast_1d(values.astype(np.float32)).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FFF), rounded).astype(np.uint16)


def round_to_tf32(values: Array) -> Array:
    """To nearest, ties away from zero; float32 whose last 13 bits are 0."""
    bits = values.view(np.uint32)
    rounded = np.where(np.isfinite(values), bits + np.uint32(0x1000), bits)
    return (rounded & np.uint32(0xFFFFE000)).view(np.float32)


def _constant(text: str, kind: str) -> Array:
    if kind == "pred":
        return np.array(int(text, 0) != 0)
    dtype = np.dtype(KINDS[kind])
    if text.startswith(("0f", "0d")):
        return np.array(int(text[2:], 16), f"uint{4 * len(text[2:])}").view(f"float{4 * len(text[2:])}").view(dtype)
    bits = 8 * dtype.itemsize
    return np.array(int(text.rstrip("U"), 0) % 2**bits, f"uint{bits}").view(dtype)


def reader(operand: Any, kind: str) -> Read:
    """What reads a register, a number or the address of a symbol as a type."""
    dtype = np.dtype(KINDS[kind])
    if operand.startswith("%"):

        def read(machine: Machine) -> Array:
            bits = machine.registers[operand]
            if bits.itemsize != dtype.itemsize:  # an instruction may read the lower half of a register
                bits = bits.astype(UNSIGNED[dtype.itemsize])
            return bits.view(dtype)

        return read
    if operand[0].isdigit() or operand[0] == "-":
        constant = _constant(operand, kind)
        return lambda machine: constant
    return lambda machine: np.array(machine.symbol(operand), dtype)
