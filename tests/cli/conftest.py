"""What the tests of the commands share."""

import json

import pytest
import torch

from convnext_kernels.cli import main, measure

TINY = (
    "--model",
    "convnext_atto",
    "--batch-size",
    "2",
    "--resolution",
    "32",
    "--runs",
    "2",
    "--device",
    "cpu",
    "--threads",
    "1",
)


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """Runs `bench` on the smallest model, in short samples; returns its exit code and the content of its JSON."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(measure, "SAMPLE_MILLISECONDS", 1.0)

    def run(*arguments):
        path = tmp_path / "bench.json"
        compiled = () if "--compile" in arguments else ("--no-compile",)
        given = [argument for argument in arguments if argument != "--compile"]
        code = main(["bench", *TINY, *compiled, "--json", str(path), *given])
        return code, json.loads(path.read_text()) if path.exists() else None

    yield run
    torch.set_num_threads(threads)
