"""What each instruction does, but for arithmetic and matrices: memory, copies, branches, barriers, other lanes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from ptx import arithmetic, matrices
from ptx.memory import Fault
from ptx.program import Instruction, Program
from ptx.values import KINDS, UNSIGNED, Array, reader

if TYPE_CHECKING:
    from ptx.machine import Machine

Run = Callable[["Machine", Array | None], "int | tuple[int, Array] | None"]
"""What an instruction does; where all threads branch to, or where some do and which."""


def _memory(instruction: Instruction) -> tuple[str, int, str]:
    """Space, number of elements and type of an access."""
    parts = instruction.parts
    space = next(part for part in parts if part in ("global", "shared", "shared::cta", "param"))
    many = next((int(part[1:]) for part in parts if part in ("v2", "v4", "v8")), 1)
    return space.split(":")[0], many, parts[-1]


def _names(operand: str | tuple[str, ...]) -> tuple[str, ...]:
    return (operand,) if isinstance(operand, str) else operand


def _load(instruction: Instruction) -> Run:
    space, many, kind = _memory(instruction)
    names, address, width = _names(instruction.operands[0]), instruction.operands[1], np.dtype(KINDS[kind]).itemsize
    assert isinstance(address, str)

    def run(machine: Machine, mask: Array | None) -> None:
        threads = machine.threads_of(mask)
        if space == "param":
            offsets = machine.address(address, "u64")[threads].astype(np.int64) // width
            values = machine.parameters.view(UNSIGNED[width])[offsets[:, None] + np.arange(many)]
        elif space == "global":
            values = machine.memory.load(machine.address(address, "u64")[threads], width, many)
        else:
            addresses = machine.address(address, "u32")[threads]
            places = machine.shared.places(threads, addresses, width * many)
            values = machine.shared.read(threads, places).view(UNSIGNED[width])
        for number, name in enumerate(names):
            _extend(machine, name, values[:, number], kind, threads)
        return None

    return run


def _extend(machine: Machine, name: str, values: Array, kind: str, threads: Array) -> None:
    """Writes what was loaded, widened as its type says where the register is wider."""
    bits, dtype = machine.program.width(name), np.dtype(KINDS[kind])
    wide = values.view(dtype)
    wide = wide.astype(f"int{bits}" if dtype.kind == "i" else f"uint{bits}") if 8 * dtype.itemsize != bits else wide
    machine.write_some(name, threads, np.ascontiguousarray(wide).view(f"uint{bits}"))


def _store(instruction: Instruction) -> Run:
    space, many, kind = _memory(instruction)
    address, names, dtype = instruction.operands[0], _names(instruction.operands[1]), np.dtype(KINDS[kind])
    reads = [reader(name, kind) for name in names]
    assert isinstance(address, str)

    def run(machine: Machine, mask: Array | None) -> None:
        threads = machine.threads_of(mask)
        columns = [np.broadcast_to(read(machine), machine.count)[threads] for read in reads]
        values = np.stack(columns, -1).view(UNSIGNED[dtype.itemsize])
        if space == "global":
            return machine.memory.store(machine.address(address, "u64")[threads], values)
        addresses = machine.address(address, "u32")[threads]
        places = machine.shared.places(threads, addresses, dtype.itemsize * many)
        return machine.shared.write(threads, places, values.view(np.uint16))

    return run


def _copy(instruction: Instruction) -> Run:
    """cp.async: reads at once, nothing where a predicate or a size of 0 says so, and lands when it is waited for."""
    target, source, size, *given = map(str, instruction.operands)
    bytes, ignores = int(size, 0), bool(given) and given[0].startswith("%p")
    read = reader(given[0] if given else size, "pred" if ignores else "u32")

    def run(machine: Machine, mask: Array | None) -> None:
        threads = machine.threads_of(mask)
        told = np.broadcast_to(read(machine), machine.count)[threads]
        if not ignores and not np.isin(told, (0, bytes)).all():
            raise NotImplementedError("a copy of some of its bytes")
        values = np.zeros((len(threads), bytes // 4), np.uint32)
        full = ~told if ignores else told == bytes
        values[full] = machine.memory.load(machine.address(source, "u64")[threads[full]], 4, bytes // 4)
        if full.any() and (machine.address(source, "u64")[threads[full]] % np.uint64(bytes)).any():
            raise Fault(f"misaligned: a copy of {bytes} bytes")
        places = machine.shared.places(threads, machine.address(target, "u32")[threads], bytes)
        machine.shared.start_copy(threads, places, values.view(np.uint16))

    return run


def _branch(program: Program, instruction: Instruction) -> Run:
    returns = instruction.name in ("ret", "exit")
    target = len(program.instructions) if returns else program.labels[str(instruction.operands[0])]
    predicate = instruction.predicate
    if predicate is None:
        return lambda machine, mask: target

    def run(machine: Machine, mask: Array | None) -> int | tuple[int, Array] | None:
        taken = machine.registers[predicate] ^ instruction.negated
        if mask is not None:
            taken = taken & mask
        if not taken.any():
            return None
        return target if (taken if mask is None else taken[mask]).all() else (target, taken)

    return run


def _barrier(machine: Machine, mask: Array | None) -> None:
    present = np.ones(machine.count, bool) if mask is None else mask
    present = present.reshape(-1, machine.threads)
    if (present.any(1) != present.all(1)).any():
        raise Fault("divergent barrier: not all threads of a block are at it")
    machine.shared.barrier(np.flatnonzero(present.all(1)))


def _barrier_with_or(instruction: Instruction) -> Run:
    """A barrier that tells all threads of a block whether any of them has a predicate."""
    result, _, source = map(str, instruction.operands)

    def run(machine: Machine, mask: Array | None) -> None:
        _barrier(machine, mask)
        given = machine.registers[source] if mask is None else machine.registers[source] & mask
        machine.write(result, np.repeat(given.reshape(-1, machine.threads).any(1), machine.threads), mask)

    return run


def _synchronise(instruction: Instruction) -> Run:
    """Barriers, fences, and the groups of copies and products."""
    name, operands = instruction.name, instruction.operands
    if name in ("bar.sync", "barrier.sync") and operands == ("0",):
        return _barrier
    if name == "bar.red.or.pred":
        return _barrier_with_or(instruction)
    if name in ("cp.async.wait_group", "cp.async.wait_all") or name.startswith("wgmma.wait_group"):
        pending, products = int(str(operands[0])) if operands else -1, name.startswith("wgmma")

        def wait(machine: Machine, mask: Array | None) -> None:
            shared, threads = machine.shared, machine.threads_of(mask)
            (shared.wait_for_products if products else shared.wait_for_copies)(threads, pending)

        return wait
    if name == "cp.async.commit_group" or name.startswith("wgmma.commit_group"):
        products = name.startswith("wgmma")

        def commit(machine: Machine, mask: Array | None) -> None:
            shared = machine.shared
            (shared.committed_products if products else shared.committed_copies)[machine.threads_of(mask)] += 1

        return commit
    if name == "fence.proxy.async.shared::cta":
        return lambda machine, mask: machine.shared.fence(machine.threads_of(mask))
    if name.startswith(("wgmma.fence", "bar.warp.sync")):
        return lambda machine, mask: None
    raise NotImplementedError(instruction.text)


def _shuffle(instruction: Instruction) -> Run:
    """shfl.sync: of another lane of the warp, or of a part of it."""
    target, source, lanes, limits, _ = map(str, instruction.operands)
    result, _, found = target.partition("|")
    mode, read, read_limits = instruction.parts[2], reader(lanes, "u32"), reader(limits, "u32")
    if mode not in ("bfly", "idx"):
        raise NotImplementedError(instruction.text)

    def run(machine: Machine, mask: Array | None) -> None:
        threads = matrices.warps_of(machine, mask).ravel()
        given, limit = (
            np.broadcast_to(r(machine), machine.count)[threads].astype(np.int64) for r in (read, read_limits)
        )
        lane, part = threads % 32, limit >> 8 & 31
        last = lane & part | limit & 31 & ~part
        partner = lane ^ given if mode == "bfly" else lane & part | given & 31 & ~part
        inside = partner <= last
        chosen = threads - lane + np.where(inside, partner, lane)
        machine.write_some(result, threads, machine.registers[source][chosen])
        if found:
            machine.write_some(found, threads, inside)

    return run


def _reduce(instruction: Instruction) -> Run:
    """redux.sync: one result of all lanes."""
    result, source, _ = map(str, instruction.operands)
    operation, kind = instruction.parts[2:]
    reduce, dtype = {"add": np.add, "max": np.maximum, "min": np.minimum}[operation], KINDS[kind]

    def run(machine: Machine, mask: Array | None) -> None:
        warps = matrices.warps_of(machine, mask)
        results = reduce.reduce(machine.registers[source][warps].view(dtype), 1).astype(dtype).view(np.uint32)
        machine.write_some(result, warps.ravel(), np.repeat(results, 32))

    return run


def _repack(instruction: Instruction) -> Run:
    """mov between a register and its parts."""
    to, source = instruction.operands
    if isinstance(to, tuple):
        whole = reader(source, instruction.parts[-1])
        part = f"uint{np.dtype(KINDS[instruction.parts[-1]]).itemsize * 8 // len(to)}"

        def unpack(machine: Machine, mask: Array | None) -> None:
            values = np.ascontiguousarray(np.broadcast_to(whole(machine), machine.count))
            for number, name in enumerate(to):
                machine.write(name, values.view(part).reshape(machine.count, -1)[:, number], mask)

        return unpack
    size = np.dtype(KINDS[instruction.parts[-1]]).itemsize
    reads = [reader(name, f"b{8 * size // len(source)}") for name in source]

    def pack(machine: Machine, mask: Array | None) -> None:
        values = np.stack([np.broadcast_to(read(machine), machine.count) for read in reads], -1)
        machine.write(to, values.view(f"uint{8 * size}")[:, 0], mask)

    return pack


def _compute(instruction: Instruction) -> Run:
    if instruction.parts[0] == "setp":
        reads, compare = arithmetic.compare(instruction)
        names = str(instruction.operands[0]).split("|")

        def run_comparison(machine: Machine, mask: Array | None) -> None:
            for name, result in zip(names, compare([read(machine) for read in reads]), strict=True):
                machine.write(name, result, mask)

        return run_comparison
    reads, compute = arithmetic.compute(instruction)
    name = str(instruction.operands[0])

    def run(machine: Machine, mask: Array | None) -> None:
        machine.write(name, compute([read(machine) for read in reads]), mask)

    return run


def run_of(program: Program, instruction: Instruction) -> Run:
    """An instruction as a function of the machine and of which threads run it, None for all."""
    name = instruction.parts[0]
    if name in ("bra", "ret", "exit"):
        return _branch(program, instruction)
    if instruction.name.startswith("cp.async.c") and "shared" in instruction.name:
        run = _copy(instruction)
    elif name == "mov" and any(isinstance(operand, tuple) for operand in instruction.operands):
        run = _repack(instruction)
    elif instruction.name.startswith("wgmma.mma_async"):
        run = matrices.multiply_groups(instruction)
    elif name in ("bar", "barrier", "cp", "wgmma", "fence"):
        run = _synchronise(instruction)
    else:
        kinds = {
            "ld": _load,
            "st": _store,
            "shfl": _shuffle,
            "redux": _reduce,
            "mma": matrices.multiply,
            "ldmatrix": matrices.load_or_store_matrix,
            "stmatrix": matrices.load_or_store_matrix,
        }
        run = kinds.get(name, _compute)(instruction)
    predicate = instruction.predicate
    if predicate is None:
        return run

    def run_predicated(machine: Machine, mask: Array | None) -> None:
        chosen = machine.registers[predicate] ^ instruction.negated
        if mask is not None:
            chosen = chosen & mask
        if chosen.any():
            run(machine, None if chosen.all() else chosen)

    return run_predicated
