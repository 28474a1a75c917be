"""Compiling Triton's kernels without launching them, for a GPU that need not be there, and in many processes."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from typing import Any
from unittest.mock import patch

import torch

from convnext_kernels import backends
from convnext_kernels.cli.workloads import Workload
from convnext_kernels.ops.common.tuning import trying


class _Driver:
    """Stands in for a GPU of an architecture; each architecture is a device of its own to Triton's caches."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiling(architecture: int) -> Iterator[dict[str, tuple[Any, Any, float]]]:
    """Within the context Triton's launches, of tensors on the CPU, compile for the architecture and do not run.

    Yields function, compiled kernel and seconds of every kernel launched, by the kernel's hash.
    """
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    compiled: dict[str, tuple[Any, Any, float]] = {}
    run = JITFunction.run

    def compile_only(function: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        start = time.perf_counter()
        kernel = run(function, *args, grid=grid, warmup=True, **kwargs)
        compiled.setdefault(kernel.hash, (function, kernel, time.perf_counter() - start))
        return kernel

    driver.set_active(_Driver(architecture))
    try:
        with (
            patch.object(JITFunction, "run", compile_only),
            patch.object(backends, "machine_reasons", lambda *_, **__: ()),
            patch.object(torch.cuda, "get_device_capability", lambda _: divmod(architecture, 10)),
            backends.use_backend("triton"),
        ):
            yield compiled
    finally:
        driver.set_active(None)


def compile_workload(workload: Workload, config: Any, architecture: int) -> None:
    """Compiles a kernel in one configuration into Triton's cache on disk."""
    torch.set_num_threads(1)
    with compiling(architecture), trying(workload.tunable, config):
        workload.run(workload.empty())


def _ignore_interrupts() -> None:
    """Ctrl-C reaches every process of a terminal; the first one ends the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def compiled_ahead(plan: Sequence[Workload], architecture: int) -> Iterator[Callable[[Workload], None]]:
    """Within the context other processes compile the candidates of every kernel of a plan, in its order.

    Yields what waits until a kernel's candidates are in Triton's cache. What cannot be compiled is left to its launch.
    """
    processes = max(1, (os.cpu_count() or 1) - 1)
    pool = ProcessPoolExecutor(processes, get_context("spawn"), _ignore_interrupts)
    jobs = {
        workload.name: [
            pool.submit(compile_workload, workload, config, architecture)
            for config in workload.tunable.candidates(workload.key)
        ]
        for workload in plan
    }

    def wait_for(workload: Workload) -> None:
        for job in jobs[workload.name]:
            with suppress(Exception):
                job.result()

    try:
        yield wait_for
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
