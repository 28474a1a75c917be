"""Runs the blocks of a kernel, all threads side by side, one instruction after the other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import torch
from ptx.instructions import Run, run_of
from ptx.memory import Fault, GlobalMemory, SharedMemory
from ptx.program import Program
from ptx.values import KINDS, Array, reader

MOST_THREADS = 2048
"""That run side by side, of whole blocks."""


def round_up(bytes: int) -> int:
    """To the alignment of what lies behind: of 16 bytes."""
    return -(-bytes // 16) * 16


class _Registers(dict[str, Array]):
    """By name; what nobody has written holds ones, so NaN."""

    def __init__(self, program: Program, count: int, values: dict[str, Array]) -> None:
        super().__init__(values)
        self._program, self._count = program, count

    def __missing__(self, name: str) -> Array:
        bits = self._program.width(name)
        if bits == 1:
            raise Fault(f"uninitialised: the predicate {name}")
        return np.full(self._count, 2**bits - 1, f"uint{bits}")


class Machine:
    """Some blocks of a launch. Registers hold unsigned numbers, one for each thread, and are never changed in place."""

    def __init__(self, call: Launch, blocks: Array) -> None:
        self.program, self.memory, self.parameters = call.program, call.memory, call.parameters
        self.threads, grid = call.threads, call.grid
        self.count = len(blocks) * self.threads
        shared = round_up(self.program.shared.bytes) + call.dynamic
        self.shared = SharedMemory(len(blocks), shared, self.threads)
        self.everyone = np.arange(self.count)
        thread, block = self.everyone % self.threads, np.repeat(blocks, self.threads)
        special = {
            "%tid.x": thread,
            "%laneid": thread % 32,
            "%ctaid.x": block % grid[0],
            "%ctaid.y": block // grid[0] % grid[1],
            "%ctaid.z": block // grid[0] // grid[1],
            **{f"%nctaid.{axis}": np.full(self.count, size) for axis, size in zip("xyz", grid, strict=True)},
            "%ntid.x": np.full(self.count, self.threads),
        }
        known = {name: value.astype(np.uint32) for name, value in special.items()}
        self.registers = _Registers(self.program, self.count, known)

    def threads_of(self, mask: Array | None) -> Array:
        return self.everyone if mask is None else np.flatnonzero(mask)

    def _stored(self, name: str, values: Array) -> Array:
        bits = self.program.width(name)
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
        return (found.astype(np.int64) + int(offset)).astype(found.dtype) if offset else found

    def symbol(self, name: str) -> int:
        """Where a parameter or something in shared memory lies; shared memory without a size behind all other."""
        places = {**self.program.parameters.places, **self.program.shared.places}
        return places.get(name, round_up(self.program.shared.bytes))

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
                except (Fault, NotImplementedError, KeyError, ValueError, IndexError) as fault:
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
        if self.shared.copies or self.shared.products:
            raise Fault(f"missing wait: a block has ended with copies or products under way, in {self.program.name}")

    @staticmethod
    def _wait(waiting: dict[int, Array], place: int, mask: Array) -> None:
        waiting[place] = waiting[place] | mask if place in waiting else mask


@cache
def compiled(program: Program) -> list[Run]:
    """Its instructions as functions."""
    return [run_of(program, step) for step in program.instructions]


@dataclass(frozen=True)
class Launch:
    """A kernel with its arguments.

    Attributes:
        grid: blocks in each dimension.
        threads: of a block.
        dynamic: bytes of shared memory of a block beside those that the kernel declares.
        values: of the first parameters; others are 0.
        memory: that the kernel may touch.
    """

    program: Program
    grid: tuple[int, int, int]
    threads: int
    dynamic: int
    values: Sequence[bytes]
    memory: GlobalMemory

    @cached_property
    def parameters(self) -> Array:
        """Their bytes as the kernel reads them."""
        memory = np.zeros(round_up(self.program.parameters.bytes), np.uint8)
        for start, value in zip(self.program.parameters.places.values(), self.values, strict=False):
            memory[start : start + len(value)] = np.frombuffer(value, np.uint8)
        return memory

    def run(self) -> None:
        blocks = np.arange(int(np.prod(self.grid)))
        together = max(1, MOST_THREADS // self.threads)
        with np.errstate(all="ignore"):
            for first in range(0, len(blocks), together):
                Machine(self, blocks[first : first + together]).run()


def launch(program: Program, grid: Sequence[int], shared: int, arguments: Iterable[torch.Tensor | float | int]) -> None:
    """Runs a kernel of Triton's on tensors of the CPU.

    Args:
        grid: blocks in each of three dimensions.
        shared: bytes of shared memory of a block; Triton declares them without a size.
        arguments: of the kernel's parameters the first; what the compiler adds behind them is 0.
    """
    given = list(arguments)
    memory = GlobalMemory(argument for argument in given if isinstance(argument, torch.Tensor))
    numbers = [argument.data_ptr() if isinstance(argument, torch.Tensor) else argument for argument in given]
    values = [
        np.array(number).astype(KINDS[kind]).tobytes() for number, kind in zip(numbers, program.kinds, strict=False)
    ]
    x, y, z = grid
    Launch(program, (x, y, z), program.threads, shared, values, memory).run()
