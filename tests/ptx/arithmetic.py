"""Instructions that compute registers from registers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from ptx.program import Instruction
from ptx.values import FLOATS, KINDS, Array, Read, narrow, reader, round_to_tf32, widen

Compute = Callable[[list[Array]], Array]


def _quotient(a: Array, b: Array) -> Array:
    """Towards zero, as PTX divides integers."""
    return np.where((a % b != 0) & ((a < 0) != (b < 0)), a // b + 1, a // b).astype(a.dtype)


def _bits(a: Array, start: Array, length: Array) -> Array:
    """A field of bits, of a signed type with its sign."""
    size = 8 * a.dtype.itemsize
    left = (size - (start + length)).astype(a.dtype)
    return (a << left) >> (size - length).astype(a.dtype)


def _inserted(a: Array, b: Array, start: Array, length: Array) -> Array:
    """b with a field of its bits replaced by the last ones of a."""
    field = ((np.uint64(1) << length.astype(np.uint64)) - np.uint64(1) << start.astype(np.uint64)).astype(b.dtype)
    return b & ~field | a << start.astype(a.dtype) & field


FLOAT: dict[str, Callable[..., Array]] = {
    "abs": np.abs,
    "add": np.add,
    "div": np.divide,
    "ex2": np.exp2,
    "lg2": np.log2,
    "max": np.fmax,
    "max.NaN": np.maximum,
    "min": np.fmin,
    "min.NaN": np.minimum,
    "mov": lambda a: a,
    "mul": np.multiply,
    "neg": np.negative,
    "rcp": lambda a: 1 / a,
    "rsqrt": lambda a: (1 / np.sqrt(a.astype(np.float64))).astype(np.float32),
    "sqrt": np.sqrt,
    "sub": np.subtract,
    "tanh": np.tanh,
    # One rounding: a product of two float32 is exact in float64.
    "fma": lambda a, b, c: (a.astype(np.float64) * b + c).astype(np.float32),
}

INTEGER: dict[str, Callable[..., Array]] = {
    "abs": np.abs,
    "add": np.add,
    "and": np.bitwise_and,
    "bfe": _bits,
    "bfi": _inserted,
    "div": _quotient,
    "mad.lo": lambda a, b, c: a * b + c,
    "max": np.maximum,
    "min": np.minimum,
    "mov": lambda a: a,
    "mul.hi": lambda a, b: (a.astype(np.int64) * b >> 32).astype(a.dtype),
    "mul.lo": np.multiply,
    "neg": np.negative,
    "not": np.invert,
    "or": np.bitwise_or,
    "rem": lambda a, b: a - _quotient(a, b) * b,
    "sub": np.subtract,
    "xor": np.bitwise_xor,
}

COMPARISONS: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal,
    "ne": lambda a, b: (a != b) & (a == a) & (b == b),  # ordered: false where one is NaN
    "neu": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
}


def _shift(a: Array, by: Array, left: bool) -> Array:
    """By at most the size, which leaves nothing but the sign."""
    size = 8 * a.dtype.itemsize
    within = np.minimum(by, size - 1).astype(a.dtype)
    shifted = a << within if left else a >> within
    return np.where(by < size, shifted, a >> a.dtype.type(size - 1) if a.dtype.kind == "i" and not left else 0)


def _readers(instruction: Instruction, kinds: list[str]) -> list[Read]:
    return [reader(operand, kind) for operand, kind in zip(instruction.operands[1:], kinds, strict=True)]


def _float_operation(instruction: Instruction) -> Callable[..., Array]:
    name, *modifiers = instruction.parts
    return FLOAT[f"{name}.NaN" if "NaN" in modifiers else name]


def _halves(value: Array, kind: str) -> list[Array]:
    """The low and the high number of packed ones, widened."""
    return [widen((value >> np.uint32(shift)).astype(np.uint16).view(KINDS[kind]), kind) for shift in (0, 16)]


def _packed(low: Array, high: Array, kind: str) -> Array:
    """Both rounded, in one word."""
    low, high = (narrow(half, kind).view(np.uint16).astype(np.uint32) for half in (low, high))
    return high << np.uint32(16) | low


def _compute_float(instruction: Instruction) -> tuple[list[Read], Compute]:
    kind, operation = instruction.parts[-1], _float_operation(instruction)
    if kind.endswith("x2"):
        kind, reads = kind.removesuffix("x2"), _readers(instruction, ["b32"] * (len(instruction.operands) - 1))
        return reads, lambda values: _packed(
            *(operation(*halves) for halves in zip(*(_halves(value, kind) for value in values), strict=True)), kind
        )
    reads = _readers(instruction, [kind] * (len(instruction.operands) - 1))
    if kind in ("f32", "f64"):
        return reads, lambda values: operation(*values)
    return reads, lambda values: narrow(operation(*(widen(value, kind) for value in values)), kind)


def _compute_integer(instruction: Instruction) -> tuple[list[Read], Compute]:
    name, *modifiers, kind = instruction.parts
    operation = INTEGER[".".join([name, *(m for m in modifiers if m in ("lo", "hi"))])]
    kinds = [kind] * (len(instruction.operands) - 1)
    if name in ("bfe", "bfi"):
        kinds[-2:] = ["u32", "u32"]
    if "hi" in modifiers and kind not in ("s32", "u32"):
        raise NotImplementedError(instruction.text)
    return _readers(instruction, kinds), lambda values: operation(*values)


def _wide(instruction: Instruction) -> tuple[list[Read], Compute]:
    """Factors of 32 bits, product and summand of 64."""
    kind = instruction.parts[-1]
    wide = f"{kind[0]}{2 * int(kind[1:])}"
    reads = _readers(instruction, [kind, kind, wide][: len(instruction.operands) - 1])
    return reads, lambda values: sum(values[2:], values[0].astype(KINDS[wide]) * values[1].astype(KINDS[wide]))


def _shifted(instruction: Instruction) -> tuple[list[Read], Compute]:
    left = instruction.parts[0] == "shl"
    return _readers(instruction, [instruction.parts[-1], "u32"]), lambda values: _shift(*values, left)


def _selected(instruction: Instruction) -> tuple[list[Read], Compute]:
    kind = instruction.parts[-1]
    return _readers(instruction, [kind, kind, "pred"]), lambda values: np.where(values[2], values[0], values[1])


def _permuted(instruction: Instruction) -> tuple[list[Read], Compute]:
    def permute(values: list[Array]) -> Array:
        a, b, selector = (np.atleast_1d(value).astype(np.uint64) for value in values)
        both, result = a | b << np.uint64(32), np.uint64(0)
        for byte in range(4):
            choice = selector >> np.uint64(4 * byte)
            chosen = both >> (choice & np.uint64(7)) * np.uint64(8) & np.uint64(0xFF)
            sign = np.where(chosen & np.uint64(0x80), np.uint64(0xFF), np.uint64(0))
            result = result | np.where(choice & np.uint64(8), sign, chosen) << np.uint64(8 * byte)
        return result.astype(np.uint32)

    return _readers(instruction, ["u32"] * 3), permute


def _converted(instruction: Instruction) -> tuple[list[Read], Compute]:
    to, source = instruction.parts[-2:]
    if to in ("bf16x2", "f16x2"):
        half = to.removesuffix("x2")
        return _readers(instruction, [source] * 2), lambda values: _packed(values[1], values[0], half)
    reads = _readers(instruction, [source])
    if to == "tf32":
        return reads, lambda values: round_to_tf32(values[0])
    if source in FLOATS and to in FLOATS:
        return reads, lambda values: narrow(widen(values[0], source), to)
    rounding = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}.get(instruction.parts[1])
    if source in FLOATS and rounding is not None:
        return reads, lambda values: rounding(widen(values[0], source)).astype(KINDS[to])
    if source in FLOATS:
        raise NotImplementedError(instruction.text)
    if to in FLOATS:
        return reads, lambda values: narrow(values[0].astype(np.float32), to)
    return reads, lambda values: values[0].astype(KINDS[to])


def compute(instruction: Instruction) -> tuple[list[Read], Compute]:
    """What an instruction reads, and its one result from that; NotImplementedError if it is none of these."""
    name, *modifiers = instruction.parts
    kind = modifiers[-1]
    if name == "cvt":
        return _converted(instruction)
    if name == "cvta":  # of a tensor's address, which is the same everywhere
        return _readers(instruction, [kind]), lambda values: values[0]
    if name in ("mul", "mad") and "wide" in modifiers:
        return _wide(instruction)
    if name in ("shl", "shr"):
        return _shifted(instruction)
    if name == "selp":
        return _selected(instruction)
    if name == "prmt":
        return _permuted(instruction)
    if kind.removesuffix("x2") in FLOATS and name in FLOAT:
        return _compute_float(instruction)
    if kind in KINDS and kind not in FLOATS and (name in INTEGER or f"{name}.lo" in INTEGER):
        return _compute_integer(instruction)
    raise NotImplementedError(instruction.text)


def compare(instruction: Instruction) -> tuple[list[Read], Callable[[list[Array]], list[Array]]]:
    """What `setp` reads, and its predicates, two of packed numbers."""
    comparison, kind = COMPARISONS[instruction.parts[1]], instruction.parts[-1]
    half = kind.removesuffix("x2")
    if half == kind:
        reads = _readers(instruction, [kind] * 2)
        return reads, lambda values: [comparison(*(widen(value, kind) for value in values))]
    return _readers(instruction, ["b32"] * 2), lambda values: [
        comparison(a, b) for a, b in zip(*(_halves(value, half) for value in values), strict=True)
    ]
