"""Instructions of a whole warp on matrices: ldmatrix, stmatrix, mma.sync, and of four warps: wgmma."""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from ptx.memory import Fault
from ptx.program import Instruction
from ptx.values import Array, reader, widen

if TYPE_CHECKING:
    from ptx.machine import Machine, Run

LANE = np.arange(32)
ROW, PAIR = LANE // 4, LANE % 4
"""g and q in PTX's pictures of fragments."""


@cache
def _fragment_a(bits: int) -> Array:
    """Places in a 16 x 16 (16 bits) or 16 x 8 (TF32) matrix, flat, of [lanes, registers, elements]."""
    register, element = np.arange(4)[:, None], np.arange(32 // bits)
    row = ROW[:, None, None] + 8 * (register % 2)
    column = (PAIR[:, None, None] * len(element) + element) + 4 * len(element) * (register // 2)
    return row * (8 * len(element)) + column


@cache
def _fragment_b(bits: int) -> Array:
    """Places in a matrix of 16 or 8 rows and 8 columns."""
    register, element = np.arange(2)[:, None], np.arange(32 // bits)
    row = PAIR[:, None, None] * len(element) + element + 4 * len(element) * register
    return row * 8 + ROW[:, None, None]


@cache
def _fragment_c(columns: int) -> Array:
    """Places in a matrix of 16 rows of [lanes, registers]."""
    register = np.arange(columns // 2)
    row = ROW[:, None] + 8 * (register // 2 % 2)
    return row * columns + 8 * (register // 4) + 2 * PAIR[:, None] + register % 2


@cache
def _order(places: bytes) -> Array:
    return np.argsort(np.frombuffer(places, np.int64))


def _matrix(values: Array, places: Array, shape: tuple[int, int]) -> Array:
    """[warps, *shape] of fragments [warps, *places.shape]."""
    return values.reshape(len(values), -1)[:, _order(places.tobytes())].reshape(-1, *shape)


def _operand(words: Array, kind: str) -> Array:
    """The numbers in words [..., registers] as float32 [..., registers, elements]; of TF32 19 bits count."""
    if kind == "tf32":
        return (words & np.uint32(0xFFFFE000)).view(np.float32)[..., None]
    halves = np.ascontiguousarray(words).view(np.uint16 if kind == "bf16" else np.float16)
    return widen(halves.reshape(*words.shape, 2), kind)


def _registers(machine: Machine, names: tuple[str, ...], threads: Array) -> Array:
    """[warps, 32, registers] words."""
    return np.stack([machine.registers[name][threads] for name in names], -1).reshape(-1, 32, len(names))


def warps_of(machine: Machine, mask: Array | None) -> Array:
    """The threads [warps, 32] of an instruction that whole warps run."""
    threads = machine.threads_of(mask)
    if len(threads) % 32 or (threads.reshape(-1, 32) % 32 != LANE).any():
        raise Fault("diverged warp: not all lanes run an instruction of the warp")
    return threads.reshape(-1, 32)


def load_or_store_matrix(instruction: Instruction) -> Run:
    """ldmatrix and stmatrix: rows of 16 bytes at the addresses of eight lanes for each matrix."""
    loads, transposed = instruction.name.startswith("ldmatrix"), ".trans" in instruction.name
    registers, address = instruction.operands if loads else instruction.operands[::-1]
    names = (registers,) if isinstance(registers, str) else registers

    def run(machine: Machine, mask: Array | None) -> None:
        warps = warps_of(machine, mask)
        lanes = warps[:, : 8 * len(names)]
        places = machine.shared.places(lanes.ravel(), machine.address(address, "u32")[lanes.ravel()], 16)
        shape = (len(warps), len(names), 8, 8)
        if loads:
            rows = machine.shared.read(lanes.ravel(), places).reshape(shape)
            rows = np.ascontiguousarray(rows.transpose(0, 1, 3, 2) if transposed else rows)
            words = rows.view(np.uint32).reshape(len(warps), len(names), 32)
            for number, name in enumerate(names):
                machine.write_some(name, warps.ravel(), words[:, number].ravel())
            return
        words = _registers(machine, names, warps.ravel()).transpose(0, 2, 1)
        rows = np.ascontiguousarray(words).view(np.uint16).reshape(shape)
        rows = np.ascontiguousarray(rows.transpose(0, 1, 3, 2) if transposed else rows)
        machine.shared.write(lanes.ravel(), places, rows.reshape(-1, 8))

    return run


def multiply(instruction: Instruction) -> Run:
    """mma.sync.m16n8k16 of 16-bit types, m16n8k8 of TF32: sums in float32."""
    shape = re.search(r"m16n8k(\d+)\.row\.col\.f32\.(\w+)\.\w+\.f32", instruction.name)
    if shape is None or shape[2] not in ("f16", "bf16", "tf32") or int(shape[1]) != (8 if shape[2] == "tf32" else 16):
        raise NotImplementedError(instruction.text)
    inner, kind = int(shape[1]), shape[2]
    bits = 32 if kind == "tf32" else 16
    results, a_names, b_names, c_names = instruction.operands

    def run(machine: Machine, mask: Array | None) -> None:
        threads = warps_of(machine, mask).ravel()
        a, b = (_operand(_registers(machine, names, threads), kind) for names in (a_names, b_names))
        a, b = _matrix(a, _fragment_a(bits), (16, inner)), _matrix(b, _fragment_b(bits), (inner, 8))
        c = _matrix(_registers(machine, c_names, threads).view(np.float32), _fragment_c(8), (16, 8))
        sums = (c + a @ b).reshape(len(c), -1)[:, _fragment_c(8)]
        for number, name in enumerate(results):
            machine.write_some(name, threads, sums[..., number].ravel().view(np.uint32))

    return run


def _descriptor_places(
    machine: Machine, threads: Array, descriptors: Array, rows: int, inner: int, bytes: int, rows_first: bool
) -> Array:
    """Units of shared memory [groups, rows, inner, bytes / 2] of an operand of wgmma.

    With inner elements side by side (K-major) eight rows make a pattern as wide as the swizzle; with rows side by side
    (MN-major) as many rows as it is wide, and eight of the inner dimension, make one.

    Source: PTX ISA, "Strides", "Matrix descriptor"; CUTLASS names the same in cute/arch/mma_sm90_desc.hpp.
    """
    swizzle = int(descriptors[0] >> np.uint64(62))
    if swizzle == 0 or (descriptors >> np.uint64(62) != swizzle).any() or (descriptors >> np.uint64(49) & 7).any():
        raise NotImplementedError(f"wgmma: a descriptor with swizzle {swizzle} or a base offset")
    span = 256 >> swizzle  # bytes that are swizzled together: 128, 64, 32
    start, leading, stride = (
        ((descriptors >> np.uint64(shift)) & np.uint64(0x3FFF)).astype(np.int64)[:, None, None] * 16
        for shift in (0, 16, 32)
    )
    row, column = np.arange(rows)[:, None], np.arange(inner)
    if rows_first:
        wide = span // bytes
        offsets = row % wide * bytes + row // wide * leading + column % 8 * span + column // 8 * stride
    else:
        offsets = row % 8 * span + row // 8 * stride + column * bytes
    addresses = start + offsets
    addresses = addresses ^ (addresses >> 7 & (span // 16 - 1)) << 4
    units = machine.shared.places(np.repeat(threads, rows * inner), addresses.reshape(-1), bytes)
    return units.reshape(len(threads), rows, inner, bytes // 2)


def _from_shared(
    machine: Machine, groups: Array, descriptor: str, rows: int, inner: int, kind: str, rows_first: bool
) -> Array:
    """[groups, rows, inner] in float32."""
    bytes, leaders = 4 if kind == "tf32" else 2, groups[:, 0]
    descriptors = np.broadcast_to(reader(descriptor, "u64")(machine), machine.count)[leaders]
    places = _descriptor_places(machine, leaders, descriptors, rows, inner, bytes, rows_first)
    units = np.ascontiguousarray(machine.shared.read_for_product(leaders, places))
    words = units.view(np.uint32) if kind == "tf32" else units
    if kind == "tf32":
        return (words[..., 0] & np.uint32(0xFFFFE000)).view(np.float32)
    return widen(words[..., 0].view(np.float16) if kind == "f16" else words[..., 0], kind)


def multiply_groups(instruction: Instruction) -> Run:
    """wgmma.mma_async: sums of 64 rows in the registers of four warps; operands stay under `SharedMemory`'s watch."""
    shape = re.search(r"m64n(\d+)k(\d+)\.f32\.(\w+)\.", instruction.name)
    if shape is None or shape[3] not in ("f16", "bf16", "tf32"):
        raise NotImplementedError(instruction.text)
    columns, inner, kind = int(shape[1]), int(shape[2]), shape[3]
    bits = 32 if kind == "tf32" else 16
    results, a_operand, b_descriptor, keeps, *options = instruction.operands
    assert isinstance(results, tuple) and isinstance(b_descriptor, str) and isinstance(keeps, str)
    if options[:2] != ["1", "1"]:
        raise NotImplementedError(instruction.text)
    transposed = [option == "1" for option in options[2:]]
    in_registers = isinstance(a_operand, tuple)
    a_rows_first = not in_registers and bool(transposed) and transposed[0]
    b_rows_first = bool(transposed) and transposed[-1]

    def run(machine: Machine, mask: Array | None) -> None:
        threads = warps_of(machine, mask).ravel()
        groups = threads.reshape(-1, 128)
        if (groups % 128 != np.arange(128)).any():
            raise Fault("diverged warp: not all of its four warps run wgmma")
        if isinstance(a_operand, tuple):
            a = _operand(_registers(machine, a_operand, threads), kind)
            a = _matrix(a, _fragment_a(bits), (16, inner)).reshape(-1, 64, inner)
        else:
            a = _from_shared(machine, groups, a_operand, 64, inner, kind, a_rows_first)
        b = _from_shared(machine, groups, b_descriptor, columns, inner, kind, b_rows_first)
        products = (a @ b.transpose(0, 2, 1)).reshape(-1, 16 * columns)[:, _fragment_c(columns)]
        kept = np.broadcast_to(reader(keeps, "pred")(machine), machine.count)[threads]
        for number, name in enumerate(results):
            sums = products[..., number].ravel()
            if kept.any():
                sums = sums + np.where(kept, machine.registers[name][threads].view(np.float32), np.float32(0))
            machine.write_some(name, threads, sums.view(np.uint32))

    return run
