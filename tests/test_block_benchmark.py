"""The benchmark of blocks and training steps: counts, checks, verdicts, what it writes, and its run without a GPU."""

import json

import pytest
import torch
from support import refusal

from benchmarks import block, reporting, timing, training_step
from benchmarks.block import BACKWARD, FORWARD, TIMM, Case, check, main, run, timm_block
from benchmarks.training_step import DROPPING, OURS, RECOMPUTING, SAVING, Step
from convnext_kernels.cli import measure as measuring
from convnext_kernels.cli.measure import Timing
from convnext_kernels.cli.tasks import COMPILED, EAGER
from convnext_kernels.model import create_model
from convnext_kernels.reference import ReferenceBlock, create_reference_model

CPU = torch.device("cpu")
MILLISECONDS = {EAGER: 6.0, TIMM: 5.0, COMPILED: 3.0, OURS: 2.0, SAVING: 2.0, RECOMPUTING: 2.5, DROPPING: 1.6}
PEAKS = {EAGER: 1000, TIMM: 800, COMPILED: 500, OURS: 600, SAVING: 600, RECOMPUTING: 400, DROPPING: 300}
SMALL = ["--batch", "3", "--step-batch", "2", "--channels", "96"]
TINY = {"depths": (1, 1), "dims": (8, 16)}


@pytest.fixture
def on_a_cpu(monkeypatch):
    """Maps of 6x6 and networks of two blocks, the CPU in place of a GPU, eager in place of torch.compile."""
    if block.TimmBlock is None:
        pytest.skip("needs a timm that can be imported")
    for builder in (create_model, create_reference_model):
        name = builder.__name__
        monkeypatch.setattr(
            training_step, name, lambda model, build=builder, **options: build(model, **TINY, **options)
        )
    monkeypatch.setattr(block, "SIZES", {96: 6})
    monkeypatch.setattr(block, "RESOLUTION", 32)
    monkeypatch.setattr(reporting, "find_gpu", lambda: CPU)
    monkeypatch.setattr(measuring, "SAMPLE_MILLISECONDS", 0.1)
    monkeypatch.setattr(torch, "compile", lambda module, **options: module)


@pytest.fixture
def known_times(on_a_cpu, monkeypatch):
    """Times and peaks that are known; yields which contenders ran, in how many rounds."""
    called = []

    def measure_calls(calls, inputs, device, rounds, **options):
        called.append((list(calls), rounds, options))
        for call in calls.values():
            call(inputs[0])
        peaks = {name: PEAKS[name] for name in calls} if options.get("peaks") else {}
        return timing.Measured({name: Timing([MILLISECONDS[name]] * 3) for name in calls}, peaks=peaks)

    for module in (block, training_step):
        monkeypatch.setattr(module, "measure_calls", measure_calls)
    return called


def written(path):
    content = json.loads(path.read_text())
    return content, {(row["mode"], row.get("compiled"), row["contender"]): row for row in content["results"]}


def test_counts_of_bytes_and_flops():
    """Forward 10C bytes for each token; 98C operations in the convolution and 16C^2 in the products."""
    case = Case(FORWARD, "bfloat16", 256, 96, 56, False)
    assert case.tokens == 802_816 and case.bytes == 10 * 96 * 802_816
    assert case.flops == (98 * 96 + 16 * 96**2) * 802_816
    assert Case(BACKWARD, "bfloat16", 256, 96, 56, False).flops == 3 * case.flops


def test_the_flops_are_those_of_the_block():
    """PyTorch's own counter, of the eager block; to both a map's padding is pixels like others."""
    from torch.utils.flop_counter import FlopCounterMode

    case = Case(FORWARD, "bfloat16", 2, 24, 9, False)
    modules, tensors = case.modules(CPU), case.draw(CPU, seed=0)
    with FlopCounterMode(display=False) as counter:
        run(case, modules[EAGER], tensors)
    assert counter.get_total_flops() == case.flops


def test_what_is_written_and_the_verdicts(known_times, tmp_path, capsys):
    path = tmp_path / "block.json"
    assert main([*SMALL, "--json", str(path)]) == 0
    graphs = {"peaks": True}
    steps = {"graphs": False, "peaks": True}
    assert known_times == [
        ([EAGER, TIMM, OURS], 12, {"peaks": False}),
        ([EAGER, TIMM, SAVING, RECOMPUTING], 12, graphs),
        ([EAGER, OURS, RECOMPUTING], 12, steps),
        ([OURS, DROPPING], 12, steps),
        ([COMPILED, OURS], 12, {"peaks": False}),
        ([COMPILED, SAVING, RECOMPUTING], 12, graphs),
    ]
    content, rows = written(path)
    assert {"gpu", "device", "driver", "machine", "versions", "commit", "date", "rounds"} <= content.keys()
    assert content["unmeasured"] == {}
    ours = rows[FORWARD, False, OURS]
    assert (ours["batch"], ours["channels"], ours["size"], ours["tokens"]) == (3, 96, 6, 108)
    assert (ours["bytes"], ours["milliseconds"], ours["dtype"]) == (10 * 96 * 108, 2.0, "bfloat16")
    # The fastest of the eager blocks is what counts, and the one of least memory.
    assert ours["figures"] == {
        "speedup over eager": {"value": 2.5, "target": {"value": 3.0, "at_most": False}, "met": False}
    }
    trained = rows[BACKWARD, False, RECOMPUTING]
    assert trained["peak_bytes"] == 400 and trained["figures"] == {
        "speedup over eager": {"value": 2.0, "target": {"value": 2.2, "at_most": False}, "met": False},
        "peak memory over eager": {"value": 0.5, "target": None, "met": None},
    }
    assert rows[BACKWARD, False, SAVING]["figures"]["speedup over eager"]["met"]
    compiled = rows[BACKWARD, True, SAVING]["figures"]["speedup over torch.compile"]
    assert (compiled["value"], compiled["target"]["value"], compiled["met"]) == (1.5, 1.7, False)
    steps = {(row["model"], row["contender"]): row for row in content["results"] if row["mode"] == "training step"}
    memory = {name: steps["convnext_tiny", name]["figures"]["peak memory over eager"] for name in (OURS, RECOMPUTING)}
    assert [(figure["value"], figure["met"]) for figure in memory.values()] == [(0.6, False), (0.4, True)]
    assert memory[OURS]["target"] == {"value": 0.45, "at_most": True}
    dropping = steps["convnext_large", DROPPING]
    assert dropping["drop_path_rate"] == 0.5 and dropping["figures"]["speedup over drop path 0"] == {
        "value": 1.25,
        "target": {"value": 1.15, "at_most": False},
        "met": True,
    }
    printed = capsys.readouterr().out
    assert "2.50 (≥ 3)" in printed and "0.40 (≤ 0.45)" in printed and "1.25 (≥ 1.15)" in printed


@pytest.mark.parametrize("mode", [FORWARD, BACKWARD])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_ours_passes(mode, dtype):
    case = Case(mode, dtype, 2, 40, 7, False)
    modules = case.modules(CPU)
    told = [False, True] if case.backward else [None]
    assert [modules[name].recompute_hidden for name in case.ours] == told
    assert [check(case, modules, name, CPU) for name in case.ours] == [None] * len(case.ours)


def test_timm_s_block_is_the_same(on_a_cpu):
    reference = ReferenceBlock(24, layer_scale_init_value=0.9)
    case = Case(BACKWARD, "bfloat16", 2, 24, 9, False)
    block.randomise(reference)
    input = case.draw(CPU, seed=0)["input"].detach().float()
    assert timm_block(reference)(input).allclose(reference(input), rtol=1e-5, atol=1e-5)


def test_timm_may_be_missing(monkeypatch):
    monkeypatch.setattr(block, "TimmBlock", None)
    case = Case(FORWARD, "bfloat16", 1, 8, 3, False)
    assert case.peers == [EAGER] and TIMM not in case.modules(CPU)


@pytest.mark.parametrize("tensor", ["output", "gradient"])
def test_a_wrong_block_gets_no_time(tensor, known_times, tmp_path, monkeypatch, capsys):
    """The output, or one gradient alone, is a tenth off."""
    right = block.run

    def run(case, module, tensors):
        results = list(right(case, module, tensors))
        if isinstance(module, block.ConvNeXtBlock):
            index = 0 if tensor == "output" else 4
            results[index] = 1.1 * results[index]
        return results

    monkeypatch.setattr(block, "run", run)
    path = tmp_path / "block.json"
    assert main([*SMALL, "--mode", "backward", "--no-compile", "--json", str(path)]) == 1
    assert [names for names, *_ in known_times] == [[EAGER, TIMM]]
    for name in (SAVING, RECOMPUTING):
        row = written(path)[1][BACKWARD, False, name]
        assert row["failure"].startswith("parity failed: result ") and row["milliseconds"] is None
        assert row["figures"] == {} and row["peak_bytes"] is None
    assert "parity failed" in capsys.readouterr().out


def test_a_wrong_model_gets_no_time(known_times, tmp_path, monkeypatch):
    forward = training_step.create_model

    def wrong(*arguments, **options):
        model = forward(*arguments, **options)
        model.head.register_forward_hook(lambda module, arguments, output: 1.1 * output)
        return model

    monkeypatch.setattr(training_step, "create_model", wrong)
    path = tmp_path / "block.json"
    assert main([*SMALL, "--mode", "step", "--no-compile", "--json", str(path)]) == 1
    assert [names for names, *_ in known_times] == [[EAGER], []]
    failures = [row["failure"] for row in written(path)[0]["results"] if row["contender"] != EAGER]
    assert len(failures) == 4 and all(failure.startswith("parity failed: output off by") for failure in failures)


@pytest.mark.parametrize(("name", "told"), [(OURS, None), (RECOMPUTING, True)])
def test_models_recompute_where_told(name, told, on_a_cpu):
    step = Step("convnext_tiny", "bfloat16", 2, 32)
    ours = step.task(name, step.images(CPU)).ours
    assert [module.recompute_hidden for module in ours.modules() if isinstance(module, ReferenceBlock)] == [told] * 2


def test_a_check_of_dropping_drops_the_same_samples(on_a_cpu):
    step = Step("convnext_large", "bfloat16", 8, 32, 0.5)
    task = step.task(DROPPING, step.images(CPU))
    assert [module.drop_path for module in task.ours.modules() if isinstance(module, ReferenceBlock)] == [0, 0.5]
    assert training_step.check(task) is None
    seeded = training_step._seeded(task.contender(task.ours))
    first, second = (seeded(task.inputs) for _ in range(2))
    assert torch.equal(first, second) and not torch.equal(first, task.contender(task.ours)(task.inputs))


def test_a_compiler_that_fails_leaves_the_others(on_a_cpu, tmp_path, monkeypatch):
    def broken(module, **options):
        def fail(_):
            raise RuntimeError("no C++ compiler\nand more")

        module.register_forward_pre_hook(lambda module, arguments: fail(arguments))
        return module

    monkeypatch.setattr(torch, "compile", broken)
    path = tmp_path / "block.json"
    assert main([*SMALL, "--mode", "forward", "--rounds", "1", "--json", str(path)]) == 0
    rows = written(path)[1]
    assert rows[FORWARD, True, COMPILED]["failure"] == "RuntimeError: no C++ compiler"
    assert rows[FORWARD, True, OURS]["milliseconds"] > 0
    assert rows[FORWARD, True, OURS]["figures"]["speedup over torch.compile"]["value"] is None


def test_how_torch_compile_is_asked(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda module, **options: asked.append(options) or module)
    assert COMPILED in Case(FORWARD, "bfloat16", 1, 8, 3, True).modules(CPU)
    assert asked == [{"mode": "max-autotune-no-cudagraphs", "dynamic": False}]


def test_runs_with_the_true_timer(on_a_cpu, tmp_path):
    path = tmp_path / "block.json"
    assert main([*SMALL, "--rounds", "2", "--json", str(path)]) == 0
    content, rows = written(path)
    assert len(content["results"]) == 3 + 4 + 3 + 2 + 2 + 3 and content["unmeasured"] == {}
    assert all(row["milliseconds"] > 0 and len(row["samples"]) == 2 for row in content["results"])
    assert {mode for (mode, *_), row in rows.items() if row["peak_bytes"]} == {BACKWARD, "training step"}


def test_what_takes_too_long_is_left_out(known_times, tmp_path, capsys):
    path = tmp_path / "block.json"
    assert main([*SMALL, "--minutes", "0.1", "--json", str(path)]) == 0
    content, _ = written(path)
    assert {row["mode"] for row in content["results"]} == {FORWARD} and not content["results"][0]["compiled"]
    assert len(content["unmeasured"]) == 5
    assert set(content["unmeasured"].values()) == {"left out for the time: 0.1 minutes"}
    assert "training step, bfloat16, convnext_tiny 2x3x32x32: left out" in capsys.readouterr().out


def test_the_default_fits_in_five_minutes():
    options = block._parser().parse_args([])
    cases = block.choose_cases(options)
    assert len(cases) == 18 and {case.channels for case in cases if not isinstance(case, Step)} == {96, 192, 384, 768}
    assert sum(block.seconds(case, options.rounds) for case in cases) < 60 * options.minutes == 300


def test_without_a_gpu_counts_and_targets(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = tmp_path / "block.json"
    assert main(["--json", str(path)]) == 0
    content, rows = written(path)
    assert content["gpu"] is False and {row["milliseconds"] for row in content["results"]} == {None}
    assert rows[FORWARD, True, OURS]["figures"]["speedup over torch.compile"]["target"]["value"] == 1.2
    printed = capsys.readouterr().out
    assert "there is no NVIDIA GPU" in printed and "(≥ 2.2)" in printed and "(≤ 0.45)" in printed
    assert "770.70" in printed and "125.93" in printed


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--batch", "0"], "--batch: got 0"),
        (["--step-batch", "0"], "--step-batch: got 0"),
        (["--minutes", "0"], "--minutes: got 0; accepted: more than 0"),
        (["--channels", "100"], "--channels: got '100'; accepted: 96, 192, 384, 768, 128"),
        (["--dtype", "float32"], "--dtype: got 'float32'; accepted: bfloat16, float16"),
        (["--mode", "inference"], "--mode: got 'inference'; accepted: forward, backward, step"),
        (["--json", "/no/such/folder/file"], "--json: cannot write"),
    ],
)
def test_a_bad_argument_is_named(arguments, text, capsys):
    assert text in refusal(main, arguments, capsys)


@pytest.mark.gpu
def test_on_a_gpu(tmp_path):
    path = tmp_path / "block.json"
    arguments = ["--batch", "4", "--step-batch", "8", "--channels", "96", "--rounds", "3", "--no-compile"]
    assert main([*arguments, "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["results"]
    assert all(row["failure"] is None and row["milliseconds"] > 0 and row["no_graphs"] is None for row in rows)
