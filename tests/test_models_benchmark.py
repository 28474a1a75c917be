"""The benchmarks of whole models and of the ceilings, on tiny models on a CPU in place of a GPU."""

import json
from dataclasses import replace

import pytest
import torch
from support import refusal

from benchmarks import ceilings, mlp, models, reporting
from benchmarks.models import INFERENCE, INSIDE, LATENCY, STEP, TUNED, Case, Network, check, find_peer, main, tf32
from benchmarks.timing import Measured
from convnext_kernels.cli import measure as measuring
from convnext_kernels.cli import tasks
from convnext_kernels.cli.measure import Timing
from convnext_kernels.cli.tasks import COMPILED, EAGER, OURS

CPU = torch.device("cpu")
LIBRARIES = ["timm eager", "transformers eager"]


@pytest.fixture
def on_a_cpu(monkeypatch):
    """Two models that no other test needs to be large, and eager in place of torch.compile; yields how it is asked."""
    asked = []
    networks = (Network("convnext_atto", 32, 2, 3), Network("convnextv2_atto", 32, 2, 3))
    monkeypatch.setattr(models, "NETWORKS", networks)
    monkeypatch.setattr(reporting, "find_gpu", lambda: CPU)
    monkeypatch.setattr(measuring, "SAMPLE_MILLISECONDS", 0.1)
    monkeypatch.setattr(torch, "compile", lambda module, **options: asked.append(options) or module)
    return asked


def written(path):
    content = json.loads(path.read_text())
    assert content["unmeasured"] == {}
    return {(row["mode"], row["batch"], row["accelerated"], row["contender"]): row for row in content["results"]}


def test_every_contender_is_measured(on_a_cpu, tmp_path):
    for library in ("timm", "transformers"):
        pytest.importorskip(library)
    path = tmp_path / "models.json"
    arguments = ["--model", "convnext_atto", "--dtype", "bfloat16", "--mode", "step", "--rounds", "2"]
    assert main([*arguments, "--json", str(path)]) == 0
    rows = written(path)
    eager = [EAGER, *LIBRARIES, OURS]
    inside = [OURS, *(name for name, library in INSIDE.items() if library in LIBRARIES)]
    assert list(rows) == [
        *((STEP, 3, False, contender) for contender in eager),
        *((STEP, 3, True, contender) for contender in inside),
    ]
    for row in rows.values():
        assert row["failure"] is None and row["milliseconds"] > 0 and row["peak_bytes"] > 0
        rate = row["batch"] / row["milliseconds"] * 1e3
        assert row["figures"]["images/s"]["value"] == pytest.approx(rate)
    figures = rows[STEP, 3, False, OURS]["figures"]
    assert list(figures) == [
        *("images/s", *(f"speedup over {name}" for name in eager[:-1]), f"peak memory over {EAGER}")
    ]
    assert list(rows[STEP, 3, False, EAGER]["figures"]) == ["images/s"]
    for contender in inside[1:]:
        over = rows[STEP, 3, True, contender]["figures"][f"time over {OURS}"]
        assert over["value"] > 0 and over["target"] == {"value": 1.03, "at_most": True}
    assert list(rows[STEP, 3, True, OURS]["figures"]) == ["images/s"]
    assert not on_a_cpu


def test_a_single_image_is_timed_launched_and_from_graphs(on_a_cpu, monkeypatch):
    """What a user waits for: ours from a graph beside eager without one, and beside eager from one."""
    graphed = []
    monkeypatch.setattr(models, "graphed", lambda module, example: graphed.append(example.shape[0]) or module)
    rows = models.measure_case(Case(LATENCY, "convnext_atto", "float32", 1, 32), CPU, 2)
    names = [EAGER, f"{EAGER}, graphed", f"{OURS}, graphed", OURS]
    assert [row.contender for row in rows] == names and graphed == [1, 1]
    assert all(row.failure is None and row.milliseconds > 0 for row in rows)
    for row in rows[2:]:
        assert [figure.name for figure in row.figures] == ["images/s", *(f"speedup over {peer}" for peer in names[:2])]


@pytest.mark.parametrize("inside", [False, True])
def test_a_peer_that_fails_leaves_the_others(inside, monkeypatch):
    def fail(name):
        raise AttributeError("of a version that does not fit")

    monkeypatch.setitem(models.LIBRARIES, "timm eager", fail)
    for library in ("torchvision eager", "transformers eager"):
        monkeypatch.setitem(models.LIBRARIES, library, lambda name: None)
    case = Case(INFERENCE, "convnext_atto", "float32", 1, 32, accelerated=inside)
    _, works, failures = models._prepare(case, CPU)
    assert list(works) == ([OURS] if inside else [EAGER, OURS])
    assert list(failures.values()) == ["AttributeError: of a version that does not fit"]


def test_the_targets_are_those_of_large_batches_in_bfloat16():
    case = Case(INFERENCE, "convnext_tiny", "bfloat16", 256, 224)
    assert case.target(EAGER).value == 3 and case.target("timm eager") is None
    assert replace(case, compiler=TUNED).target(TUNED).value == 2.2
    assert replace(case, mode=STEP).target(COMPILED).value == 1.7
    assert replace(case, mode=LATENCY, batch=1).target(EAGER).value == pytest.approx(1 / 0.35, rel=2e-3)
    for other in ({"dtype": "float16"}, {"resolution": 384}, {"batch": 1}):
        assert replace(case, **other).target(EAGER) is None
    measured = Measured(
        {name: Timing([time]) for name, time in {EAGER: 6.0, OURS: 2.0}.items()}, peaks={EAGER: 100, OURS: 40}
    )
    *_, ours = models.rows_of(replace(case, mode=STEP), measured)
    assert [(figure.name, figure.value, figure.met) for figure in ours.figures[1:]] == [
        (f"speedup over {EAGER}", 3.0, True),
        (f"peak memory over {EAGER}", 0.4, True),
    ]


def test_beside_torch_compile(on_a_cpu, tmp_path, monkeypatch):
    measured = []

    def measure_calls(calls, inputs, device, rounds, **options):
        measured.append(options)
        return Measured({name: Timing([2.0 if name == OURS else 3.0] * rounds) for name in calls})

    monkeypatch.setattr(models, "measure_calls", measure_calls)
    path = tmp_path / "models.json"
    assert main(["--dtype", "bfloat16", "--mode", "step", "--compile", "--rounds", "1", "--json", str(path)]) == 0
    tuned = {"mode": "max-autotune-no-cudagraphs", "dynamic": False}
    default = {"mode": "default", "dynamic": False}
    assert on_a_cpu == [default, tuned, default, tuned]
    rows = json.loads(path.read_text())["results"]
    assert [(row["model"], row["compiler"], row["contender"]) for row in rows] == [
        (network.model, compiler, contender)
        for network in models.NETWORKS
        for compiler in (COMPILED, TUNED)
        for contender in (compiler, OURS)
    ]
    assert rows[1]["figures"][f"speedup over {COMPILED}"]["value"] == 1.5
    assert measured == [{"graphs": False, "peaks": True}] * 4  # training steps are launched as they are


@pytest.mark.parametrize("dtype", ["tf32", "bfloat16", "float32"])
@pytest.mark.parametrize("mode", [INFERENCE, STEP])
def test_a_wrong_model_gets_no_time(mode, dtype):
    case = Case(mode, "convnextv2_atto", dtype, 2, 32)
    with case.precision():
        task = case.task(CPU)
        assert check(task) is None
        task.ours.head.weight.data[:500] *= 1.1
        assert check(task).startswith("parity failed: output off by")


def test_tf32_is_on_within_and_its_parity_allows_for_it(monkeypatch):
    """Ours a thousandth off, as TF32's last bit is, passes in TF32 alone; what it is compared with is float32."""
    matmul, seen = torch.backends.cuda.matmul, []
    task = Case(INFERENCE, "convnext_atto", "tf32", 2, 32).task(CPU)
    task.ours.head.weight.data *= 1 + 5e-4
    task.ours.head.bias.data *= 1 + 5e-4
    results = tasks.Task.results
    monkeypatch.setattr(tasks.Task, "results", lambda *arguments: seen.append(matmul.allow_tf32) or results(*arguments))
    assert not matmul.allow_tf32
    with tf32():
        assert matmul.allow_tf32 and torch.backends.cudnn.allow_tf32 and check(task) is None
        assert seen == [True, True, False] and matmul.allow_tf32
    assert not matmul.allow_tf32 and check(task).startswith("parity failed")


def test_weights_are_as_in_training_and_of_the_right_library():
    for library in ("timm", "torchvision", "transformers"):
        pytest.importorskip(library)
    expected = {"timm eager": "timm", "torchvision eager": "torchvision", "transformers eager": "benchmarks"}
    with torch.device("meta"):
        peers = {name: find_peer(name, "convnext_tiny") for name in models.LIBRARIES}
        assert {name: type(peer).__module__.split(".")[0] for name, peer in peers.items()} == expected
        assert {sum(p.numel() for p in peer.parameters()) for peer in peers.values()} == {28_589_128}
        assert find_peer("torchvision eager", "convnextv2_tiny") is None
        assert find_peer("transformers eager", "convnext_isotropic_small") is None


def test_a_library_that_is_missing_is_named(monkeypatch):
    def missing(name):
        raise ImportError(f"No module named {name!r}\nand more")

    monkeypatch.setattr(models, "import_module", missing)
    assert find_peer("timm eager", "convnext_tiny") == "not available: No module named 'timm'"
    case = Case(INFERENCE, "convnext_atto", "float32", 1, 32)
    _, works, failures = models._prepare(case, CPU)
    assert list(works) == [EAGER, OURS] and list(failures) == list(models.LIBRARIES)


def test_the_first_cases_tell_most():
    def ranks(*arguments):
        cases = models.choose_cases(models._parser().parse_args(arguments))
        return [
            (case.dtype, case.model, case.compiler or ("inside" if case.accelerated else case.mode)) for case in cases
        ]

    eager = ranks()
    assert len(eager) == len(set(eager)) + 5 * 3 * 2  # two networks are there in two resolutions
    first = [(dtype, model) for dtype, model, _ in eager[: 5 * models.TIER]]
    assert {dtype for dtype, _ in first} == {"bfloat16"}
    assert {model for _, model in first} == {network.model for network in models.NETWORKS[: models.TIER]}
    assert [kind for *_, kind in eager[: 5 * models.TIER : models.TIER]] == [
        INFERENCE,
        STEP,
        LATENCY,
        "inside",
        "inside",
    ]
    assert {dtype for dtype, _, _ in eager[20:36]} == {"bfloat16", "float16", "tf32"}
    compiled = ranks("--compile")
    assert compiled[:6] == [("bfloat16", "convnext_tiny", name) for _ in range(3) for name in (COMPILED, TUNED)]
    assert {dtype for dtype, _, _ in compiled[: 6 * len(models.NETWORKS)]} == {"bfloat16"}
    published = {(network.model, network.resolution) for network in models.NETWORKS}
    assert {("convnext_xlarge", 224), ("convnext_large", 384), ("convnext_isotropic_small", 224)} <= published


def test_the_ceilings(monkeypatch, tmp_path):
    for name, value in {"COPY_BYTES": 2**12, "PRODUCT_SIZE": 16}.items():
        monkeypatch.setattr(mlp, name, value)
    monkeypatch.setattr(reporting, "find_gpu", lambda: CPU)
    monkeypatch.setattr(measuring, "SAMPLE_MILLISECONDS", 0.1)
    path = tmp_path / "ceilings.json"
    assert ceilings.main(["--rounds", "2", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["results"]
    units = {"copy": "TB/s", "large product": "TFLOP/s"}
    assert [(row["dtype"], row["contender"]) for row in rows] == [
        (dtype, contender) for dtype in ("bfloat16", "float16") for contender in units
    ]
    for row in rows:
        amount = {"copy": 2 * 2**30, "large product": 2 * 8192**3}[row["contender"]]
        rate = row["figures"][units[row["contender"]]]["value"]
        assert rate == pytest.approx(amount / row["milliseconds"] / 1e9)


@pytest.mark.gpu
def test_on_a_gpu(tmp_path, monkeypatch):
    """Ours in every mode and dtype, from graphs where it should be; and the ceilings."""
    monkeypatch.setattr(models, "NETWORKS", (Network("convnextv2_atto", 64, 8, 8),))
    path = tmp_path / "models.json"
    assert main(["--rounds", "2", "--json", str(path)]) == 0
    ours = [row for row in json.loads(path.read_text())["results"] if row["contender"] == OURS]
    assert len(ours) == 11 and all(row["failure"] is None and row["milliseconds"] > 0 for row in ours)
    assert all(row["no_graphs"] is None and row["peak_bytes"] > 0 for row in ours)
    assert ceilings.main(["--rounds", "2", "--json", str(path)]) == 0
    assert all(row["milliseconds"] > 0 for row in json.loads(path.read_text())["results"])


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--model", "resnet50"], "--model: got 'resnet50'; accepted: "),
        (["--dtype", "float64"], "--dtype: got 'float64'; accepted: bfloat16, float16, tf32, float32"),
        (["--mode", "block"], "--mode: got 'block'; accepted: inference, step"),
    ],
)
def test_a_bad_argument_is_named(arguments, text, capsys):
    assert text in refusal(main, arguments, capsys)
