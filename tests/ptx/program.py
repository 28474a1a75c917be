"""Reads the PTX of a kernel: its parameters, how many threads a block has, and its instructions."""

from __future__ import annotations

import re
from dataclasses import dataclass

Operand = str | tuple[str, ...]
"""A register, a number, a label or a symbol; several in braces."""


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
class Program:
    """One kernel."""

    name: str
    parameters: tuple[tuple[str, str], ...]
    """Name and type of each, in the order of the launch."""
    threads: int
    widths: dict[str, int]
    """Bits of registers, by the letters of their names; predicates have 1."""
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]
    """Which instruction a label stands before."""


_ENTRY = re.compile(r"\.entry\s+(\w+)\((.*?)\)\s*\.reqntid\s+(\d+)[^{]*\{(.*)\n\}", re.DOTALL)
_PARAMETER = re.compile(r"\.param\s+\.(\w+)[^,]*?\b(\w+)\s*(?:,|$)")
_REGISTERS = re.compile(r"\.reg\s+\.([a-z]+)(\d*)\s+%([a-z]+)<\d+>")
_INSTRUCTION = re.compile(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)
_OPERAND = re.compile(r"\{([^}]*)\}|\[([^]]*)\]|([^\s,{}\[\]]+)")


def _operands(text: str) -> tuple[Operand, ...]:
    """Addresses lose their brackets: an instruction knows which of its operands is one."""
    found: list[Operand] = []
    for several, address, single in _OPERAND.findall(text):
        found.append(tuple(part.strip() for part in several.split(",")) if several else (address or single).strip())
    return tuple(found)


def parse(ptx: str) -> Program:
    """The one kernel of a module as Triton writes it."""
    ptx = re.sub(r"//[^\n]*", "", ptx)
    entry = _ENTRY.search(ptx)
    if entry is None:
        raise ValueError("ptx: no kernel with a number of threads; accepted: one kernel, as Triton writes it")
    name, parameters, threads, body = entry.groups()
    widths = {letters: int(bits) if bits else 1 for _, bits, letters in _REGISTERS.findall(body)}
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    body = re.sub(r"^\s*\.(?:reg|loc|pragma|file)\b[^\n]*$", "", body, flags=re.MULTILINE)
    for statement in re.split(r";|(?<=:)\s*\n|^\s*[{}]\s*$", body, flags=re.MULTILINE):
        statement = " ".join(statement.split())
        if label := re.fullmatch(r"(\$?\w+):", statement):
            labels[label[1]] = len(instructions)
        elif found := _INSTRUCTION.fullmatch(statement):
            negated, predicate, opcode, operands = found.groups()
            instructions.append(Instruction(opcode, _operands(operands), predicate, negated == "!", statement))
        elif statement:
            raise ValueError(f"ptx: got {statement!r}; accepted: an instruction or a label")
    return Program(
        name,
        tuple((parameter, kind) for kind, parameter in _PARAMETER.findall(parameters)),
        int(threads),
        widths,
        tuple(instructions),
        labels,
    )
