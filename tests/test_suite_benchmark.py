"""`python -m benchmarks`: what it leaves out, keeps and refuses, whatever happens to its parts or to itself."""

import json
import os
import re
import signal
import subprocess
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from itertools import product
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from support import refusal

pytest.importorskip("triton")
from benchmarks import gpu_tests, kernels, library, parts, record, reporting, suite
from benchmarks.parts import PARTS, Part, _on_a_cpu
from benchmarks.readme import ROOT
from benchmarks.suite import main
from convnext_kernels.functional import OPERATORS

FAKE = """
import json, sys, time
from pathlib import Path

path, behaviour = Path(sys.argv[sys.argv.index("--json") + 1]), sys.argv[1]
row = {"mode": "forward", "dtype": "bfloat16", "milliseconds": 2.0, "quartiles": [1.9, 2.1], "failure": None}
rows = [
    {**row, "contender": "ours", "figures": {"speedup over eager": {"value": 3.0, "target": None, "met": None}}},
    {**row, "contender": "PyTorch eager", "figures": {"images/s": {"value": 5.0, "target": None, "met": None}}},
]
content = {"results": rows, "unmeasured": {}}
if behaviour == "wrong mlp":
    content = {"results": [], "unmeasured": {}, "tests": {
        "mlp": {"passed": 3, "skipped": 0, "failed": ["test_mlp.py::test_a", "test_mlp.py::test_b"]},
        "layer_norm": {"passed": 9, "skipped": 0, "failed": []},
    }}
path.with_suffix(".new").write_text(json.dumps(content))
path.with_suffix(".new").replace(path)
print("measuring", behaviour, file=sys.stderr, flush=True)
if behaviour == "hangs":
    time.sleep(300)
sys.exit(3 if behaviour == "fails" else 0)
"""
MLP = frozenset({"mlp"})


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs parts that only write a file; returns the exit code and the record."""
    (tmp_path / "fake_part.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))

    def run(*behaviours, operators=frozenset(), arguments=()):
        rests = {"rests": lambda case: operators}
        fakes = [
            Part(f"{i} {name}", "writes a file", "fake_part", 1, (name,), gpu=False, **of)
            for i, name in enumerate(behaviours)
            for of in [{"operators": rests[name]} if name in rests else {}]
        ]
        path = tmp_path / "record.json"
        code = main(["--json", str(path), *arguments], fakes)
        return code, record.load(path)

    return run


def states(content):
    return [part["state"] for part in content["parts"].values()]


def test_without_a_gpu_the_cpu_part_runs(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    tiny = ("--model", "convnext_atto", "--mode", "inference", "--batch-size", "1", "--resolution", "32", "--runs", "1")
    for_a_gpu = [part for part in PARTS if part.gpu]
    path = tmp_path / "new folder" / "record.json"
    assert main(["--json", str(path)], [*for_a_gpu, _on_a_cpu("cpu_models", "a tiny model", 1, *tiny)]) == 0
    content = record.load(path)
    assert content["state"] == "complete" and content["gpu"] is False
    assert states(content) == [*["left out"] * len(for_a_gpu), "done"]
    ours, eager = content["parts"]["cpu_models"]["results"]
    assert ours["case"] == {
        **{"mode": "inference", "model": "convnext_atto", "dtype": "float32", "batch": 1, "resolution": 32}
    }
    assert ours["milliseconds"] > 0 and ours["figures"]["speedup over PyTorch eager"]["value"] > 0
    assert "speedup over PyTorch eager" not in eager["figures"] and eager["peak_bytes"] > 0
    assert "speedup over PyTorch eager" in path.with_suffix(".html").read_text()
    assert path.with_suffix("").joinpath("speedups.png").is_file()
    printed = capfd.readouterr().out
    assert "cpu_models: a tiny model (at most 8.0 minutes)" in printed
    left_out = (
        "left out: library, kernels, parity, ceilings, depthwise, mlp, blocks, models, compiled (needs an NVIDIA GPU"
    )
    assert left_out in printed and printed.index(left_out) < printed.index("complete: 2 results")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_run_keeps_what_it_has(number, run, tmp_path, capfd):
    """The signal is sent once the results of the part that hangs are in the file: they are there while it runs."""
    seen = []

    def interrupt():
        path, patience = tmp_path / "record.json", time.monotonic() + 20
        while not seen and time.monotonic() < patience:
            time.sleep(0.05)
            if path.exists() and (part := json.loads(path.read_text())["parts"]["1 hangs"])["results"]:
                seen.append(part)
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    threading.Thread(target=interrupt, daemon=True).start()
    code, content = run("measures", "hangs", "measures")
    assert [part["state"] for part in seen] == ["running"] and len(seen[0]["results"]) == 2
    assert code == 128 + number and signal.getsignal(number) is before
    assert content["state"] == f"interrupted by {number.name}"
    assert states(content) == ["done", "interrupted", "waiting"]
    assert [len(part["results"]) for part in content["parts"].values()] == [2, 2, 0]
    assert f"interrupted by {number.name}: 4 results in" in capfd.readouterr().out


def test_a_part_that_fails_or_hangs_leaves_the_others(run, capfd, monkeypatch):
    monkeypatch.setattr(suite, "PROGRESS_SECONDS", 1)
    code, content = run("fails", "hangs", "measures", arguments=["--minutes", "0.1"])
    assert code == 0 and states(content) == ["failed", "stopped", "done"]
    failed, hung, _ = content["parts"].values()
    assert failed["reason"] == "ended with exit code 3: measuring fails" and hung["reason"].startswith(
        "its time was up"
    )
    assert [len(part["results"]) for part in content["parts"].values()] == [2, 2, 2]
    captured = capfd.readouterr()
    assert "0 fails: failed: ended with exit code 3: measuring fails (2 results)" in captured.out
    assert re.search(r"1 hangs: \d of \d s, 2 results", captured.err) and "    measuring hangs" in captured.err


def test_a_part_that_is_killed_says_by_what():
    assert suite.Run._verdict(-signal.SIGKILL, deque()) == ("failed", "ended with SIGKILL: it said nothing")


def test_no_speedup_where_parity_failed(run, capfd):
    _, content = run("wrong mlp", "rests", operators=MLP)
    ours, eager = content["parts"]["1 rests"]["results"]
    assert ours["figures"]["speedup over eager"] == {"value": None, "target": None, "met": None}
    reason = "2 tests failed, the first: test_mlp.py::test_a"
    assert ours["refused"] == f"parity failed in this run, mlp: {reason}"
    assert eager["figures"]["images/s"]["value"] == 5.0 and "refused" not in eager
    assert content["parity"] == {"mlp": reason}
    assert f"parity failed, no speedup for mlp: {reason}" in capfd.readouterr().out


def test_a_speedup_that_does_not_rest_on_it_stays(run):
    _, content = run("wrong mlp", "rests", operators=frozenset({"layer_norm"}))
    assert content["parts"]["1 rests"]["results"][0]["figures"]["speedup over eager"]["value"] == 3.0


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
def test_a_part_that_wrote_nothing_has_no_results(part, tmp_path):
    (tmp_path / "half.json").write_text('{"results": [{"mode"')
    for name in ("missing.json", "half.json"):
        assert list(part.read(suite._read(tmp_path / name))) == []


def test_the_host_side_of_calls():
    """What pytest-benchmark writes, in seconds; a block alone has a target."""
    stats = {"median": 2e-5, "q1": 1.9e-5, "q3": 2.2e-5}
    calls = [("ConvNeXtBlock", False), ("ConvNeXtBlock", True), ("mlp", False)]
    benchmarks = [
        {"group": "host side", "params": {"name": name, "autograd": autograd}, "stats": stats}
        for name, autograd in calls
    ]
    (part,) = [part for part in PARTS if part.name == "dispatch"]
    rows = list(part.read({"benchmarks": benchmarks}))
    assert [(row["case"]["operator"], row["case"]["autograd"]) for row in rows] == calls
    assert rows[0]["milliseconds"] == pytest.approx(0.02) and rows[0]["quartiles"] == pytest.approx([0.019, 0.022])
    figures = [row["figures"]["microseconds"] for row in rows]
    assert [figure["value"] for figure in figures] == pytest.approx([20, 20, 20])
    assert [figure["met"] for figure in figures] == [False, True, None]
    assert part.output == "--benchmark-json" and (ROOT / part.arguments[0]).is_file()


def test_the_summary_says_once_why_cases_are_missing():
    missing = {"a": "left out for the time", "b": "OutOfMemoryError", "c": "left out for the time"}
    part = {"state": "done", "reason": None, "results": [], "unmeasured": missing}
    assert suite.summary({"parts": {"models": part}, "parity": {}}).splitlines() == [
        "  models: done (0 results)",
        "    not measured: a and 1 more: left out for the time",
        "    not measured: b: OutOfMemoryError",
    ]


def test_parts_can_run_alone(run):
    _, content = run("measures", "rests", arguments=["--only", "1 rests"])
    assert states(content) == ["left out", "done"]
    assert content["parts"]["0 measures"]["reason"] == "not asked for"


def test_the_default_file(monkeypatch):
    monkeypatch.setattr(suite, "header", lambda device: {"device": "NVIDIA H200, MIG 1g"})
    path = suite.default_path(None)
    assert path.parent == suite.RESULTS / "nvidia-h200" and path.suffix == ".json"


def test_the_shares_of_the_parts():
    assert sum(part.minutes for part in PARTS if part.gpu) == suite.MINUTES == 8
    assert sum(part.minutes for part in PARTS if not part.gpu) <= 2
    assert suite.leave_out(PARTS, None, has_gpu=True).keys() == {part.name for part in PARTS if not part.gpu}


def measured_in_its_share(name, monkeypatch):
    """The cases of a part that are begun within its share of the minutes, if each takes as long as is expected."""
    (part,) = [part for part in PARTS if part.name == name]
    module, now, measured = import_module(part.module), [0.0], []
    options = module._parser().parse_args(part.arguments)
    cases = module.choose_cases(options)

    def seconds(case):
        return module.seconds(case, options.rounds)

    def measure(case):
        now[0] += seconds(case)
        measured.append(case)
        return []

    monkeypatch.setattr(reporting.time, "monotonic", lambda: now[0])
    reporting.measure_all(cases, measure, dict, {}, None, seconds, suite.START_UP * part.minutes)
    return measured


def test_what_tells_most_comes_within_eight_minutes(monkeypatch):
    whole = measured_in_its_share("models", monkeypatch)
    assert {(case.model, case.mode, case.accelerated) for case in whole} >= {
        (model, mode, accelerated)
        for model in ("convnext_tiny", "convnext_base", "convnextv2_tiny", "convnextv2_base")
        for mode, accelerated in product(("inference", "training step"), (False, True))
    }
    compiled = measured_in_its_share("compiled", monkeypatch)
    assert [(case.mode, case.batch, case.compiler) for case in compiled[:2]] == [
        ("inference", 256, compiler) for compiler in ("torch.compile", "torch.compile max-autotune")
    ]
    for name in ("mlp", "blocks"):
        assert {case.channels for case in measured_in_its_share(name, monkeypatch)} >= {96, 192, 384, 768}


@pytest.mark.parametrize("part", [part for part in PARTS if part.gpu], ids=lambda part: part.name)
def test_what_a_part_is_given_is_accepted(part, tmp_path, monkeypatch, capsys):
    """Where there is no GPU: the plan, a file that is read, and operators that exist."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu_tests.pytest, "main", lambda *arguments, **options: 5)
    monkeypatch.setattr(library, "find_nvcc", lambda: None)
    path = tmp_path / "part.json"
    limit = ["--minutes", "1"] if part.limits_itself else []
    code = import_module(part.module).main([*part.arguments, *limit, "--json", str(path)])
    if part.name == "depthwise":
        assert code == 2 and "needs an NVIDIA GPU" in capsys.readouterr().err
        return
    assert code == 0
    for row in part.read(json.loads(path.read_text())):
        assert {"mode", "dtype"} <= row["case"].keys() and record.label(row["case"])
        assert part.operators(row["case"]) <= OPERATORS.keys()


@pytest.mark.parametrize("code", [0, 7])
def test_a_missing_library_is_built(code, tmp_path, monkeypatch):
    called = []

    def run(command, env, **options):
        called.append((command[1:], env["CONVNEXT_KERNELS_CUDA_ARCHS"]))
        if code:
            raise subprocess.CalledProcessError(code, command)

    missing = {"compiled_library": False, "reason": "is not built"}
    fakes = {"build_info": lambda: dict(missing), "find_nvcc": lambda: "nvcc", "architectures": lambda: "80;90a"}
    for name, fake in fakes.items():
        monkeypatch.setattr(library, name, fake)
    monkeypatch.setattr(subprocess, "run", run)
    path = tmp_path / "part.json"
    assert library.main(["--json", str(path)]) == (1 if code else 0)
    assert called == [(["setup.py", "build_ext", "--inplace"], "80;90a")]
    found = json.loads(path.read_text())["library"]
    assert found["compiled_library"] is (code == 0)
    assert found["reason"] == (f"building it failed: setup.py ended with {code}" if code else None)


def test_kernels_of_every_block_are_compiled(monkeypatch):
    """One that cannot be is named, the others go on."""

    def compile_case(case, target):
        if case.channels == 192:
            raise RuntimeError("ptxas failed")
        return 3

    monkeypatch.setattr(kernels, "compile_case", compile_case)
    with ThreadPoolExecutor(1) as pool:
        failures = kernels.compile_all(90, pool)
    assert set(failures.values()) == {"RuntimeError: ptxas failed"} and len(failures) == 4
    cases = kernels.cases()
    assert {case.channels for case in cases} == set(map(int, parts.WIDTHS)) and len(cases) == 10 * 2 * 2
    assert all(case.tokens % 16 == case.batch % 16 == 0 for case in cases)


def test_operators_of_a_case():
    by_name = {part.name: part.operators for part in PARTS}
    assert by_name["depthwise"]({"mode": "filter_gradient"}) == {"depthwise_conv2d"}
    assert by_name["depthwise"]({"mode": "conv_layer_norm"}) == {"depthwise_conv2d_layer_norm"}
    assert by_name["models"]({"model": "convnextv2_tiny"}) - by_name["models"]({"model": "convnext_tiny"}) == {
        "global_response_norm"
    }
    assert OPERATORS.keys() == parts._of_model({"model": "convnextv2_tiny"})


@pytest.mark.parametrize(
    ("nodeid", "operator"),
    [
        ("tests/ops/test_mlp.py::TestMLP::test_gpu_parity[triton-V1]", "mlp"),
        ("tests/ops/test_response_norm.py::TestGlobalResponseNorm::test_cuda_graph[cuda]", "global_response_norm"),
        ("tests/ops/test_tf32.py::test_gpu_parity[patch_linear 1x3x8x12 to 40, 4x4-triton]", "patch_linear"),
    ],
)
def test_the_operator_of_a_test(nodeid, operator):
    assert gpu_tests.operator_of(nodeid) == operator


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["tests/ops/no_such_file.py::test"], "tests: got 'tests/ops/no_such_file.py::test'; accepted: existing files"),
        (["--minutes", "nan"], "--minutes: got nan; accepted: more than 0"),
    ],
)
def test_a_bad_argument_of_the_gpu_tests_is_named(arguments, text, monkeypatch, capsys):
    monkeypatch.setattr(gpu_tests.pytest, "main", lambda *arguments, **options: 4)
    assert text in refusal(gpu_tests.main, arguments, capsys)


def test_what_tells_most_comes_first():
    names = ["test_offsets_past_32_bits[cuda]", "test_every_published_width_on_a_gpu[40]", "test_cuda_graph[triton]"]
    items = [SimpleNamespace(name=name) for name in (*names, *(f"test_gpu_parity[{i}]" for i in range(9)))]
    gpu_tests.pytest_collection_modifyitems(items)
    order = [item.name for item in items]
    assert order[-2:] == [names[1], names[0]] and names[2] in order[:-2]
    assert order[:-2] != sorted(order[:-2])


def test_a_process_whose_gpu_is_lost_ends(request, monkeypatch):
    """Every later test would fail there."""
    hooks = request.config.pluginmanager.get_plugin(str(ROOT / "tests" / "conftest.py"))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    hooks.pytest_runtest_logfinish()
    monkeypatch.setattr(torch.cuda, "synchronize", Mock(side_effect=RuntimeError("an illegal memory access")))
    monkeypatch.setattr(os, "_exit", Mock(side_effect=SystemExit))
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    with pytest.raises(SystemExit):
        hooks.pytest_runtest_logfinish()
    monkeypatch.delenv("PYTEST_XDIST_WORKER")
    with pytest.raises(pytest.exit.Exception, match="the GPU no more: an illegal memory access"):
        hooks.pytest_runtest_logfinish()


def test_what_failed_is_recorded_until_time_is_up(tmp_path):
    """Tests that pass, fail and are skipped, of which the fourth is one too many."""
    recorder = gpu_tests.Recorder(tmp_path / "tests.json", time.monotonic() + 100)
    report = {"keywords": {}, "location": ("", 0, ""), "longrepr": None}
    mlp = "tests/ops/test_mlp.py::test"
    for when, outcome in [("setup", "passed"), ("call", "passed"), ("call", "failed"), ("setup", "skipped")]:
        recorder.pytest_runtest_logreport(pytest.TestReport(nodeid=mlp, when=when, outcome=outcome, **report))
    recorder.deadline = 0
    with pytest.raises(pytest.exit.Exception):
        recorder.pytest_runtest_logreport(pytest.TestReport(nodeid=mlp, when="call", outcome="passed", **report))
    content = json.loads((tmp_path / "tests.json").read_text())
    assert content["tests"] == {"mlp": {"passed": 2, "skipped": 1, "failed": [mlp]}}
    assert content["unmeasured"] == {"the other tests": "left out for the time"}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--only", "modles"], "--only: got 'modles'; accepted: library, kernels, parity, "),
        (["--minutes", "0"], "--minutes: got 0; accepted: more than 0"),
        (["--json", "/dev/null/record.json"], "File exists: '/dev/null'"),
        (["--json", "/dev/null/record.html"], "--json: got 'record.html'; accepted: a file ending in .json"),
    ],
)
def test_a_bad_argument_is_named(arguments, text, capsys):
    assert text in refusal(main, arguments, capsys)
