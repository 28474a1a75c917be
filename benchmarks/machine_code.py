"""What nvcc makes of a CUDA source: each kernel's registers, spills, shared memory and instructions.

Needs no GPU: nvcc compiles, and the disassembler that Triton brings reads what it wrote. A loop is found by its
backward branch.
"""

from __future__ import annotations

import re
import runpy
import subprocess
import tempfile
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from triton import knobs

from benchmarks.kernel_work import WORKING
from convnext_kernels.cli.errors import CommandError

ROOT = Path(__file__).resolve().parents[1]
FLAGS = ("-std=c++17", "-O3", "-DNDEBUG", "-Xptxas=-v", f"-I{ROOT / 'csrc'}")
"""As CMake's Release, and the assembler's report."""

TYPES = {"__half": "float16", "__nv_bfloat16": "bfloat16", "float": "float32"}


@dataclass(frozen=True)
class Instruction:
    """One line of the disassembly; `target` is the address that a branch names."""

    address: int
    condition: str | None
    opcode: str
    operands: str

    @property
    def name(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.partition(".")[0]

    @property
    def acts(self) -> bool:
        """Whether it does more than take its turn: the assembler puts loads that never load before copies."""
        return self.condition != "!PT"

    @property
    def target(self) -> int:
        return int(re.findall(r"\b0x([0-9a-f]+)\b", self.operands)[-1], 16)


@dataclass(frozen=True)
class MachineCode:
    """One kernel, compiled for one architecture; `threads` is what __launch_bounds__ allows in a block."""

    kernel: str
    architecture: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int
    threads: int | None
    instructions: tuple[Instruction, ...]

    @property
    def type(self) -> str | None:
        """The first of the types that tensors have among the template's arguments."""
        found = re.search(rf"\b({'|'.join(TYPES)})\b", self.kernel)
        return TYPES[found[1]] if found else None

    @cached_property
    def flow(self) -> Flow:
        edges = _edges(self.instructions)
        live = _reached(0, edges)
        loops = _loops(edges, live)
        inner = {header: [other for other in loops.values() if other < loop] for header, loop in loops.items()}
        return Flow(edges, live, [Body(header, loop, set().union(*inner[header])) for header, loop in loops.items()])


@dataclass(frozen=True)
class Body:
    """A loop: the instruction it comes back to, all of its instructions, and those of them in loops inside it."""

    header: int
    nodes: set[int]
    inner: set[int]


@dataclass(frozen=True)
class Flow:
    """How control flows through a kernel: what may follow each instruction, which can be reached, and the loops."""

    edges: list[list[int]]
    live: set[int]
    loops: list[Body]


def find_nvcc() -> str | None:
    """Path of nvcc as setup.py finds it, or None."""
    return runpy.run_path(str(ROOT / "setup.py"))["find_nvcc"]()


def _run(*command: str) -> str:
    try:
        result = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise CommandError(f"{command[0]} is not installed") from error
    if result.returncode != 0:
        raise CommandError(f"{Path(command[0]).name} failed\n{result.stdout}{result.stderr}")
    return result.stdout + result.stderr


def nvcc_release() -> str:
    """The compiler's release, such as 13.0.88."""
    (release,) = re.findall(r"\bV(\d+(?:\.\d+)+)", _run(find_nvcc() or "nvcc", "--version"))
    return release


def _plain_name(demangled: str) -> str:
    """convnext_kernels::(anonymous namespace)::f<Traits<float, 7> >(Params) -> f<Traits<float, 7>>"""
    name = re.sub(r"\(anonymous namespace\)::|convnext_kernels::|^void ", "", demangled)
    return name.rpartition("(")[0].replace("> >", ">>") or name


_COMPILED = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<architecture>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?:[^\n]*?(?P<shared>\d+) bytes smem)?",
    re.DOTALL,
)
_FUNCTION = re.compile(r"^\s+Function : (\w+)\n(.*?)(?=^\s+Function : |^Fatbin |\Z)", re.DOTALL | re.MULTILINE)
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?\w+)\s+)?([A-Z][\w.]*)([^;]*);", re.MULTILINE)
_THREADS = re.compile(
    r"^\.nv\.info\.(\w+)$(?:(?!^\.nv\.).)*?EIATTR_MAX_THREADS\n[^\n]*\n\s*Value:([^\n]*)", re.DOTALL | re.M
)


def _by_architecture(dump: str) -> Iterator[tuple[str, str]]:
    """The parts of cuobjdump's output, each with the architecture it is for."""
    for part in dump.split("Fatbin elf code:")[1:]:
        (architecture,) = re.findall(r"^arch = sm_(\w+)", part, re.MULTILINE)
        yield architecture, part


def _threads(values: str) -> int:
    x, y, z = (int(value, 16) for value in values.split())
    return x * y * z


def parse_instructions(sass: str) -> tuple[Instruction, ...]:
    """The instructions of one kernel's disassembly."""
    return tuple(
        Instruction(int(address, 16), condition or None, opcode, operands)
        for address, condition, opcode, operands in _INSTRUCTION.findall(sass)
    )


def compile_source(source: Path, architectures: Sequence[str], *flags: str) -> list[MachineCode]:
    """Every kernel of a source, for every architecture, in one call of nvcc.

    Raises:
        CommandError: nvcc or c++filt is missing, or the source does not compile.
    """
    targets = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in architectures]
    cuobjdump = knobs.nvidia.cuobjdump.path
    with tempfile.TemporaryDirectory() as folder:
        binary = str(Path(folder) / "kernels.fatbin")
        nvcc = find_nvcc() or "nvcc"
        compiled = _run(nvcc, *FLAGS, *flags, *targets, "-fatbin", str(source), "-o", binary)
        reports = {(match["architecture"], match["name"]): match for match in _COMPILED.finditer(compiled)}
        disassembly, headers = _run(cuobjdump, "-sass", binary), _run(cuobjdump, "-elf", binary)
    threads = {
        (architecture, name): _threads(values)
        for architecture, part in _by_architecture(headers)
        for name, values in _THREADS.findall(part)
    }
    bodies = {
        (architecture, name): body
        for architecture, part in _by_architecture(disassembly)
        for name, body in _FUNCTION.findall(part)
    }
    plain = dict(
        zip(reports, map(_plain_name, _run("c++filt", *(name for _, name in reports)).splitlines()), strict=True)
    )
    return [
        MachineCode(
            kernel=plain[key],
            architecture=key[0],
            registers=int(report["registers"]),
            stack=int(report["stack"]),
            spill_stores=int(report["stores"]),
            spill_loads=int(report["loads"]),
            shared=int(report["shared"] or 0),
            threads=threads.get(key),
            instructions=parse_instructions(bodies[key]),
        )
        for key, report in reports.items()
    ]


def _successors(instruction: Instruction) -> tuple[bool, bool]:
    """Whether the next instruction, and whether the branch's target may follow.

    A call may be a jump out of line that comes back by a branch, so its target counts. BRA.DIV leaves for code that
    only a divergent warp runs: not followed.
    """
    name, condition = instruction.name, instruction.condition is not None
    if name in ("BRX", "BRXU", "JMX", "JMXU"):
        raise RuntimeError(f"an indirect branch at {instruction.address:#x}: its targets are not known")
    if name in ("EXIT", "RET"):
        return condition, False
    if name in ("BRA", "JMP"):
        if ".DIV" in instruction.opcode:
            return True, False
        return condition or "," in instruction.operands, True
    return True, instruction.opcode.startswith("CALL.REL")


def _edges(instructions: Sequence[Instruction]) -> list[list[int]]:
    """The indices of what may follow each instruction."""
    index = {instruction.address: i for i, instruction in enumerate(instructions)}
    edges = []
    for i, instruction in enumerate(instructions):
        falls_through, branches = _successors(instruction)
        following = [i + 1] if falls_through and i + 1 < len(instructions) else []
        edges.append([*following, *([index[instruction.target]] if branches else [])])
    return edges


def _reached(start: int, edges: Sequence[Sequence[int]], barrier: int | None = None) -> set[int]:
    """What can be reached from an instruction, itself included, without going on from `barrier`."""
    reached, waiting = set() if barrier is None else {barrier}, [start]
    while waiting:
        node = waiting.pop()
        if node not in reached:
            reached.add(node)
            waiting.extend(edges[node])
    return reached


def _loops(edges: Sequence[Sequence[int]], live: set[int]) -> dict[int, set[int]]:
    """The loops among the live instructions by their headers, each the target of one or more backward branches.

    A loop is what reaches its branch without passing its header. Where that leads to the first instruction, the branch
    only comes back from code put out of line.
    """
    before: list[list[int]] = [[] for _ in edges]
    for node in live:
        for following in edges[node]:
            before[following].append(node)
    loops: dict[int, set[int]] = {}
    for node in live:
        for header in edges[node]:
            if header <= node:
                body = _reached(node, before, barrier=header)
                if header == 0 or 0 not in body:
                    loops.setdefault(header, set()).update(body)
    return loops


def _postorder(start: int, body: set[int], edges: Sequence[Sequence[int]]) -> list[int]:
    """What lies in `body` and is reached from an instruction, each after all that follow it but for loops."""
    order, seen, waiting = [], {start}, [(start, iter(edges[start]))]
    while waiting:
        node, following = waiting[-1]
        for other in following:
            if other in body and other not in seen:
                seen.add(other)
                waiting.append((other, iter(edges[other])))
                break
        else:
            waiting.pop()
            order.append(node)
    return order


def _path(code: MachineCode, body: Body, working: Collection[str]) -> set[int]:
    """Of all ways through a loop once, or through a kernel, the one with the most instructions named in `working`.

    Of ways with as many, the shortest: it leaves out what need not run every time.
    """
    start, edges = body.header, code.flow.edges
    best: dict[int, tuple[int, int | None]] = {}
    for node in _postorder(start, body.nodes, edges):
        ways: list[tuple[int, int | None]] = [(best[other][0], other) for other in edges[node] if other in best]
        if start in edges[node] or not edges[node]:
            ways.append((0, None))
        if ways:
            weight = len(edges) * (code.instructions[node].name in working) - 1
            value, following = max(ways, key=lambda way: way[0])
            best[node] = value + weight, following
    path, node = set(), start
    while node is not None:
        path.add(node)
        node = best[node][1]
    return path


def count_in_loops(instructions: Sequence[Instruction], names: Collection[str]) -> int:
    """How many instructions of these names a kernel has in its loops."""
    edges = _edges(instructions)
    looped = set().union(*_loops(edges, _reached(0, edges)).values())
    return sum(instructions[node].name in names for node in looped)


@dataclass(frozen=True)
class MainLoop:
    """One pass through a kernel's main loop, without and in the loops inside it; or, not `found`, the whole kernel."""

    instructions: list[Instruction]
    inner: list[Instruction]
    found: bool


def main_loop(
    code: MachineCode, marker: str = "HMMA", variant: int = 0, working: Collection[str] = WORKING
) -> MainLoop:
    """The loop that holds the most instructions named `marker`, those of the loops inside it not counted.

    Of loops that hold as many, number `variant` by size, the smallest first. Where no loop holds any, the largest that
    has no loop inside. A pass is the way through it with the most instructions named in `working`.
    """
    flow = code.flow

    def marked(loop: Body) -> int:
        return sum(code.instructions[i].name == marker for i in loop.nodes - loop.inner)

    most = max(map(marked, flow.loops), default=0)
    chosen = sorted((loop for loop in flow.loops if marked(loop) == most), key=lambda loop: len(loop.nodes))
    if not most:
        chosen, variant = [loop for loop in chosen if not loop.inner] or [Body(0, flow.live, set())], -1
    body = chosen[variant]
    path = _path(code, body, working)
    return MainLoop(
        instructions=[code.instructions[i] for i in sorted(path - body.inner)],
        inner=[code.instructions[i] for i in sorted(path & body.inner)],
        found=bool(flow.loops),
    )
