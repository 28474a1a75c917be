"""Starts examples/train.py and the like in processes of their own, and stops them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from training.files import read_log

ROOT = Path(__file__).resolve().parents[2]


def python(*arguments: str) -> subprocess.Popen[str]:
    """Starts a process of one thread."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "examples")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def torchrun(*arguments: str) -> subprocess.Popen[str]:
    """Starts two processes of one thread each."""
    return python("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments)


def stop_at(process: subprocess.Popen, output: Path, step: int, number: int = signal.SIGTERM) -> str:
    """Signals a run that has done so many steps, waits for its end and returns what it wrote of errors."""
    log, last = output / "steps.csv", output / "last.pt"
    try:
        while process.poll() is None and not (last.exists() and len(read_log(log)) >= step):
            time.sleep(0.01)
        process.send_signal(number)
        return process.communicate(timeout=120)[1]
    finally:
        process.kill()
