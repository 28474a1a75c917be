"""show versions, GPUs, the compiled library, and which backend runs what

For each device: the operators that a backend runs by default, and what speaks against it for the others.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from convnext_kernels import build_info, explain
from convnext_kernels.backends import BACKENDS
from convnext_kernels.cli.machine import commit, machine
from convnext_kernels.cli.output import console, to_json
from convnext_kernels.functional import OPERATORS
from convnext_kernels.ops.common.tuning import gpu_table

CHANNELS = 32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's options."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def _typical_calls(device: torch.device) -> dict[str, tuple[Tensor, ...]]:
    """The arguments of a small float32 call of each operator, as a ConvNeXt block makes it."""

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, device=device)

    images, channels = new(1, CHANNELS, 8, 8), new(CHANNELS)
    convolution = (new(CHANNELS, 1, 7, 7), channels)
    layers = (new(4 * CHANNELS, CHANNELS), new(4 * CHANNELS), new(CHANNELS, 4 * CHANNELS), channels)
    return {
        "convnext_block": (images, *convolution, channels, channels, *layers),
        "depthwise_conv2d": (images, *convolution),
        "depthwise_conv2d_layer_norm": (images, *convolution, channels, channels),
        "global_response_norm": (images, channels, channels),
        "layer_norm": (images, channels, channels),
        "mlp": (images, *layers),
        "patch_linear": (images, new(2 * CHANNELS, CHANNELS, 2, 2), new(2 * CHANNELS)),
    }


def _devices() -> list[torch.device]:
    return [torch.device("cuda", index) for index in range(torch.cuda.device_count())] + [torch.device("cpu")]


def _backends(device: torch.device) -> dict[str, dict[str, Any]]:
    """For each backend: the operators it is chosen for, and each reason against it with the operators concerned."""
    found: dict[str, dict[str, Any]] = {backend: {"chosen_for": [], "reasons": {}} for backend in BACKENDS}
    for operator, arguments in _typical_calls(device).items():
        explanation = explain(operator, *arguments)
        if explanation.backend is not None:
            found[explanation.backend]["chosen_for"].append(operator)
        for backend, reasons in explanation.reasons.items():
            for reason in reasons:
                found[backend]["reasons"].setdefault(reason.removeprefix(f"{operator} "), []).append(operator)
    return found


def _launch_configurations(gpu: str) -> dict[str, Any]:
    """How many are measured, the files that they come from, and what was ignored and why."""
    table = gpu_table(gpu)
    return {"measured": len(table.entries), "files": list(map(str, table.files)), "ignored": list(table.problems)}


def collect() -> dict[str, Any]:
    """Everything that the command shows, as plain data."""
    computer = machine()
    return {
        "build": build_info(),
        "commit": commit(),
        "machine": computer,
        "launch_configurations": {gpu["name"]: _launch_configurations(gpu["name"]) for gpu in computer["gpus"]},
        "backends": {str(device): _backends(device) for device in _devices()},
    }


def _named(operators: list[str]) -> str:
    return "all operators" if len(operators) == len(OPERATORS) else ", ".join(operators)


def _library(build: dict[str, Any]) -> str:
    if not build["compiled_library"]:
        return build["reason"]
    code = ", ".join(f"sm_{architecture}" for architecture in build["architectures"])
    ptx = f"; PTX of compute_{build['ptx']}" if build["ptx"] else ""
    return f"machine code for {code}{ptx} (nvcc {build['nvcc']})"


def _show(content: dict[str, Any], target: Console) -> None:
    build, computer = content["build"], content["machine"]
    overview = Table.grid(padding=(0, 2))
    overview.add_row("convnext-kernels", f"{build['version']} (commit {content['commit'] or 'unknown'})")
    overview.add_row("Python", build["python"])
    overview.add_row("PyTorch", f"{build['torch']} (CUDA {build['cuda_runtime'] or 'not built in'})")
    overview.add_row("Triton", build["triton"] or "not installed")
    overview.add_row("compiled library", _library(build))
    overview.add_row("CPU", f"{computer['cpu']}, {computer['cores']} cores, {computer['threads']} threads")
    for gpu, code in zip(computer["gpus"], build["device_code"].values(), strict=True):
        capability = ".".join(map(str, gpu["capability"]))
        memory = gpu["memory_bytes"] / 2**30
        overview.add_row(f"GPU {gpu['index']}", f"{gpu['name']}, {capability}, {memory:.0f} GiB; library code: {code}")
    for gpu, found in content["launch_configurations"].items():
        measured = f"{found['measured']} measured ({', '.join(found['files'])})" if found["files"] else "by rule"
        overview.add_row(f"launches on {gpu}", measured)
        for problem in found["ignored"]:
            overview.add_row("", f"ignored: {problem}")
    if not computer["gpus"]:
        overview.add_row("GPU", "none")
    target.print(overview)
    for device, backends in content["backends"].items():
        target.print(_backend_table(device, backends))


def _backend_table(device: str, backends: dict[str, dict[str, Any]]) -> Table:
    table = Table(title=f"Backends on {device}", title_justify="left")
    table.add_column("backend")
    table.add_column("chosen for")
    table.add_column("reasons against it")
    for backend, found in backends.items():
        reasons = [f"{_named(operators)}: {reason}" for reason, operators in found["reasons"].items()]
        table.add_row(backend, _named(found["chosen_for"]) or "nothing", "\n".join(reasons) or "none")
    return table


def run(arguments: argparse.Namespace) -> int:
    """Shows what is installed and what can run."""
    content = collect()
    if arguments.json:
        print(to_json(content))
    else:
        _show(content, console())
    return 0
