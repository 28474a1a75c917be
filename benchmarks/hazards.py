"""Operands overwritten while sm_90 multiplies them: what no run in the interpreter shows.

wgmma runs beside the instructions behind it until one waits for it; so long what it reads must stay. Buffers of shared
memory are Triton's to keep (its issue 6691: one too few where an operand is also read into registers), registers the
assembler's (its issue 11781: before CUDA 13.3 the next operand may be loaded into them too early).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from benchmarks.machine_code import Instruction

_RING = re.compile(r"(%\S+) = ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x")
_SLOT = re.compile(r"(%\S+) = ttg\.memdesc_(?:index|subview) (%[^\s\[]+)\[")
_LOOP = re.compile(r"^( *)[^\n]*\bscf\.for\b[^\n]*\n(.*?)^\1}", re.DOTALL | re.MULTILINE)
_PRODUCT = re.compile(r"ttng\.warp_group_dot (%[^\s,]+), (%[^\s,]+),[^\n]*isAsync = true")
_PENDING = re.compile(r"ttng\.warp_group_dot_wait [^\n]*pendings = ([1-9])")
_COPY = re.compile(r"ttg\.async_copy_global_to_local %[^\s,]+, (%[^\s,]+)")


def short_rings(ttgir: str) -> int:
    """How many operands of a kernel's products lie in fewer buffers than others of their loop are copied to, and are
    copied to before the product that reads them has been waited for."""
    buffers = {ring: int(count) for ring, count in _RING.findall(ttgir)}
    rings = {slot: ring for slot, ring in _SLOT.findall(ttgir) if ring in buffers}
    short = 0
    for _, body in _LOOP.findall(ttgir):
        copied = {rings[slot] for slot in _COPY.findall(body) if slot in rings}
        read = {rings[slot] for operands in _PRODUCT.findall(body) for slot in operands if slot in rings}
        if _PENDING.search(body) and copied:
            most = max(buffers[ring] for ring in copied)
            short += sum(buffers[ring] < most for ring in copied & read)
    return short


_NO_RESULT = re.compile(
    r"ST|RED|BRA|BAR|EXIT|WARP|LDGSTS|LDGDEP|DEPBAR|NOP|CALL|RET|B?SSY|BSYNC|R2UR|FENCE|MEMBAR|[A-Z]*SETP|U?PLOP"
)


def _registers(operand: str, count: int) -> set[int]:
    found = re.match(r"R(\d+)", operand)
    return set(range(int(found[1]), int(found[1]) + count)) if found else set()


def _operands(instruction: Instruction) -> list[str]:
    return [operand.strip() for operand in instruction.operands.split(",")]


def _results(instruction: Instruction) -> set[int]:
    """The registers that an instruction writes."""
    if _NO_RESULT.match(instruction.opcode):
        return set()
    if product := re.match(r"HGMMA\.64x(\d+)x", instruction.opcode):
        return _registers(_operands(instruction)[0], int(product[1]) // 2)
    wide = re.search(r"\.(?:128|64|WIDE)\b|LDSM.*\.([24])$", instruction.opcode)
    count = 1 if wide is None else 4 if wide[0] == ".128" or wide[1] == "4" else 2
    results = (operand for operand in _operands(instruction) if not re.fullmatch(r"!?U?P(?:T|\d)", operand))
    return _registers(next(results, ""), count)


def _bodies(instructions: Sequence[Instruction]) -> Iterator[Sequence[Instruction]]:
    places = {instruction.address: place for place, instruction in enumerate(instructions)}
    for place, instruction in enumerate(instructions):
        if instruction.name == "BRA" and "0x" in instruction.operands:
            first = places.get(instruction.target, place + 1)
            if first <= place:
                yield instructions[first : place + 1]


def early_writes(instructions: Sequence[Instruction]) -> int:
    """How many instructions of loops write a register that a product reads which has not been waited for."""
    found = set()
    for body in _bodies(instructions):
        groups: list[set[int]] = []
        open_group: set[int] = set()
        for instruction in (*body, *body):  # what the end of the loop leaves under way meets its begin
            if any(_results(instruction) & group for group in (*groups, open_group)):
                found.add(instruction.address)
            if instruction.name == "HGMMA":
                open_group |= _registers(_operands(instruction)[1], 4)
                if "gsb0" in instruction.operands:
                    groups, open_group = [*groups, open_group], set()
            elif left := re.search(r"gsb0, 0x([0-9a-f]+)", instruction.operands):  # WARPGROUP.DEPBAR
                groups = groups[max(len(groups) - int(left[1], 16), 0) :]
    return len(found)
