"""Lets Triton's launches of tensors on the CPU compile for a GPU and run the PTX that comes out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any
from unittest.mock import patch

ARCHITECTURE = "CONVNEXT_KERNELS_PTX"
"""The environment variable with the architecture of a process whose tests run in this way, such as 90."""

_whole_process = ExitStack()


def chosen() -> bool:
    """Whether the environment asks for it."""
    return ARCHITECTURE in os.environ


def install() -> None:
    """For the whole process: Triton's kernels run on the machine, products in the tiles that many tokens have."""
    from convnext_kernels.ops.common import matmul_configs

    os.environ["TRITON_INTERPRET"] = "0"
    matmul_configs.MULTIPROCESSORS = 0
    _whole_process.enter_context(running(int(os.environ[ARCHITECTURE])))


@cache
def _program(hash: str, ptx: str) -> Any:
    from ptx.program import kernels

    (program,) = kernels(ptx)
    return program


def _arguments(function: Any, kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Those of a launch that the compiled kernel still has as parameters."""
    given = dict(zip(function.arg_names, args, strict=False)) | kwargs
    return [given[name] for name, kind in kernel.src.signature.items() if kind != "constexpr"]


@contextmanager
def running(architecture: int) -> Iterator[None]:
    """Within the context Triton's kernels run on tensors of the CPU as a GPU of the architecture would run them."""
    from ptx import machine
    from triton.runtime.jit import JITFunction

    from convnext_kernels.cli.compile_ahead import compiling

    with compiling(architecture):
        compile_only = JITFunction.run

        def run(function: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
            kernel = compile_only(function, *args, grid=grid, warmup=warmup, **kwargs)
            blocks = [*(grid(kwargs) if callable(grid) else grid), 1, 1][:3]
            program = _program(kernel.hash, kernel.asm["ptx"])
            machine.launch(program, blocks, kernel.metadata.shared, _arguments(function, kernel, args, kwargs))
            return kernel

        with patch.object(JITFunction, "run", run):
            yield
