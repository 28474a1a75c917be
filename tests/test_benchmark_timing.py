"""What the benchmarks on a GPU share. Where there is no GPU, stand-ins note what is asked of CUDA."""

import json
import subprocess
import sys
import warnings
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from benchmarks import reporting, timing
from benchmarks.reporting import Figure, Target, measure_all
from benchmarks.timing import clocks, driver, fair, floor, measure_calls, parity_failure, refusal
from convnext_kernels.backends import BackendError
from convnext_kernels.cli.measure import Timing

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


class FakeCuda:
    """Notes what is asked of torch.cuda; a capture of the work of `unfit` fails."""

    def __init__(self, monkeypatch):
        self.log, self.capturing, self.unfit = [], False, None
        self.stream_type = SimpleNamespace(wait_stream=lambda other: None)
        fakes = {
            "Stream": lambda device: self.stream_type,
            "current_stream": lambda device: self.stream_type,
            "stream": self.on_stream,
            "synchronize": lambda *device: self.log.append("synchronize"),
            "CUDAGraph": lambda: SimpleNamespace(replay=lambda: self.log.append("replay")),
            "graph": self.graph,
            "get_device_properties": lambda device: SimpleNamespace(uuid="1234"),
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(timing, "_nvidia_smi", lambda *arguments: "1980, 3201, 512.3, 45")
        monkeypatch.setattr(timing, "measure_over", self.measure_over)

    @contextmanager
    def on_stream(self, stream):
        self.log.append("side stream")
        yield
        self.log.append("end")

    @contextmanager
    def graph(self, graph):
        self.capturing = True
        self.log.append("capture")
        yield
        self.capturing = False
        self.log.append("end")

    def call(self, name):
        def run(input):
            if self.capturing and name == self.unfit:
                self.capturing = False
                raise RuntimeError("operation not permitted when stream is capturing")
            self.log.append(f"{name}{input}")

        return run

    def measure_over(self, works, inputs, device, rounds, advance):
        self.log.append("timed")
        for work in works.values():
            work(inputs[0])
        return {name: Timing([6.0] * rounds) for name in works}


@pytest.fixture
def cuda(monkeypatch):
    return FakeCuda(monkeypatch)


def test_calls_are_warmed_up_captured_and_replayed(cuda):
    measured = measure_calls({"a": cuda.call("a"), "b": cuda.call("b")}, [1, 2], GPU, 3)
    for name in "ab":
        assert cuda.log[:9] == ["side stream", *3 * [f"{name}1", f"{name}2"], "end", "synchronize"]
        del cuda.log[:9]
    captured = [entry for name in "ab" for entry in ("capture", f"{name}1", f"{name}2", "end")]
    assert cuda.log == [*captured, "timed", "replay", "replay"]
    # A sample is of both inputs, a time is of one call.
    assert {name: of.samples for name, of in measured.timings.items()} == {"a": [3.0] * 3, "b": [3.0] * 3}
    assert measured.no_graphs is None and not measured.failures and not measured.peaks
    assert measured.clocks == {
        "clocks.sm": "1980",
        "clocks.mem": "3201",
        "power.draw": "512.3",
        "temperature.gpu": "45",
    }


def test_where_one_cannot_be_captured_none_is(cuda):
    cuda.unfit = "b"
    measured = measure_calls({"a": cuda.call("a"), "b": cuda.call("b")}, [1], GPU, 3)
    assert measured.no_graphs == "RuntimeError: operation not permitted when stream is capturing"
    assert cuda.log[-3:] == ["timed", "a1", "b1"] and set(measured.timings) == {"a", "b"}


def test_without_graphs_calls_are_launched(cuda):
    measure_calls({"a": cuda.call("a")}, [1], GPU, 3, graphs=False)
    assert "capture" not in cuda.log and cuda.log[-2:] == ["timed", "a1"]


def test_one_that_raises_is_left_out(cuda, capsys):
    def broken(input):
        raise torch.OutOfMemoryError("CUDA out of memory\nand more")

    measured = measure_calls({"a": cuda.call("a"), "broken": broken}, [1], GPU, 3)
    assert measured.failures == {"broken": "OutOfMemoryError: CUDA out of memory"}
    assert list(measured.timings) == ["a"]
    assert "in broken" in capsys.readouterr().err


def test_peaks_are_of_a_second_call(monkeypatch):
    log = []

    def peak_memory(work, inputs):
        assert inputs.device == CPU
        log.append("peak")
        work(inputs)
        return 17

    monkeypatch.setattr(timing, "peak_memory", peak_memory)
    monkeypatch.setattr(timing, "measure_over", lambda works, *_: {name: Timing([1.0]) for name in works})
    measured = measure_calls({"a": log.append}, ["x", "y"], CPU, 1, peaks=True)
    assert measured.peaks == {"a": 17} and log == ["x", "y", "x", "peak", "x"]


def test_clocks_are_those_of_the_gpu(monkeypatch):
    asked = []

    def run(command, **options):
        asked.append(command)
        return SimpleNamespace(stdout="1980, 3201, 512.3, 45\n" if "-i" in command else "580.1\n580.1\n")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1234"))
    assert clocks(GPU)["clocks.sm"] == "1980" and driver() == "580.1"
    assert asked[0] == [
        "nvidia-smi",
        "--query-gpu=clocks.sm,clocks.mem,power.draw,temperature.gpu",
        *("-i", "GPU-1234"),
        "--format=csv,noheader,nounits",
    ]
    assert clocks(CPU) is None


@pytest.mark.parametrize("error", [FileNotFoundError(), subprocess.TimeoutExpired("nvidia-smi", 10)])
def test_nvidia_smi_may_be_silent(error, monkeypatch):
    def run(command, **options):
        raise error

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace())
    assert clocks(GPU) is None and driver() is None


def test_the_floor_is_the_largest_bound_of_each_round():
    bounds = [(2.0, Timing([1.0, 2.0, 3.0])), (1.0, Timing([3.0, 3.0, 3.0]))]
    assert floor(bounds).samples == [3.0, 4.0, 6.0]


def test_parity_has_the_limits_of_the_package():
    """1.5 times PyTorch's error, plus one unit of rounding for the norm: here that of bfloat16, 2^-8."""
    exact = torch.ones(64, dtype=torch.float64)
    theirs = exact * 1.01
    limit = 0.015 + 2**-8
    for error, wrong in ((0.99 * limit, False), (1.01 * limit, True), (float("nan"), True)):
        failure = parity_failure([exact * (1 + error)], [theirs], [exact], torch.bfloat16)
        assert (failure is not None and failure.startswith("parity failed: result 0 off by")) == wrong


def test_why_a_contender_is_refused():
    def missing():
        raise BackendError("no such kernels")

    def broken():
        raise RuntimeError("ptxas failed\nand more")

    assert refusal(lambda: None) is None and refusal(lambda: "parity failed") == "parity failed"
    assert refusal(missing) == "not available: no such kernels"
    assert refusal(broken) == "RuntimeError: ptxas failed"


def test_the_reference_on_a_gpu_is_an_error():
    with fair(), pytest.raises(UserWarning, match="plain PyTorch"):
        warnings.warn("mlp runs the plain PyTorch reference on a GPU: no triton", stacklevel=1)


def test_a_case_that_raises_leaves_the_others(tmp_path):
    path = tmp_path / "results.json"

    def measure(case):
        if case == 1:
            raise RuntimeError("an illegal memory access was encountered")
        return [case]

    rows, unmeasured = measure_all([0, 1, 2], measure, lambda row: {"row": row}, {"device": "none"}, path)
    assert rows == [0, 2] and unmeasured == {"1": "RuntimeError: an illegal memory access was encountered"}
    assert '"unmeasured": {\n    "1": "RuntimeError' in path.read_text()


def test_an_interrupted_run_keeps_what_it_has(tmp_path):
    path = tmp_path / "results.json"

    def measure(case):
        if case == 2:
            raise KeyboardInterrupt
        return [case]

    with pytest.raises(KeyboardInterrupt):
        measure_all([0, 1, 2], measure, lambda row: {"row": row}, {"device": "none"}, path)
    assert json.loads(path.read_text()) == {"device": "none", "results": [{"row": 0}, {"row": 1}], "unmeasured": {}}


def test_a_hang_ends():
    script = "import time; from benchmarks.reporting import ends_within\nwith ends_within(0.2 / 60): time.sleep(30)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 1 and "Timeout (0:00:00.200000)" in result.stderr


def test_verdicts():
    assert Figure("time", 1.2, Target(1.25, at_most=True)).met and not Figure("time", 1.3, Target(1.25, True)).met
    assert Figure("speedup", 1.3, Target(1.25)).met and not Figure("speedup", 1.2, Target(1.25)).met
    assert Figure("speedup", None, Target(1.25)).met is None and Figure("speedup", 1.0).met is None
    assert str(Figure("speedup", 1.3, Target(1.25))) == "[green]1.30[/] (≥ 1.25)"
    assert str(Figure("speedup", 1.2, Target(1.25))) == "[red]1.20[/] (≥ 1.25)"
    assert str(Figure("speedup", None, Target(1.25))).strip() == "(≥ 1.25)"


def test_find_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert reporting.find_gpu() is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert reporting.find_gpu() == torch.device("cuda", 1)
