"""Reads PTX: of each kernel its parameters, how many threads a block has at most, and its instructions."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count

Operand = str | tuple[str, ...]
"""A register, a number, a label, a symbol or an address; several in braces."""


@dataclass(frozen=True)
class Instruction:
    """`@predicate name operands;`"""

    name: str
    operands: tuple[Operand, ...]
    predicate: str | None
    negated: bool
    text: str

    @property
    def parts(self) -> list[str]:
        return self.name.split(".")


@dataclass(frozen=True)
class Layout:
    """Named places of a memory, and its size in bytes."""

    places: dict[str, int] = field(default_factory=dict)
    bytes: int = 0

    def with_(self, name: str, bytes: int, alignment: int) -> Layout:
        start = -(-self.bytes // alignment) * alignment
        return Layout({**self.places, name: start}, start + bytes)


@dataclass(frozen=True, eq=False)
class Program:
    """One kernel; equal to itself alone."""

    name: str
    parameters: Layout
    kinds: tuple[str, ...]
    """Types of the parameters, or of the elements of those that have several."""
    shared: Layout
    """What it declares with a size; where it declares memory without one that lies behind."""
    threads: int
    """Of a block, or the most."""
    widths: dict[str, int]
    """Bits of registers, by the letters of their names; predicates have 1."""
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]
    """Which instruction a label stands before."""

    def width(self, register: str) -> int:
        letters = re.match(r"%([a-z]+)", register)
        assert letters is not None, register
        return self.widths[letters[1]]


_ENTRY = re.compile(r"\.entry\s+(\w+)\((.*?)\)\s*(?:\.\w+ntid\s+(\d+)[^{]*)\{(.*?)\n\}", re.DOTALL)
_PARAMETER = re.compile(r"\.param(?:\s+\.align\s+(\d+))?\s+\.(\w+)(?:\s+\.ptr[^,]*)?\s+(\w+)(?:\[(\d+)\])?\s*(?:,|$)")
_SHARED = re.compile(r"^\s*\.shared\s+\.align\s+(\d+)\s+\.b8\s+(\w+)\[(\d+)\];", re.MULTILINE)
_REGISTERS = re.compile(r"\.reg\s+\.([a-z]+)(\d*)\s+%([a-z]+)<\d+>")
_DIRECTIVE = re.compile(r"^\s*\.(?:reg|loc|pragma|file|shared)\b[^\n]*$", re.MULTILINE)
_STATEMENTS = re.compile(r";|(?<=:)\s*\n|^\s*[{}]\s*$", re.MULTILINE)
_INSTRUCTION = re.compile(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)
_OPERAND = re.compile(r"\{([^}]*)\}|\[([^]]*)\]|([^\s,{}\[\]]+)")
_ASSEMBLY = re.compile(r"// begin inline asm\n(.*?)// end inline asm", re.DOTALL)
_OWN_REGISTER = re.compile(r"\.reg\s+\.pred\s+%?(\w+)\s*;")


def _renamed(ptx: str) -> str:
    """Predicates that a piece of assembly declares for itself have names that nothing else has."""
    numbers = count()

    def rename(assembly: re.Match[str]) -> str:
        text = assembly[1].strip()
        text = text[1:-1] if text.startswith("{") and text.endswith("}") else text
        for name in _OWN_REGISTER.findall(text):
            text = re.sub(rf"(?<![\w%])%?{name}\b", f"%p_{next(numbers)}", text)
        return re.sub(r"\.reg\s[^;]*;", "", text) + "\n"

    return _ASSEMBLY.sub(rename, ptx)


def _operands(text: str) -> tuple[Operand, ...]:
    """Addresses lose their brackets: an instruction knows which of its operands is one."""
    found: list[Operand] = []
    for several, address, single in _OPERAND.findall(text):
        found.append(tuple(part.strip() for part in several.split(",")) if several else (address or single).strip())
    return tuple(found)


def _instructions(body: str) -> tuple[tuple[Instruction, ...], dict[str, int]]:
    """Those of a kernel, and the places of its labels."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for statement in _STATEMENTS.split(_DIRECTIVE.sub("", body)):
        statement = " ".join(statement.split())
        if label := re.fullmatch(r"(\$?\w+):", statement):
            labels[label[1]] = len(instructions)
        elif found := _INSTRUCTION.fullmatch(statement):
            negated, predicate, opcode, operands = found.groups()
            instructions.append(Instruction(opcode, _operands(operands), predicate, negated == "!", statement))
        elif statement:
            raise ValueError(f"ptx: got {statement!r}; accepted: an instruction or a label")
    return tuple(instructions), labels


def _bits(kind: str) -> int:
    return int(re.sub(r"\D", "", kind))


def kernels(ptx: str) -> Iterator[Program]:
    """Every kernel of a module that says how many threads a block has, as Triton and nvcc write them."""
    for name, parameters, threads, body in _ENTRY.findall(re.sub(r"//[^\n]*", "", _renamed(ptx))):
        layout, kinds = Layout(), []
        for alignment, kind, parameter, elements in _PARAMETER.findall(parameters):
            size = _bits(kind) // 8 * int(elements or 1)
            layout = layout.with_(parameter, size, int(alignment or size))
            kinds.append(kind)
        shared = Layout()
        for alignment, symbol, size in _SHARED.findall(body):
            shared = shared.with_(symbol, int(size), int(alignment))
        yield Program(
            name,
            layout,
            tuple(kinds),
            shared,
            int(threads),
            {letters: int(bits) if bits else 1 for _, bits, letters in _REGISTERS.findall(body)},
            *_instructions(body),
        )
