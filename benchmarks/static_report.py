"""Compiles every CUDA kernel for GPUs that need not be there, counts its main loop, and predicts its clocks.

A prediction is a count: the instructions that a warp issues in a pass through its main loop, by the rate of the pipe
that runs them. It knows no latencies and no caches. Beside it stand the clocks in which the kernel's bytes pass through
memory; a kernel can be as fast as memory only where no pipe needs more.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.kernel_work import SHAPES, WORK, Loop, Shape, Work
from benchmarks.machine_code import (
    ROOT,
    TYPES,
    Instruction,
    MachineCode,
    compile_source,
    find_nvcc,
    main_loop,
    nvcc_release,
)
from convnext_kernels.cli.errors import CommandError, command, names, writable
from convnext_kernels.cli.machine import commit, versions
from convnext_kernels.cli.output import console, write_json


@dataclass(frozen=True)
class Device:
    """What the predictions assume of a GPU; rates are per clock and multiprocessor."""

    name: str
    multiprocessors: int
    hertz: float
    bytes_per_second: float
    matrix_fmas: float  # of mma.sync with 16-bit operands
    fma_lanes: int
    shared: int  # bytes


DEVICES = {
    # NVIDIA's data sheet and whitepaper; 312 TFLOP/s are 1024 multiply-adds per clock and multiprocessor.
    "80": Device("A100", 108, 1.41e9, 2.0e12, 1024, 64, 164 << 10),
    # Bandwidth as a device copy measured it. Assumed: 1.755 GHz (at the 1.98 GHz of the data sheet memory would leave
    # more clocks), and for mma.sync 62% of the 2048 multiply-adds that wgmma reaches.
    "90a": Device("H200", 132, 1.755e9, 4.3e12, 0.62 * 2048, 128, 228 << 10),
}

SCHEDULERS = 4
REGISTERS = 1 << 16
THREADS = 2048
BLOCKS = 32
RESERVED_SHARED = 1 << 10  # by the driver in each block
MATRIX_FMAS = {"HMMA.16816": 16 * 8 * 16}
WAVEFRONT = 128  # bytes that shared memory and L1 move in a clock
INTEGER_LANES = 64
SPECIAL_LANES = 16
LABEL_WIDTH = 38

CATEGORIES = {
    "matrix": ("HMMA",),
    "shared memory": ("LDS", "LDSM", "STS"),
    "global memory": ("LDG", "LDGSTS", "STG"),
    "conversions": ("F2FP", "F2F", "F2I", "I2F", "I2FP", "HADD2"),
    "moves": ("MOV", "IMAD.MOV", "PRMT"),
    "fp32": ("FFMA", "FADD", "FMUL"),
    "shuffles": ("SHFL",),
}
"""Opcodes, with or without more modifiers. HADD2 makes float of float16 in these kernels."""

FMA = ("FFMA", "FADD", "FMUL", "HFMA2", "HADD2", "HMUL2", "IMAD")
INTEGER = (
    *("IADD3", "VIADD", "LEA", "LOP3", "PLOP3", "SHF", "SHL", "SHR", "PRMT", "MOV", "SEL", "FSEL", "P2R", "R2P"),
    *("ISETP", "FSETP", "IMNMX", "FMNMX", "VIMNMX", "VIADDMNMX", "IABS", "F2FP", "I2FP"),
)
SPECIAL = ("MUFU", "F2F", "F2I", "I2F", "POPC", "FLO")


def _is(instruction: Instruction, opcodes: Iterable[str]) -> bool:
    return any(instruction.opcode == opcode or instruction.opcode.startswith(f"{opcode}.") for opcode in opcodes)


def _wavefronts(instruction: Instruction, conflicts: float, copies: float) -> float:
    """Clocks of shared memory and L1 for all 32 lanes; see `Loop`."""
    if instruction.name == "LDSM":
        return {"4": 4, "2": 2}.get(instruction.opcode[-1], 1)
    if instruction.name == "SHFL":
        return 1
    modifiers = instruction.opcode.split(".")
    width = 16 if "128" in modifiers else 8 if "64" in modifiers else 4
    factor = {"LDS": conflicts, "STS": conflicts, "LDGSTS": copies}.get(instruction.name, 1)
    return factor * 32 * width / WAVEFRONT


def pipe_clocks(
    instructions: Sequence[Instruction], device: Device, conflicts: float = 1, copies: float = 1
) -> dict[str, float]:
    """Clocks that each pipe of a multiprocessor needs for one warp's instructions; see `Loop`."""
    acting = [instruction for instruction in instructions if instruction.acts]

    def lanes(opcodes: Sequence[str], per_clock: float) -> float:
        return 32 * sum(_is(instruction, opcodes) for instruction in acting) / per_clock

    matrix = [instruction for instruction in acting if _is(instruction, CATEGORIES["matrix"])]
    through_l1 = (*CATEGORIES["shared memory"], *CATEGORIES["global memory"], *CATEGORIES["shuffles"])
    return {
        "issue": len(instructions) / SCHEDULERS,
        "tensor": sum(MATRIX_FMAS[".".join(i.opcode.split(".")[:2])] for i in matrix) / device.matrix_fmas,
        "shared": sum(_wavefronts(i, conflicts, copies) for i in acting if _is(i, through_l1)),
        "fma": lanes(FMA, device.fma_lanes),
        "integer": lanes(INTEGER, INTEGER_LANES),
        "special": lanes(SPECIAL, SPECIAL_LANES),
    }


def blocks_per_multiprocessor(registers: int, shared: int, threads: int, device: Device) -> int:
    """How many blocks fit at once; registers come in units of 256 for a warp, each scheduler has a quarter."""
    warps = -(-threads // 32)
    per_warp = 32 * (-(-registers // 8) * 8)
    by_registers = REGISTERS // SCHEDULERS // per_warp * SCHEDULERS // warps
    by_shared = device.shared // (-(-(shared + RESERVED_SHARED) // 128) * 128)
    return min(by_registers, by_shared, THREADS // (32 * warps), BLOCKS)


@dataclass(frozen=True)
class Prediction:
    """Clocks of a multiprocessor for each output, by pipe, and those in which its bytes pass through memory."""

    channels: int
    size: int
    dynamic_shared: int
    blocks_per_multiprocessor: int
    clocks: dict[str, float]
    memory: float

    @property
    def slowest(self) -> str:
        return max(self.clocks, key=self.clocks.__getitem__)

    @property
    def ratio(self) -> float:
        """The slowest pipe's clocks by memory's: above 1 the kernel cannot be as fast as memory."""
        return self.clocks[self.slowest] / self.memory


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel: what it takes, what its (first) main loop is made of, and what that predicts."""

    source: str
    kernel: str
    type: str | None
    architecture: str
    registers: int
    stack: int
    spills: int
    shared: int
    threads: int | None
    loop: bool
    local_memory: int  # accesses in the main loop, to what spilled or is an array that registers cannot hold
    instructions: dict[str, int]
    memory_instructions: dict[str, int]
    predicted: list[Prediction] = field(default_factory=list)

    @property
    def where(self) -> str:
        return f"{self.kernel} for sm_{self.architecture}"


def work_of(kernel: str) -> Work | None:
    """The table's entry for a kernel."""
    return next((work for pattern, work in WORK.items() if fnmatch.fnmatchcase(kernel, pattern)), None)


def _loop_clocks(code: MachineCode, loop: Loop, shape: Shape) -> dict[str, float]:
    body = main_loop(code, loop.marker, loop.variant(shape), loop.working)
    instructions = body.instructions + loop.inner(shape) * body.inner
    clocks = pipe_clocks(instructions, DEVICES[code.architecture], loop.conflicts, loop.copies(shape))
    return {pipe: loop.passes(shape) * count for pipe, count in clocks.items()}


def _predict(code: MachineCode, work: Work, shape: Shape) -> Prediction:
    if code.threads is None:
        raise CommandError(f"{code.kernel}: has no __launch_bounds__, so its threads are not known")
    device, dynamic = DEVICES[code.architecture], work.dynamic_shared(shape)
    loops = [_loop_clocks(code, loop, shape) for loop in work.loops]
    return Prediction(
        channels=shape.channels,
        size=shape.size,
        dynamic_shared=dynamic,
        blocks_per_multiprocessor=blocks_per_multiprocessor(
            code.registers, code.shared + dynamic, code.threads, device
        ),
        clocks={pipe: sum(clocks[pipe] for clocks in loops) for pipe in loops[0]},
        memory=work.bytes * device.multiprocessors * device.hertz / device.bytes_per_second,
    )


def describe(source: str, code: MachineCode) -> Kernel:
    """Counts a kernel's main loop and, where the table knows what a pass does, predicts its clocks."""
    work = work_of(code.kernel)
    loop = main_loop(code, work.loops[0].marker, working=work.loops[0].working) if work else main_loop(code)
    body = loop.instructions + loop.inner
    acting = [instruction for instruction in body if instruction.acts]
    counts = {name: sum(_is(instruction, opcodes) for instruction in acting) for name, opcodes in CATEGORIES.items()}
    memory = (*CATEGORIES["shared memory"], *CATEGORIES["global memory"])
    return Kernel(
        source=source,
        kernel=code.kernel,
        type=code.type,
        architecture=code.architecture,
        registers=code.registers,
        stack=code.stack,
        spills=code.spill_stores + code.spill_loads,
        shared=code.shared,
        threads=code.threads,
        loop=loop.found,
        local_memory=sum(_is(instruction, ("LDL", "STL")) for instruction in body),
        instructions={"all": len(body), **counts},
        memory_instructions=dict(sorted(Counter(i.opcode for i in acting if _is(i, memory)).items())),
        predicted=[_predict(code, work, shape) for shape in SHAPES if work.runs(shape)] if work else [],
    )


def failures(kernel: Kernel) -> list[str]:
    """What is wrong with a compiled kernel; a reason that the table gives excuses few blocks or a slow pipe."""
    found = []
    if kernel.spills:
        found.append(f"{kernel.spills} bytes of spills")
    if kernel.local_memory:
        found.append(f"{kernel.local_memory} accesses to local memory in the main loop")
    work = work_of(kernel.kernel)
    if work is None:
        return found
    if work.matrix and not kernel.instructions["matrix"]:
        found.append("no matrix instruction in the main loop")
    for prediction in kernel.predicted:
        at = f"{prediction.channels} channels, {prediction.size}x{prediction.size}"
        if prediction.blocks_per_multiprocessor < 2 and not work.few_blocks:
            found.append(f"{prediction.blocks_per_multiprocessor} blocks per multiprocessor at {at}")
        if prediction.ratio > 1 and not work.slow:
            found.append(f"{prediction.slowest} predicted at {prediction.ratio:.2f} times memory at {at}")
    return found


def needless_reasons(kernels: Sequence[Kernel]) -> list[str]:
    """Reasons of the table that excuse nothing in any of these kernels."""
    found = []
    for pattern, work in WORK.items():
        predicted = [p for kernel in kernels if work_of(kernel.kernel) is work for p in kernel.predicted]
        if predicted and work.few_blocks and all(p.blocks_per_multiprocessor >= 2 for p in predicted):
            found.append(f"{pattern}: a reason for few blocks, which it does not need")
        if predicted and work.slow and all(p.ratio <= 1 for p in predicted):
            found.append(f"{pattern}: a reason for a slow pipe, which it does not need")
    return found


def sources() -> dict[str, Path]:
    """The sources of csrc/ that hold kernels, by folder/name."""
    return {
        f"{path.parent.name}/{path.name}": path
        for path in sorted((ROOT / "csrc").glob("*/*.cu"))
        if "__global__" in path.read_text() and path.name != "build_info.cu"  # its kernel is empty
    }


def compile_all(chosen: dict[str, Path], architectures: Sequence[str], processes: int) -> list[Kernel]:
    """Every kernel of the sources, for every architecture."""
    with ThreadPoolExecutor(processes) as pool:
        compiled = pool.map(lambda path: compile_source(path, architectures), chosen.values())
        return [describe(name, code) for name, codes in zip(chosen, compiled, strict=True) for code in codes]


def _label(kernel: Kernel, every: bool) -> str:
    name = re.sub(r"__nv_bfloat16|__half", lambda match: TYPES[match[0]] if every else "16 bits", kernel.kernel)
    name = re.sub(r"<Traits<(.*)>>", r"<\1>", name)
    return f"{name}, sm_{kernel.architecture}"


def _rows(kernels: Sequence[Kernel], every: bool) -> dict[str, Kernel]:
    """The kernels by their labels; unless every one is wanted, of both 16-bit types the one with more instructions."""
    ascending = sorted(kernels, key=lambda kernel: kernel.instructions["all"])
    rows = {_label(kernel, every): kernel for kernel in ascending}
    return {label: rows[label] for label in dict.fromkeys(_label(kernel, every) for kernel in kernels)}


def _counts_table(rows: dict[str, Kernel]) -> Table:
    table = Table(title="Compiled: what a kernel takes, and the instructions of its main loop")
    table.add_column("kernel", overflow="fold", max_width=LABEL_WIDTH)
    headers = {
        "matrix": "mma",
        "shared memory": "shared",
        "global memory": "global",
        "conversions": "conv",
        "shuffles": "shfl",
    }
    columns = [headers.get(name, name) for name in CATEGORIES]
    for column in ("regs", "spill", "bytes", "blocks", "all", *columns):
        table.add_column(column, justify="right", no_wrap=True)
    for label, kernel in rows.items():
        blocks = sorted({p.blocks_per_multiprocessor for p in kernel.predicted})
        shared = kernel.shared + max((p.dynamic_shared for p in kernel.predicted), default=0)
        cells = (kernel.registers, kernel.spills + kernel.stack, shared)
        counts = [f"{count}{'' if kernel.loop else '*'}" for count in kernel.instructions.values()]
        table.add_row(label, *map(str, cells), "-".join(map(str, dict.fromkeys((*blocks[:1], *blocks[-1:])))), *counts)
    return table


def _predictions_table(rows: dict[str, Kernel]) -> Table:
    title = (
        "Predicted: clocks of a multiprocessor per output, and the part of memory's speed that the slowest pipe allows"
    )
    table = Table(title=title)
    table.add_column("kernel", overflow="fold", max_width=LABEL_WIDTH)
    for column in ("memory", *(f"{shape.channels}, {shape.size}" for shape in SHAPES)):
        table.add_column(column, justify="right", no_wrap=True)
    for label, kernel in rows.items():
        if kernel.predicted:
            cells = {
                (p.channels, p.size): f"{p.clocks[p.slowest]:.2f} {p.slowest}\n{min(1, 1 / p.ratio):.0%}"
                for p in kernel.predicted
            }
            shapes = [cells.get((shape.channels, shape.size), "") for shape in SHAPES]
            table.add_row(label, f"{kernel.predicted[0].memory:.2f}", *shapes)
    return table


def reasons() -> dict[str, list[str]]:
    """Every reason that the table gives, and the kernels it is given for."""
    found: dict[str, list[str]] = {}
    for pattern, work in WORK.items():
        for reason in filter(None, (work.few_blocks, work.slow)):
            found.setdefault(reason, []).append(pattern)
    return found


def report(kernels: Sequence[Kernel], every: bool) -> int:
    """Prints the tables, the reasons and every failure; returns the exit code."""
    out, rows = console(), _rows(kernels, every)
    out.print(_counts_table(rows))
    out.print("blocks: of a multiprocessor; bytes: of shared memory; *: no loop, the whole kernel is counted")
    out.print(_predictions_table(rows))
    for reason, patterns in reasons().items():
        out.print(f"{', '.join(patterns)}:\n  {reason}", markup=False)
    found = [f"{kernel.where}: {failure}" for kernel in kernels for failure in failures(kernel)]
    for failure in found:
        out.print(f"FAILED {failure}", markup=False)
    out.print(f"{len(kernels)} kernels compiled, {len(found)} failures")
    return 1 if found or not kernels else 0


def to_record(kernels: Sequence[Kernel]) -> dict[str, Any]:
    """Everything as plain data for JSON."""
    return {
        "nvcc": nvcc_release(),
        "versions": versions(),
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "assumed": {architecture: asdict(device) for architecture, device in DEVICES.items()},
        "reasons": reasons(),
        "kernels": [asdict(kernel) for kernel in kernels],
    }


@command("static_report")
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.static_report", description=__doc__.split("\n\n")[0])
    parser.add_argument("--architectures", nargs="+", metavar="SM", help=f"{', '.join(DEVICES)} (all)")
    parser.add_argument("--source", nargs="+", metavar="NAME", help="only these of csrc/, as folder/name.cu (all)")
    parser.add_argument(
        "--processes", type=int, default=os.cpu_count(), metavar="N", help="compile N at once (all cores)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every kernel")
    parser.add_argument("--all", action="store_true", help="rows for both 16-bit types, not only the longer code")
    options = parser.parse_args(arguments)
    if find_nvcc() is None:
        raise CommandError("needs nvcc: there is none at CUDACXX, CUDA_HOME/bin or PATH")
    architectures = names("--architectures", options.architectures, DEVICES, tuple(DEVICES))
    known = sources()
    chosen = {name: known[name] for name in names("--source", options.source, known, tuple(known))}
    path = writable("--json", options.json)
    kernels = compile_all(chosen, architectures, options.processes)
    if path is not None:
        write_json(path, to_record(kernels))
    return report(kernels, options.all)


if __name__ == "__main__":
    sys.exit(main())
