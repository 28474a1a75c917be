"""Runs the blocks of a kernel, all threads side by side, one instruction after the other."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from ptx import arithmetic, matrices
from ptx.memory import UNSIGNED, Array, Fault, GlobalMemory, SharedMemory
from ptx.program import Instruction, Program
from ptx.values import KINDS, reader

MOST_THREADS = 2048
"""That run side by side, of whole blocks."""


class Machine:
    """Some blocks of a launch. Registers hold unsigned numbers, one for each thread, and are never changed in place."""

    def __init__(
        self, program: Program, blocks: Array, grid: Sequence[int], shared: int, memory: GlobalMemory, values: dict
    ) -> None:
        self.program, self.memory, self.values = program, memory, values
        self.count = len(blocks) * program.threads
        self.shared = SharedMemory(len(blocks), shared, program.threads)
        self.everyone = np.arange(self.count)
        thread, block = self.everyone % program.threads, np.repeat(blocks, program.threads)
        special = {
            "%tid.x": thread,
            "%laneid": thread % 32,
            "%ctaid.x": block % grid[0],
            "%ctaid.y": block // grid[0] % grid[1],
            "%ctaid.z": block // grid[0] // grid[1],
            **{f"%nctaid.{axis}": np.full(self.count, size) for axis, size in zip("xyz", grid, strict=True)},
            "%ntid.x": np.full(self.count, program.threads),
        }
        self.registers: dict[str, Array] = {name: value.astype(np.uint32) for name, value in special.items()}

    def threads_of(self, mask: Array | None) -> Array:
        return self.everyone if mask is None else np.flatnonzero(mask)

    def _stored(self, name: str, values: Array) -> Array:
        bits = self.program.widths[re.match(r"%([a-z]+)", name)[1]]  # type: ignore[index]
        return np.broadcast_to(values.view(np.bool_ if bits == 1 else f"uint{bits}"), self.count)

    def write(self, name: str, values: Array, mask: Array | None) -> None:
        """A register's new values; those of other threads stay."""
        if name == "_":
            return
        values = self._stored(name, np.asarray(values))
        if mask is not None:
            values = np.where(mask, values, self.registers.get(name, values))
        self.registers[name] = values

    def write_some(self, name: str, threads: Array, values: Array) -> None:
        """The new values of some threads alone."""
        if len(threads) == self.count:
            self.registers[name] = values
            return
        old = self.registers.get(name)
        new = np.zeros(self.count, values.dtype) if old is None else old.copy()
        new[threads] = values
        self.registers[name] = new

    def address(self, operand: str, kind: str) -> Array:
        """register + number, as an address of every thread."""
        base, _, offset = operand.replace(" ", "").partition("+")
        found = np.broadcast_to(reader(base, kind)(self), self.count)
        return found + found.dtype.type(int(offset)) if offset else found

    def run(self) -> None:
        """Threads at the first instruction run, those that branched further wait for them."""
        code, end = compiled(self.program), len(self.program.instructions)
        waiting: dict[int, Array] = {0: np.ones(self.count, bool)}
        while waiting:
            place = min(waiting)
            mask: Array | None = waiting.pop(place)
            mask = None if mask is not None and mask.all() else mask
            stop = min(waiting, default=end)
            while place < stop:
                try:
                    target = code[place](self, mask)
                except (Fault, NotImplementedError, KeyError) as fault:
                    raise Fault(f"{fault}, in {self.program.name}: {self.program.instructions[place].text}") from fault
                if target is None:
                    place += 1
                elif isinstance(target, int):
                    place = target
                    if place > stop or waiting:
                        break
                else:  # some threads branch
                    destination, taken = target
                    self._wait(waiting, destination, taken)
                    mask = ~taken if mask is None else mask & ~taken
                    place += 1
                    break
            if place < end:
                self._wait(waiting, place, np.ones(self.count, bool) if mask is None else mask)

    @staticmethod
    def _wait(waiting: dict[int, Array], place: int, mask: Array) -> None:
        waiting[place] = waiting[place] | mask if place in waiting else mask


Run = Callable[[Machine, Array | None], "int | tuple[int, Array] | None"]
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
        if space == "param":
            value = np.asarray(machine.values[address])
            return _extend(machine, names[0], np.broadcast_to(value, machine.count), kind, None)
        threads = machine.threads_of(mask)
        if space == "global":
            values = machine.memory.load(machine.address(address, "u64")[threads], width, many)
        else:
            addresses = machine.address(address, "u32")[threads]
            places = machine.shared.places(threads, addresses, width * many)
            values = machine.shared.read(threads, places).view(UNSIGNED[width])
        for number, name in enumerate(names):
            _extend(machine, name, values[:, number], kind, threads)
        return None

    return run


def _extend(machine: Machine, name: str, values: Array, kind: str, threads: Array | None) -> None:
    """Writes what was loaded, widened as its type says where the register is wider."""
    bits = machine.program.widths[re.match(r"%([a-z]+)", name)[1]]  # type: ignore[index]
    dtype = np.dtype(KINDS[kind])
    wide = values.astype(dtype) if values.dtype.itemsize != dtype.itemsize else values.view(dtype)
    wide = wide.astype(f"int{bits}" if dtype.kind == "i" else f"uint{bits}") if 8 * dtype.itemsize != bits else wide
    wide = np.ascontiguousarray(wide).view(f"uint{bits}")
    machine.write_some(name, machine.everyone if threads is None else threads, wide)


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
    """cp.async: reads at once, as many bytes as it is told, and lands when it is waited for."""
    target, source, size, *given = instruction.operands
    assert isinstance(target, str) and isinstance(source, str) and isinstance(size, str)
    bytes, read = int(size, 0), reader(given[0] if given else size, "u32")

    def run(machine: Machine, mask: Array | None) -> None:
        threads = machine.threads_of(mask)
        read_bytes = np.broadcast_to(read(machine), machine.count)[threads]
        if not np.isin(read_bytes, (0, bytes)).all():
            raise NotImplementedError("a copy of some of its bytes")
        values = np.zeros((len(threads), bytes // 4), np.uint32)
        full = read_bytes == bytes
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
    present = present.reshape(-1, machine.program.threads)
    if (present.any(1) != present.all(1)).any():
        raise Fault("divergent barrier: not all threads of a block are at it")
    machine.shared.barrier(np.flatnonzero(present.all(1)))


def _synchronise(instruction: Instruction) -> Run:
    """Barriers, fences, and the groups of copies and products."""
    name, operands = instruction.name, instruction.operands
    if name in ("bar.sync", "barrier.sync") and operands == ("0",):
        return _barrier
    if name == "cp.async.wait_group" or name.startswith("wgmma.wait_group"):
        pending, products = int(str(operands[0])), name.startswith("wgmma")

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
    result, source, lanes, limits, _ = map(str, instruction.operands)
    mode, read = instruction.parts[2], reader(lanes, "u32")
    if limits != "31" or mode not in ("bfly", "idx"):
        raise NotImplementedError(instruction.text)

    def run(machine: Machine, mask: Array | None) -> None:
        threads = matrices.warps_of(machine, mask).ravel()
        given = np.broadcast_to(read(machine), machine.count)[threads].astype(np.int64)
        lane = threads % 32
        partner = lane ^ given if mode == "bfly" else given % 32
        machine.write_some(result, threads, machine.registers[source][threads - lane + partner])

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


def _instruction(program: Program, instruction: Instruction) -> Run:
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


_COMPILED: dict[int, tuple[Program, list[Run]]] = {}


def compiled(program: Program) -> list[Run]:
    """Its instructions as functions, once for each program."""
    if id(program) not in _COMPILED:
        _COMPILED[id(program)] = program, [_instruction(program, step) for step in program.instructions]
    return _COMPILED[id(program)][1]


def launch(program: Program, grid: Sequence[int], shared: int, arguments: Iterable[torch.Tensor | float | int]) -> None:
    """Runs a kernel on tensors of the CPU.

    Args:
        grid: blocks in each of three dimensions.
        shared: bytes of shared memory of a block.
        arguments: of the kernel's parameters the first; what the compiler adds behind them is 0.
    """
    given = list(arguments)
    memory = GlobalMemory(argument for argument in given if isinstance(argument, torch.Tensor))
    values = {}
    for (name, kind), value in zip(program.parameters, [*given, *[0] * len(program.parameters)], strict=False):
        number = value.data_ptr() if isinstance(value, torch.Tensor) else value
        values[name] = np.array(number).astype(KINDS[kind]).view(f"uint{8 * np.dtype(KINDS[kind]).itemsize}")
    blocks = np.arange(int(np.prod(grid)))
    together = max(1, MOST_THREADS // program.threads)
    with np.errstate(all="ignore"):
        for first in range(0, len(blocks), together):
            Machine(program, blocks[first : first + together], grid, shared, memory, values).run()
