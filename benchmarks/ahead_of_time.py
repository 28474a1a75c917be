"""Compiles every Triton kernel ahead of time, exactly as the launchers launch it, for GPUs that need not be there.

The public operators are called on the CPU, forward and backward, with a stand-in for Triton's driver: each launch is
compiled for the asked architecture and not run. A kernel fails that spills registers in a loop, or many elsewhere,
unless it is a candidate of `tune`, which measures what that costs; that wants more shared memory than a block may have;
or that multiplies matrices without matrix instructions where its dtype has them.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import asdict, dataclass
from io import StringIO
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from rich.progress import Progress
from rich.table import Table
from triton import knobs
from triton.runtime.jit import JITFunction

from benchmarks.hazards import early_writes, short_rings
from benchmarks.machine_code import count_in_loops, parse_instructions
from convnext_kernels import backends
from convnext_kernels.cli.compile_ahead import compiling
from convnext_kernels.cli.errors import CommandError, command, names, writable
from convnext_kernels.cli.output import console, write_json
from convnext_kernels.cli.workloads import PRECISIONS, Workload, workloads
from convnext_kernels.functional import OPERATORS
from convnext_kernels.ops.common import matmul_configs
from convnext_kernels.ops.common.tuning import trying
from convnext_kernels.parity import Case

CHANNELS = (24, 40, 96, 128, 384, 768, 1024)
FUSED_CHANNELS = (48, 64, 80, 160, 192)
"""More, whose MLP is one kernel where nothing is saved."""

CANDIDATE_CHANNELS = sorted({*CHANNELS, *FUSED_CHANNELS})
"""Of blocks whose kernels are compiled with every configuration that a table may name."""

PRODUCTS = ("mlp", "patch_linear", "convnext_block")
"""Operators that multiply matrices: only they differ between float32 and tf32."""

AUTOCAST = ("96 channels", "GRN", "96 to 192 channels", "1024 channels")
"""Calls that are also made with float32 parameters beside 16-bit images; those that concern autocast are too."""

PRODUCT_KERNELS = ("common.matmul_kernel", "mlp.fused_kernel")

SHARED_MEMORY = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
"""Bytes of shared memory that a block may have, by architecture (CUDA programming guide, compute capabilities)."""


MAY_SPILL, MAY_SPILL_IN_LOOPS = 128, 1
"""Bytes that a thread may put aside for what comes behind its loops, once for each tile; and instructions in its loops,
of a hundred and more, where that lets a second program in."""


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel: the call that launched it first, and what the assembler made of it."""

    kernel: str
    operator: str
    call: str
    dtype: str
    architecture: int
    constants: str
    warps: int
    registers: int
    stack: int
    local: int
    spills_in_loops: int
    shared: int
    matrix_instructions: int
    serialized: tuple[str, ...]
    """Why wgmma wait for one another that might overlap: codes of the assembler, C7510 and so on."""
    overwritten: int
    """Operands that something else is written to while wgmma may still read them; see `hazards`."""


def failures(kernel: Kernel, may_spill: bool = False) -> list[str]:
    """What is wrong with a compiled kernel."""
    found = []
    much = kernel.stack + kernel.local > MAY_SPILL or kernel.spills_in_loops > MAY_SPILL_IN_LOOPS
    if much and not may_spill:
        spills = f"{kernel.stack} bytes of stack, {kernel.local} of local memory"
        found.append(f"spills: {spills}, {kernel.spills_in_loops} instructions of loops")
    if kernel.shared > SHARED_MEMORY[kernel.architecture]:
        found.append(f"{kernel.shared} bytes of shared memory; a block has {SHARED_MEMORY[kernel.architecture]}")
    # float32 in full precision has no matrix instruction.
    if kernel.kernel in PRODUCT_KERNELS and kernel.dtype != "float32" and not kernel.matrix_instructions:
        found.append("no matrix instruction")
    if kernel.overwritten:
        found.append(f"{kernel.overwritten} operands are overwritten while a product may still read them")
    return found


def _dump(cubin: bytes, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _resources(cubin: bytes) -> dict[str, int]:
    """Registers and bytes of stack, shared and local memory of a kernel's machine code."""
    output = _dump(cubin, "--dump-resource-usage")
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", output)}


@contextmanager
def _logged() -> Iterator[dict[str, str]]:
    """Yields what the assembler prints of each kernel that Triton compiles in the context, by the kernel's hash."""
    logs: dict[str, str] = {}
    run = JITFunction.run

    def logging(*args: Any, **kwargs: Any) -> Any:
        with redirect_stdout(StringIO()) as log:
            kernel = run(*args, **kwargs)
        logs.setdefault(kernel.hash, log.getvalue())
        return kernel

    with knobs.nvidia.scope(), patch.object(JITFunction, "run", logging):
        knobs.nvidia.dump_ptxas_log = True
        yield logs


def serialized(log: str) -> tuple[str, ...]:
    """The codes of the assembler's warnings that a kernel's wgmma wait for one another."""
    return tuple(sorted(set(re.findall(r"\((C\d+)\)[^\n]*wgmma\.mma_async instructions are serialized", log))))


_REGISTER_OPERAND = re.compile(r"wgmma\.mma_async[^{;]*\{[^}]*\},\s*\{")
"""Behind its sums."""


def _describe(function: JITFunction, compiled: Any, log: str, case: Case, precision: str, architecture: int) -> Kernel:
    cubin, ptx = compiled.asm["cubin"], compiled.asm["ptx"]
    if "wgmma" in ptx and not log:
        raise RuntimeError(f"{function.__name__} was compiled before: the assembler's log is lost")
    resources = _resources(cubin)
    spills_in_loops, overwritten = 0, short_rings(compiled.asm["ttgir"])
    spills, reads_registers = resources["STACK"] + resources["LOCAL"], _REGISTER_OPERAND.search(ptx)
    if spills or reads_registers:
        instructions = parse_instructions(_dump(cubin, "-sass"))
        spills_in_loops = count_in_loops(instructions, ("LDL", "STL"))
        overwritten += early_writes(instructions)
    constants = {function.arg_names[path[0]]: value for path, value in compiled.src.constants.items()}
    return Kernel(
        kernel=f"{function.__module__.split('.')[-2]}.{function.__name__}",
        operator=case.operator,
        call=case.name,
        dtype=precision,
        architecture=architecture,
        constants=" ".join(f"{name}={value}" for name, value in constants.items()),
        warps=compiled.metadata.num_warps,
        registers=resources["REG"],
        stack=resources["STACK"],
        local=resources["LOCAL"],
        spills_in_loops=spills_in_loops,
        # The assembler's number and Triton's count the static and the dynamic part.
        shared=resources["SHARED"] + compiled.metadata.shared,
        matrix_instructions=len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b", ptx)),
        serialized=serialized(log),
        overwritten=overwritten,
    )


def _image(channels: int, height: int = 4, width: int = 56) -> tuple[int, int, int, int]:
    return 2, channels, height, width


def _filter_cases(operator: str, channels: Iterable[int], norms: tuple[str, ...], quick: bool) -> list[Case]:
    def case(name: str, width: int, size: int = 7, image: tuple[int, ...] | None = None, **options: Any) -> Case:
        vectors = {vector: (width,) for vector in ("bias", *norms) if vector not in options}
        shapes = {"input": image or _image(width), "weight": (width, 1, size, size), **vectors}
        return Case(operator, name, shapes, options)

    cases = [case(f"{width} channels", width) for width in channels]
    if quick:
        return cases
    absent: dict[str, Any] = dict.fromkeys(("bias", *norms))
    return [
        *cases,
        *(case(f"{size}x{size}", 96, size) for size in (3, 5, 11)),
        *(case(f"dilation {dilation}", 96, dilation=dilation) for dilation in (2, 4)),
        case("11x11, dilation 2", 96, 11, dilation=2),
        case("11x11, 384 channels", 384, 11),
        case("7x7 map", 768, image=_image(768, 7, 7)),
        case("2x2 map", 40, image=_image(40, 2, 2)),
        case("1536 channels", 1536),
        case("no bias, no affine" if norms else "no bias", 96, **absent),
    ]


def _norm_cases(operator: str, channels: Iterable[int], quick: bool) -> list[Case]:
    def case(name: str, width: int, vectors: tuple[str, ...] = ("weight", "bias")) -> Case:
        return Case(operator, name, {"input": _image(width), **{vector: (width,) for vector in vectors}})

    cases = [case(f"{width} channels", width) for width in channels]
    if quick:
        return cases
    if operator == "layer_norm":
        cases += [case("no affine", 96, ()), case("no bias", 96, ("weight",)), case("8192 channels", 8192)]
    return [*cases, case("1536 channels", 1536), case("4096 channels", 4096)]


def _mlp_cases(channels: Iterable[int], quick: bool) -> list[Case]:
    def case(
        name: str, width: int, vectors: tuple[str, ...], image: tuple[int, ...] | None = None, **options: Any
    ) -> Case:
        hidden, image = 4 * width, image or _image(width)
        lengths = {"bias1": hidden, "grn_weight": hidden, "grn_bias": hidden, "drop_path_factor": image[0]}
        shapes: dict[str, tuple[int, ...]] = {"input": image, "weight1": (hidden, width), "weight2": (width, hidden)}
        shapes |= {vector: image if vector == "residual" else (lengths.get(vector, width),) for vector in vectors}
        absent = {vector: None for vector in ("bias1", "bias2") if vector not in vectors}
        return Case("mlp", name, shapes, {**absent, **options})

    biases = ("bias1", "bias2")
    block = (*biases, "layer_scale", "drop_path_factor", "residual")
    block2 = (*biases, "grn_weight", "grn_bias", "drop_path_factor", "residual")
    cases = [case(f"{width} channels", width, block) for width in channels]
    cases += [case(f"{width} channels, recomputed", width, block, recompute_hidden=True) for width in channels]
    cases.append(case("GRN", 96, block2))
    if quick:
        return cases
    tanh = {"activation": "gelu_tanh", "recompute_hidden": True}
    return [
        *cases,
        case("7x7 map", 768, block, _image(768, 7, 7)),
        case("GRN, 40 channels", 40, block2),
        case("GRN, 1024 channels", 1024, block2),
        case("no drop path", 96, (*biases, "layer_scale", "residual")),
        case("drop path, no scale", 96, (*biases, "drop_path_factor", "residual")),
        case("no bias, scale or residual", 96, ()),
        case("tanh", 96, block, activation="gelu_tanh"),
        case("recomputed, no bias, scale or drop path", 96, ("residual",), recompute_hidden=True),
        case("recomputed, tanh", 96, block, **tanh),
        case("recomputed, GRN", 96, block2, recompute_hidden=True),
        *(case(f"{width} channels, recomputed", width, block, recompute_hidden=True) for width in FUSED_CHANNELS),
        *(case(f"{width} channels, recomputed, tanh", width, block, **tanh) for width in (128, 160, 192)),
    ]


def _block_cases(channels: Iterable[int], quick: bool) -> list[Case]:
    """What a block launches that its operators do not: kernels that normalise, add and know dropped images."""

    def case(name: str, width: int, vectors: tuple[str, ...], **options: Any) -> Case:
        hidden, image = 4 * width, _image(width)
        matrices = {"conv_weight": (width, 1, 7, 7), "weight1": (hidden, width), "weight2": (width, hidden)}
        lengths = {"bias1": hidden, "grn_weight": hidden, "grn_bias": hidden, "drop_path_factor": image[0]}
        shapes = {"input": image, **matrices, **{vector: (lengths.get(vector, width),) for vector in vectors}}
        absent = ("conv_bias", "norm_weight", "norm_bias", "bias1", "bias2")
        return Case("convnext_block", name, shapes, {**{v: None for v in absent if v not in vectors}, **options})

    biases = ("conv_bias", "norm_weight", "norm_bias", "bias1", "bias2")
    v1, v2 = (*biases, "layer_scale", "drop_path_factor"), (*biases, "grn_weight", "grn_bias", "drop_path_factor")
    recompute = {"recompute_hidden": True}
    cases = [case(f"{width} channels, recomputed", width, v1, **recompute) for width in channels]
    if quick:
        return cases
    return [
        *cases,
        case("96 channels, saved", 96, v1, recompute_hidden=False),
        *(
            case(f"{width} channels, float32 residual", width, v1, float32_residual=True)
            for width in (96, 128, 192, 384)
        ),
        case("GRN", 96, v2),
        case("no drop path", 96, (*biases, "layer_scale"), **recompute),
        case("no bias, affine, scale or drop path", 96, (), **recompute),
        *(case(f"{width} channels, recomputed", width, v1, **recompute) for width in FUSED_CHANNELS),
        *(case(f"{width} channels, tanh", width, v1, activation="gelu_tanh", **recompute) for width in (128, 160, 192)),
    ]


def _patch_cases(channels: Iterable[int], quick: bool) -> list[Case]:
    def case(name: str, width: int, outputs: int, size: int, vectors: tuple[str, ...] = ("bias",)) -> Case:
        shapes = {"input": _image(width, 8), "weight": (outputs, width, size, size)}
        return Case("patch_linear", name, {**shapes, **{vector: (outputs,) for vector in vectors}})

    stems = [case(f"stem of {width} channels", 3, width, 4) for width in channels]
    downsamplings = [case(f"{width} to {2 * width} channels", width, 2 * width, 2) for width in channels]
    return [*stems, *downsamplings, *([] if quick else [case("no bias", 96, 192, 2, ())])]


def cases(operator: str, quick: bool) -> list[Case]:
    """The calls of an operator whose kernels are compiled."""
    channels = (96,) if quick else CHANNELS
    if operator == "depthwise_conv2d":
        return _filter_cases(operator, channels, (), quick)
    if operator == "depthwise_conv2d_layer_norm":
        return _filter_cases(operator, channels, ("norm_weight", "norm_bias"), quick)
    if operator == "mlp":
        return _mlp_cases(channels, quick)
    if operator == "convnext_block":
        return _block_cases(channels, quick)
    return _patch_cases(channels, quick) if operator == "patch_linear" else _norm_cases(operator, channels, quick)


def _call(case: Case, dtype: torch.dtype, quick: bool, autocast: bool = False) -> None:
    """Runs a case for inference, for training and, unless quick, with frozen parameters."""
    tensors = case.draw(torch.float32 if autocast else dtype, "cpu", seed=0)
    trained = set(tensors) - {"drop_path_factor"}
    for wanted in ((), trained) if quick else ((), trained, {"input"}):
        leaves = {name: tensor.detach().requires_grad_(name in wanted) for name, tensor in tensors.items()}
        with torch.autocast("cpu", dtype) if autocast else nullcontext():
            output = OPERATORS[case.operator](**leaves, **case.options)
        if wanted:
            output.backward(torch.empty_like(output))


def _is_for_autocast(case: Case) -> bool:
    return case.name in AUTOCAST or "float32_residual" in case.options


@contextmanager
def _programs(few: bool) -> Iterator[None]:
    """Within the context products are launched as with few tokens, or as with many, whatever there are."""
    with patch.object(matmul_configs, "MULTIPROCESSORS", sys.maxsize if few else 0):
        yield


def compile_all(architecture: int, precision: str, operators: Iterable[str], quick: bool) -> list[tuple[Kernel, float]]:
    """Every kernel that the operators launch in a precision, once, and the seconds it took to compile."""
    dtype, float32_precision = PRECISIONS[precision]
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision(float32_precision)
    kernels = []
    with _logged() as logs, compiling(architecture) as compiled:
        for case in (case for operator in operators for case in cases(operator, quick)):
            known = set(compiled)
            for few in (False, True) if case.operator in PRODUCTS else (False,):
                with _programs(few):
                    _call(case, dtype, quick)
                    if not quick and dtype != torch.float32 and _is_for_autocast(case):
                        _call(case, dtype, quick, autocast=True)
            for function, kernel, seconds in [compiled[key] for key in compiled if key not in known]:
                kernels.append((_describe(function, kernel, logs[kernel.hash], case, precision, architecture), seconds))
    return kernels


def _candidate_workloads(architecture: int, precision: str) -> Iterator[Workload]:
    """Every tunable kernel at every width once."""
    found = {}
    for channels in CANDIDATE_CHANNELS:
        for workload in workloads(_image(channels), precision, architecture, grn=True):
            found.setdefault(workload.name, workload)
    yield from found.values()


def compile_candidates(architecture: int, precision: str) -> list[tuple[Kernel, float]]:
    """As `compile_all`, of the tunable kernels in every configuration."""
    torch.set_num_threads(1)
    kernels = []
    # A key with few tokens has no candidate that the one with many has not.
    with _logged() as logs, compiling(architecture) as compiled, _programs(few=False):
        for workload in _candidate_workloads(architecture, precision):
            tensors = workload.draw(torch.device("cpu"), seed=0)
            for config in workload.tunable.candidates(workload.key):
                known, case = set(compiled), Case(str(workload), str(config), {})
                with trying(workload.tunable, config):
                    workload.run(tensors)
                for function, kernel, seconds in [compiled[key] for key in compiled if key not in known]:
                    kernels.append(
                        (_describe(function, kernel, logs[kernel.hash], case, precision, architecture), seconds)
                    )
    return kernels


def _operators(precision: str, chosen: list[str], quick: bool) -> list[str]:
    """Those of the operators that a precision concerns; quick: all in float16, the MLP in bfloat16 and tf32."""
    concerned = {"tf32": PRODUCTS}.get(precision, tuple(OPERATORS))
    if quick:
        concerned = {"float16": tuple(OPERATORS), "float32": ()}.get(precision, ("mlp",))
    return [operator for operator in chosen if operator in concerned]


def compile_in_parallel(jobs: Sequence[tuple[Any, ...]], processes: int) -> list[tuple[Kernel, float]]:
    """Results of functions that compile, with their arguments; each job in a process, with an empty cache."""
    with (
        tempfile.TemporaryDirectory() as cache,
        patch.dict(os.environ, {"TRITON_CACHE_DIR": cache}),
        Progress(console=console(stderr=True), transient=True) as progress,
        ProcessPoolExecutor(processes, get_context("spawn")) as pool,
    ):
        futures = [pool.submit(*job) for job in jobs]
        for _ in progress.track(as_completed(futures), total=len(futures), description="compiling"):
            pass
    return [kernel for future in futures for kernel in future.result()]


def _count_serialized(kernels: Iterable[Kernel]) -> str:
    """How many kernels have which codes, such as 2 C7515."""
    counts = Counter(code for kernel in kernels for code in kernel.serialized)
    return ", ".join(f"{count} {code}" for code, count in sorted(counts.items()))


def _table(kernels: list[tuple[Kernel, float]], every: bool) -> Table:
    """The kernels, or the worst of all that share name, dtype and architecture."""
    groups: dict[tuple[Any, ...], list[tuple[Kernel, float]]] = {}
    for kernel, seconds in kernels:
        key = (kernel.kernel, kernel.dtype, kernel.architecture, *((len(groups),) if every else ()))
        groups.setdefault(key, []).append((kernel, seconds))
    table = Table(title="Triton kernels compiled ahead of time" + ("" if every else ", the worst of each group"))
    table.add_column("kernel", no_wrap=True)
    table.add_column("call" if every else "most registers in")
    for column in ("dtype", "sm", "kernels", "registers", "spills", "shared", "mma", "serialized", "seconds"):
        table.add_column(column, justify="right")
    for (name, dtype, architecture, *_), members in groups.items():
        group = [kernel for kernel, _ in members]
        worst = max(group, key=lambda kernel: kernel.registers)
        table.add_row(
            name,
            f"{worst.operator}: {worst.call}",
            dtype,
            str(architecture),
            str(len(group)),
            str(worst.registers),
            str(max(kernel.stack + kernel.local for kernel in group)),
            str(max(kernel.shared for kernel in group)),
            str(min(kernel.matrix_instructions for kernel in group)),
            _count_serialized(group),
            f"{max(seconds for _, seconds in members):.1f}",
        )
    return table


def report(kernels: list[tuple[Kernel, float]], every: bool, may_spill: bool = False) -> int:
    """Prints the table and every failure; returns the exit code."""
    out = console()
    out.print(_table(kernels, every))
    failed = 0
    for kernel, _ in kernels:
        for failure in failures(kernel, may_spill):
            failed += 1
            where = f"{kernel.kernel} in {kernel.dtype} for sm_{kernel.architecture}"
            out.print(
                f"FAILED {where}: {failure}\n  {kernel.operator}, {kernel.call}: {kernel.constants}", markup=False
            )
    if any(kernel.kernel in PRODUCT_KERNELS and kernel.dtype == "float32" for kernel, _ in kernels):
        out.print(
            "float32 in full precision has no matrix instruction; tf32 is what PyTorch's setting may allow instead."
        )
    if waiting := _count_serialized(kernel for kernel, _ in kernels):
        out.print(f"wgmma wait for one another, for the assembler's reason, in: {waiting}")
    out.print(f"{len(kernels)} kernels compiled, {failed} failures")
    return 1 if failed or not kernels else 0


@command("ahead_of_time")
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ahead_of_time", description=__doc__.split("\n\n")[0])
    parser.add_argument("--architecture", nargs="+", type=int, choices=SHARED_MEMORY, default=[80, 90], metavar="SM")
    parser.add_argument("--dtype", nargs="+", metavar="NAME", help=f"{', '.join(PRECISIONS)} (all)")
    parser.add_argument("--operator", nargs="+", metavar="NAME", help="only these (all)")
    parser.add_argument("--quick", action="store_true", help="96 channels; float16, the MLP also in bfloat16 and tf32")
    parser.add_argument("--candidates", action="store_true", help="instead: every configuration that tune may choose")
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="compile in so many processes (2)")
    parser.add_argument("--all", action="store_true", help="a row for every kernel, not only the worst of each group")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every kernel, without the seconds")
    options = parser.parse_args(arguments)
    if backends.interpreting():
        raise CommandError("TRITON_INTERPRET=1 is set: Triton's interpreter compiles nothing")
    precisions = names("--dtype", options.dtype, PRECISIONS, tuple(PRECISIONS))
    operators = names("--operator", options.operator, OPERATORS, tuple(OPERATORS))
    path = writable("--json", options.json)
    pairs = [(architecture, precision) for precision in precisions for architecture in options.architecture]
    jobs: list[tuple[Any, ...]] = [(compile_candidates, *pair) for pair in pairs]
    if not options.candidates:
        chosen = {precision: _operators(precision, operators, options.quick) for precision in precisions}
        jobs = [(compile_all, a, p, chosen[p], options.quick) for a, p in pairs if chosen[p]]
    kernels = compile_in_parallel(jobs, options.processes)
    if path is not None:
        versions = {"torch": torch.__version__, "triton": triton.__version__}
        write_json(path, {**versions, "kernels": [asdict(kernel) for kernel, _ in kernels]})
    return report(kernels, options.all, may_spill=options.candidates)


if __name__ == "__main__":
    sys.exit(main())
