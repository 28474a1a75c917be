"""The command `tune`: what wins, what is refused, and what is written."""

import json
import re
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from support import refusal

from convnext_kernels.cli import compile_ahead, info, main, output, tune, tune_plan
from convnext_kernels.cli.measure import Timing
from convnext_kernels.cli.workloads import Workload, workloads
from convnext_kernels.ops.common import tuning
from convnext_kernels.ops.common.tuning import Entry, read_table
from convnext_kernels.ops.layer_norm.configs import BACKWARD, FORWARD
from convnext_kernels.variants import VARIANTS

CPU = torch.device("cpu")
GPU = "NVIDIA Test 1"
KEY = (96,)
RULE, FAST, FASTEST, *_ = FORWARD.candidates(KEY)


def workload(tunable=FORWARD, results=None):
    """A kernel that launches nothing; of the configurations in `results` it gives those instead of its input."""

    def call(input):
        result = (results or {}).get(tunable.tried, input)
        if isinstance(result, Exception):
            raise result
        return result

    return Workload(tunable, KEY, "float16", {"input": (4, 96)}, call)


def timer(samples, calls=None):
    """Gives each configuration its samples, and 10 ms in each round to all others."""

    def time(works, inputs, device):
        for config, work in works.items():
            work(inputs[0])
            if calls is not None:
                calls.append(config)
        return {config: Timing(samples.get(config, [10.0, 10.0, 10.0])) for config in works}

    return time


def test_the_fastest_wins():
    outcome = tune.tune_kernel(workload(), CPU, timer({FAST: [8.0, 8.0, 8.0], FASTEST: [5.0, 5.0, 5.0]}))
    assert outcome.entry == Entry(FORWARD.name, "float16", KEY, FASTEST, 2.0)
    assert not outcome.wrong and not outcome.failed


@pytest.mark.parametrize("samples", [[9.0, 5.0, 12.0], [9.9, 9.9, 9.9], [10.0, 10.0, 10.0], [12.0, 12.0, 12.0]])
def test_what_is_within_the_spread_does_not_win(samples):
    """Faster in the median by a ninth, but between 0.8 and 2 times; by a percent; not at all; slower."""
    assert tune.tune_kernel(workload(), CPU, timer({FASTEST: samples})).entry is None


def test_a_machine_that_slows_down_is_no_spread():
    """Both times of a round are those of a slower machine; their ratio is as before."""
    samples = {RULE: [10.0, 20.0, 40.0], FAST: [8.0, 16.0, 32.0]}
    assert tune.tune_kernel(workload(), CPU, timer(samples)).entry.config == FAST


@pytest.mark.parametrize("fault", ["one element", "NaN"])
def test_what_gives_other_results_is_never_timed(fault):
    input = workload().draw(CPU, 0)["input"]
    wrong = input.clone()
    wrong[3, 95] = float("nan") if fault == "NaN" else wrong[3, 95] + 0.05 * wrong.abs().max()
    timed = []
    outcome = tune.tune_kernel(workload(results={FASTEST: wrong}), CPU, timer({FASTEST: [1.0] * 3}, timed))
    assert FASTEST not in timed and RULE in timed and FAST in timed
    assert outcome.entry is None and list(outcome.wrong) == [FASTEST] and "result 0 off by" in outcome.wrong[FASTEST]


def test_rounding_is_no_difference():
    input = workload().draw(CPU, 0)["input"]
    rounded = input * (1 + torch.finfo(torch.float16).eps)
    assert not torch.equal(rounded, input)
    outcome = tune.tune_kernel(workload(results={FASTEST: rounded}), CPU, timer({FASTEST: [5.0] * 3}))
    assert outcome.entry.config == FASTEST


def test_results_are_checked_in_memory_that_holds_nan():
    """What is not written would else hold what another configuration wrote there."""
    poisoned = []

    def call(input):
        poisoned.append(torch.empty(64).isnan().all())
        return input

    tune.tune_kernel(replace(workload(), call=call), CPU, lambda calls, *_: {RULE: Timing([1.0])})
    assert len(poisoned) == len(FORWARD.candidates(KEY)) and all(poisoned)


def test_what_cannot_be_launched_is_left_out():
    failing = workload(results={FAST: RuntimeError("out of shared memory\nand more")})
    outcome = tune.tune_kernel(failing, CPU, timer({FAST: [1.0] * 3, FASTEST: [5.0] * 3}))
    assert outcome.failed == {FAST: "RuntimeError: out of shared memory"} and outcome.entry.config == FASTEST


@pytest.fixture
def options(monkeypatch):
    monkeypatch.setattr(tune, "device_name", lambda device: GPU)
    return tune.Options([], ["float16"], 2.0, CPU, None, False)


def test_the_time_limit_stops_and_keeps_what_was_measured(options, tmp_path):
    """Minutes 0, 0 and 1.9 are before the end, minute 2 is not."""
    minutes, path = iter([0.0, 0.0, 1.9, 2.0]), tmp_path / "table.json"
    plan = [workload(FORWARD), workload(BACKWARD), workload(FORWARD)]
    outcomes = tune.tune(plan, options, path, timer({FAST: [5.0] * 3}), lambda: 60 * next(minutes))
    assert [outcome.workload for outcome in outcomes] == plan[:2]
    assert {entry.kernel for entry in read_table(path, GPU).entries.values()} == {FORWARD.name, BACKWARD.name}


def test_an_interruption_keeps_what_was_measured(options, tmp_path):
    path, measure = tmp_path / "table.json", timer({FAST: [5.0] * 3})

    def interrupted(works, inputs, device):
        if path.exists():
            raise KeyboardInterrupt
        return measure(works, inputs, device)

    with pytest.raises(KeyboardInterrupt):
        tune.tune([workload(FORWARD), workload(BACKWARD)], options, path, interrupted)
    assert [entry.kernel for entry in read_table(path, GPU).entries.values()] == [FORWARD.name]


def test_a_kernel_that_cannot_be_measured_is_not_the_end(options, tmp_path):
    """What an earlier run found for it stays."""
    path, measure, memory = tmp_path / "table.json", timer({FAST: [5.0] * 3}), iter([False, True])
    old = Entry(FORWARD.name, "float16", KEY, FASTEST)
    tune.write_table(path, GPU, [old])

    def out_of_memory(works, inputs, device):
        if not next(memory):
            raise torch.OutOfMemoryError("CUDA out of memory\nand more")
        return measure(works, inputs, device)

    failed, measured = tune.tune([workload(FORWARD), workload(BACKWARD)], options, path, out_of_memory)
    assert failed.failed == {RULE: "OutOfMemoryError: CUDA out of memory"} and failed.entry is None
    assert set(read_table(path, GPU).entries.values()) == {old, measured.entry}


def test_a_folder_that_cannot_be_made_is_named_before_any_work(a_gpu, monkeypatch, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CONVNEXT_KERNELS_TABLES", str(tmp_path / "file" / "tables"))
    monkeypatch.setattr(tune, "tune", None)
    assert "--output names another file" in refusal(main, ["tune"], capsys)


def test_other_entries_stay_and_what_no_longer_wins_goes(options, tmp_path):
    path = tmp_path / "table.json"
    old = [Entry(FORWARD.name, "float16", KEY, FAST), Entry(FORWARD.name, "float32", KEY, FAST)]
    tune.write_table(path, GPU, old)
    tune.tune([workload()], options, path, timer({}))
    assert list(read_table(path, GPU).entries.values()) == [old[1]]


def test_a_table_that_is_not_kept_is_named(options, tmp_path, capsys):
    path = tmp_path / "table.json"
    path.write_text("{")
    tune.tune([workload()], options, path, timer({FAST: [5.0] * 3}))
    assert f"not kept: {path} cannot be read" in capsys.readouterr().err
    table = read_table(path, GPU)
    assert len(table.entries) == 1 and json.loads(path.read_text())["versions"]["torch"] == torch.__version__


def test_a_dry_run_prints_the_plan_and_writes_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("CONVNEXT_KERNELS_TABLES", str(tmp_path))
    assert main(["tune", "--dry-run", "--model", "convnext_tiny", "--dtype", "float16,tf32", "--minutes", "3"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name, tunable in tuning.tunables().items() if "response" not in name)
    assert "response_norm" not in shown and "tf32" in shown
    (plan,) = re.findall(r"(\d+) configurations of \d+ kernels: (\d+) minutes predicted", shown)
    assert int(plan[1]) == round(int(plan[0]) * tune.PREDICTED_SECONDS / 60)
    assert "minutes predicted, of which --minutes allows 3" in shown and not list(tmp_path.iterdir())


def test_what_takes_most_of_the_models_time_comes_first():
    """Of ConvNeXt-T the MLP's; in all models together every kernel of theirs once."""
    tiny = tune_plan.planned([tune_plan.stages_of("convnext_tiny")], ["bfloat16"], CPU)
    assert {workload.tunable.name for workload in tiny[:6]} <= {
        "common.matmul",
        "common.long_matmul",
        "mlp.fused_kernel",
    }
    assert tiny[-1].tunable.name.startswith("layer_norm")
    everything = tune_plan.planned([tune_plan.stages_of(model) for model in VARIANTS], ["bfloat16"], CPU)
    assert {workload.name for workload in tiny} < {workload.name for workload in everything}
    assert len({workload.name for workload in everything}) == len(everything)


def names_of(networks, device=CPU):
    return [workload.name for workload in tune_plan.planned(networks, ["bfloat16"], device)]


def test_all_models_weigh_the_same():
    """However long one of them takes."""
    tiny, isotropic = tune_plan.stages_of("convnext_tiny"), tune_plan.stages_of("convnext_isotropic_small")
    longer = [replace(stage, depth=1000 * stage.depth) for stage in isotropic]
    assert names_of([tiny, isotropic]) == names_of([tiny, longer]) == names_of([longer, tiny])
    assert names_of([tiny, isotropic]) != names_of([[*tiny, *longer]])


def test_what_has_one_configuration_alone_is_not_measured():
    assert len(BACKWARD.candidates((3072,))) == 1
    kernels = {name for name, _, _ in names_of([tune_plan.stages_of_width(3072)])}
    assert FORWARD.name in kernels and BACKWARD.name not in kernels


def test_the_plan_is_that_of_the_device_s_architecture(monkeypatch):
    gpu = torch.device("cuda", 1)
    monkeypatch.setattr(tune_plan, "machine_reasons", lambda *arguments: ())
    monkeypatch.setattr(tune_plan, "architecture", {gpu: 80}.__getitem__)
    keys = [key for kernel, _, key in names_of([tune_plan.stages_of("convnext_tiny")], gpu) if "matmul" in kernel]
    assert {key[-1] for key in keys} == {80}


@pytest.mark.parametrize("reasons", [(), ("it was not built",)], ids=["built", "not built"])
def test_what_the_compiled_library_replaces_comes_last(monkeypatch, reasons):
    tiny, gpu, asked = [tune_plan.stages_of("convnext_tiny")], torch.device("cuda", 0), set()
    monkeypatch.setattr(tune_plan, "machine_reasons", lambda *arguments: asked.add(arguments) or reasons)
    monkeypatch.setattr(tune_plan, "architecture", lambda device: 90)
    names = names_of(tiny, gpu)
    assert asked == {("cuda", gpu, torch.bfloat16, False)}
    in_cuda = [kernel.split(".")[0] not in ("common", "mlp") for kernel, _, _ in names]
    assert 0 < sum(in_cuda) < len(names)
    assert (in_cuda == sorted(in_cuda)) == (not reasons)
    assert (names == names_of(tiny)) == bool(reasons)


def test_the_stages_of_models_and_widths():
    depths, channels, widths = (3, 3, 9, 3), (96, 192, 384, 768), (56, 28, 14, 7)
    tiny = [tune_plan.Stage(*sizes, False) for sizes in zip(depths, channels, widths, strict=True)]
    assert tune_plan.stages_of("convnext_tiny") == tiny
    assert tune_plan.stages_of("convnext_isotropic_small") == [tune_plan.Stage(18, 384, 14, False)]
    assert tune_plan.stages_of_width(2048) == [tune_plan.Stage(1, 2048, 7, False)]
    assert {stage.width for stage in tune_plan.stages_of_width(96)} == {56, 28}
    assert tune_plan.stages_of_width(100) == [tune_plan.Stage(1, 100, 14, True)]


def test_what_is_hopeless_is_not_timed_in_all_rounds(monkeypatch):
    """What is more than 15% slower than the fastest, but for the rule's."""
    milliseconds, rounds_of = {"rule": 9.0, "good": 5.0, "close": 5.5, "slow": 6.0}, []

    def measure(works, inputs, device, rounds, advance):
        rounds_of.append((list(works), rounds))
        return {name: Timing([milliseconds[name]] * rounds) for name in works}

    monkeypatch.setattr(tune, "captured", lambda work: work)
    monkeypatch.setattr(tune, "measure_over", measure)
    timings = tune.time_in_turn(dict.fromkeys(milliseconds, lambda input: None), [None], CPU)
    assert rounds_of == [(list(milliseconds), 2), (["rule", "good", "close"], 9)] and len(timings["good"].samples) == 9


def test_kernels_are_compiled_before_they_are_measured(options, tmp_path):
    order = []

    @contextmanager
    def compiler(plan):
        order.append("begin")
        yield lambda workload: order.append(workload.tunable.name)
        order.append("end")

    def measure(works, inputs, device):
        order.append("measured")
        return {config: Timing([1.0] * 3) for config in works}

    tune.tune([workload(FORWARD), workload(BACKWARD)], options, tmp_path / "table.json", measure, compiler=compiler)
    assert order == ["begin", FORWARD.name, "measured", BACKWARD.name, "measured", "end"]


def test_other_processes_compile_every_candidate(tmp_path, monkeypatch):
    """Into the cache on disk, without a GPU; what cannot be compiled is waited for all the same."""
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compile_ahead.os, "cpu_count", lambda: 2)
    (norm,) = [of for of in workloads((2, *KEY, 3, 3), "float16", 90, grn=False) if of.tunable is BACKWARD]
    broken = replace(norm, tunable=FORWARD, shapes={})
    with compile_ahead.compiled_ahead([norm, broken], 90) as wait_for:
        wait_for(norm)
        assert len(list(tmp_path.glob("*/*.cubin"))) >= len(BACKWARD.candidates(KEY)) > 1
        wait_for(broken)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--model", "resnet"], "--model: got 'resnet'"),
        (["--widths", "96,x"], "--widths: got 'x'"),
        (["--widths", "0"], "--widths: got 0"),
        (["--dtype", "float64"], "--dtype: got 'float64'"),
        (["--minutes", "0"], "--minutes: got 0; accepted: more than 0"),
        (["--minutes", "nan"], "--minutes: got nan"),
        (["--output", "/no/such/folder/table.json"], "--output: cannot write"),
        (["--device", "toaster"], "--device: got 'toaster'"),
        (["--device", "cpu"], "there is no GPU to measure on; --dry-run shows"),
    ],
)
def test_a_bad_argument_is_named(arguments, named, capsys):
    assert named in refusal(main, ["tune", *arguments], capsys)


@pytest.fixture
def a_gpu(monkeypatch):
    """As far as the arguments' check sees."""
    monkeypatch.setattr(tune, "find_device", lambda name: torch.device("cuda", 0))
    monkeypatch.setattr(tune, "find_spec", lambda name: True)
    monkeypatch.setattr(tune, "interpreting", lambda: False)
    monkeypatch.setattr(tune, "device_name", lambda device: GPU)
    monkeypatch.setattr(tune, "architecture", lambda device: 90)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)


@pytest.mark.parametrize(
    ("owner", "name", "value", "message"),
    [
        (torch.cuda, "is_current_stream_capturing", lambda: True, "captured into a CUDA graph"),
        (tune, "interpreting", lambda: True, "TRITON_INTERPRET=1"),
        (tune, "find_spec", lambda name: None, "triton is not installed"),
    ],
)
def test_where_nothing_can_be_timed(a_gpu, monkeypatch, capsys, owner, name, value, message):
    monkeypatch.setattr(owner, name, value)
    assert message in refusal(main, ["tune"], capsys)


@pytest.fixture
def tuned(a_gpu, monkeypatch):
    """The outcomes that a run finds, its device and how it compiles: nothing is launched."""
    found = SimpleNamespace(outcome=tune.Outcome(workload(), Entry(FORWARD.name, "float16", KEY, FAST, 1.25)))

    def measured(plan, options, path, compiler):
        found.compiler = compiler
        return [found.outcome]

    monkeypatch.setattr(torch.cuda, "set_device", lambda device: setattr(found, "device", device))
    monkeypatch.setattr(tune, "planned", lambda *arguments: [workload()])
    monkeypatch.setattr(tune, "tune", measured)
    return found


@pytest.mark.parametrize("wrong", [False, True])
def test_the_exit_code_and_where_it_is_read(tuned, capsys, tmp_path, wrong):
    """Another result of a candidate is a failed check."""
    tuned.outcome = replace(tuned.outcome, wrong={FASTEST: "off"} if wrong else {})
    path = tmp_path / "mine.json"
    assert main(["tune", "--output", str(path)]) == int(wrong)
    captured = capsys.readouterr()
    assert "1.25x" in captured.out and "1 of 1 kernels measured, 1 faster" in captured.out
    assert f"wrote {path}" in captured.err and "it is called nvidia-test-1.json" in captured.err
    assert ("refused: layer_norm.forward_kernel" in captured.out) == wrong


def test_the_user_s_folder_is_made_and_needs_no_word(tuned, capsys, monkeypatch, tmp_path):
    folder = tmp_path / "new" / "tables"
    monkeypatch.setenv("CONVNEXT_KERNELS_TABLES", str(folder))
    assert main(["tune"]) == 0 and folder.is_dir()
    told = capsys.readouterr().err
    assert f"wrote {folder / 'nvidia-test-1.json'}" in told and "it is called" not in told


def test_kernels_are_compiled_for_the_device_and_measured_on_it(tuned, tmp_path):
    assert main(["tune", "--output", str(tmp_path / "mine.json")]) == 0
    assert tuned.device == torch.device("cuda", 0)
    assert (tuned.compiler.func, tuned.compiler.keywords) == (compile_ahead.compiled_ahead, {"architecture": 90})


def test_info_shows_the_table_in_use_and_what_is_ignored(capsys, monkeypatch, tmp_path):
    path = tmp_path / "nvidia-test-1.json"
    monkeypatch.setenv("CONVNEXT_KERNELS_TABLES", str(tmp_path))
    monkeypatch.setattr(output, "PIPE_WIDTH", 1000)  # so that no folder's name is too long for a line
    gpu = {"index": 0, "name": GPU, "capability": [9, 0], "memory_bytes": 2**30, "l2_cache_bytes": 2**20}
    monkeypatch.setattr(info, "machine", lambda: {"cpu": "x", "cores": 1, "threads": 1, "gpus": [gpu]})
    build = {**info.build_info(), "device_code": {"cuda:0": "none"}}
    monkeypatch.setattr(info, "build_info", lambda: build)
    for content, shown in (
        (None, "launches on NVIDIA Test 1  by rule"),
        ([Entry(FORWARD.name, "float16", KEY, FAST)], f"1 measured ({path})"),
        ("{", f"ignored: {path} cannot be read"),
    ):
        if isinstance(content, str):
            path.write_text(content)
        elif content is not None:
            tune.write_table(path, GPU, content)
        tuning.forget_tables()
        assert main(["info"]) == 0
        assert shown in capsys.readouterr().out
    tuning.forget_tables()


@pytest.mark.gpu
def test_on_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("CONVNEXT_KERNELS_TABLES", str(tmp_path))
    tuning.forget_tables()
    assert main(["tune", "--widths", "96", "--dtype", "float16", "--minutes", "0.5"]) == 0
    name = torch.cuda.get_device_name()
    table = read_table(tmp_path / tuning.file_name(name), name)
    assert table.files and not table.problems
    for entry in table.entries.values():
        tunable, input = tuning.tunables()[entry.kernel], torch.empty(0, device="cuda", dtype=torch.float16)
        assert tunable(input, *entry.key) == entry.config and entry.speedup > 1
    tuning.forget_tables()
