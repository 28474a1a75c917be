"""The benchmark of the MLP: what it counts, what it checks and writes, its verdicts, and what it says without a GPU."""

import json

import pytest
import torch
from support import refusal

from benchmarks import mlp, reporting, timing
from benchmarks.mlp import (
    BACKWARD,
    COPY,
    FORWARD,
    LARGE_PRODUCT,
    PRODUCTS,
    PYTORCH,
    Case,
    check,
    floor_target,
    main,
    run,
    stage_tokens,
)
from convnext_kernels.cli import measure as measuring
from convnext_kernels.cli.measure import Timing

CPU = torch.device("cpu")
OURS = ("cuda", "reference")
CONTENDERS = [COPY, LARGE_PRODUCT, PRODUCTS, PYTORCH, *OURS]
SMALL = ["--channels", "24", "--tokens", "50"]
MILLISECONDS = {COPY: 1.0, LARGE_PRODUCT: 1.0, PRODUCTS: 3.0, PYTORCH: 8.0, "reference": 2.0}


@pytest.fixture
def on_a_cpu(monkeypatch):
    """Small ceilings, the CPU in place of a GPU, the reference beside CUDA."""
    small = {"COPY_BYTES": 2**12, "PRODUCT_SIZE": 32, "PARITY_TOKENS": 33, "OURS": OURS}
    for name, value in small.items():
        monkeypatch.setattr(mlp, name, value)
    monkeypatch.setattr(reporting, "find_gpu", lambda: CPU)
    monkeypatch.setattr(measuring, "SAMPLE_MILLISECONDS", 0.1)


@pytest.fixture
def known_times(on_a_cpu, monkeypatch):
    """Times that are known; yields which contenders ran, in how many rounds."""
    called = []

    def measure(works, inputs, device, rounds, advance):
        called.append((list(works), rounds))
        for work in works.values():
            work(inputs[0])
        return {name: Timing([MILLISECONDS[name], 2 * MILLISECONDS[name], MILLISECONDS[name]]) for name in works}

    monkeypatch.setattr(timing, "measure_over", measure)
    return called


def written(path):
    content = json.loads(path.read_text())
    return content, {(row["mode"], row["contender"]): row for row in content["results"]}


def test_counts_of_bytes_and_flops():
    """6C bytes for each token and the weights' 16C^2; 16C^2 multiplications and additions for each token."""
    case = Case(FORWARD, "bfloat16", 96, 1000)
    assert case.bytes == 6 * 96 * 1000 + 16 * 96**2
    assert case.flops == 16 * 96**2 * 1000
    backward = Case(BACKWARD, "bfloat16", 96, 1000)
    assert backward.bytes == 2 * 6 * 96 * 1000 + 3 * 16 * 96**2
    assert backward.flops == 3 * case.flops


@pytest.mark.parametrize("mode", [FORWARD, BACKWARD])
def test_the_counts_are_those_of_the_tensors(mode):
    """Arguments and results of the bare products, and the multiplications that PyTorch's own counter sees."""
    from torch.utils.flop_counter import FlopCounterMode

    case = Case(mode, "bfloat16", 24, 50)
    tensors = case.draw(CPU, seed=0)
    with FlopCounterMode(display=False) as counter:
        results = run(case, PRODUCTS, tensors)
    assert counter.get_total_flops() == case.flops
    read = ["input", "residual", "weight1", "weight2"]
    if case.backward:
        read += ["grad_output", "input", "weight1", "weight2"]
    assert case.bytes == sum(tensors[name].nbytes for name in read) + sum(result.nbytes for result in results)


def test_tokens_are_those_of_the_models_stages():
    assert stage_tokens(96) == [128 * 56**2, 256 * 56**2]
    assert stage_tokens(192) == [128 * 28**2, 256 * 28**2, 128 * 56**2, 256 * 56**2]
    assert stage_tokens(512) == [128 * 28**2, 256 * 28**2]
    assert stage_tokens(1536) == [100_352]


def test_targets():
    limits = {width: target and target.value for width in mlp.CHANNELS for target in [floor_target(width)]}
    assert limits == {96: 1.6, 128: 1.6, 192: 1.6, 256: None, 384: 1.25, 512: 1.25, 768: 1.25, 1024: 1.25, 1536: 1.25}
    target = floor_target(96)
    assert target.met(1.6) and not target.met(1.61) and not target.met(float("nan"))


def test_what_is_written_and_the_verdicts(known_times, tmp_path, capsys):
    """The floor is what the slower of copy and product allows: here the product, 1 ms for 2 x 32^3 operations."""
    path = tmp_path / "mlp.json"
    assert main([*SMALL, "--json", str(path)]) == 0
    assert known_times == [([COPY, LARGE_PRODUCT, PRODUCTS, PYTORCH, "reference"], 12)] * 2
    content, rows = written(path)
    assert {"gpu", "device", "driver", "machine", "versions", "commit", "date", "rounds", "minutes"} <= content.keys()
    assert content["gpu"] and content["unmeasured"] == {}
    assert list(rows) == [(mode, contender) for mode in (FORWARD, BACKWARD) for contender in CONTENDERS]
    assert rows[FORWARD, "cuda"]["failure"].startswith("not available: mlp: backend 'cuda' cannot run")
    assert rows[FORWARD, "cuda"]["milliseconds"] is None and rows[FORWARD, "cuda"]["figures"] == {}
    ours = rows[FORWARD, "reference"]
    assert (ours["dtype"], ours["channels"], ours["tokens"], ours["milliseconds"]) == ("bfloat16", 24, 50, 2.0)
    assert (ours["bytes"], ours["flops"]) == (6 * 24 * 50 + 16 * 24**2, 16 * 24**2 * 50)
    assert ours["samples"] == [2.0, 4.0, 2.0] and ours["failure"] is None
    floor = max(ours["bytes"] / 2**13, ours["flops"] / (2 * 32**3))
    assert floor == ours["flops"] / (2 * 32**3)
    over_floor = ours["figures"]["time over floor"]
    assert over_floor == {
        "value": pytest.approx(2 / floor),
        "target": {"value": 1.6, "at_most": True},
        "met": True,
    }
    over_products = ours["figures"]["speedup over bare products"]
    assert (over_products["value"], over_products["met"]) == (1.5, True)
    assert ours["figures"]["speedup over PyTorch"] == {"value": 4.0, "target": None, "met": None}
    assert rows[BACKWARD, "reference"]["figures"]["time over floor"]["target"] is None
    assert rows[FORWARD, PYTORCH]["figures"] == {} and rows[FORWARD, PYTORCH]["milliseconds"] == 8.0
    printed = capsys.readouterr().out
    assert "1.50 (≥ 1)" in printed and "0.28 (≤ 1.6)" in printed
    assert "forward, 50 tokens x 24, cuda: not available" in printed


def test_memory_can_be_the_floor_and_a_target_missed(known_times, tmp_path, monkeypatch):
    monkeypatch.setattr(mlp, "PRODUCT_SIZE", 512)
    monkeypatch.setitem(MILLISECONDS, PRODUCTS, 1.5)
    path = tmp_path / "mlp.json"
    assert main([*SMALL, "--mode", "forward", "--json", str(path)]) == 0
    ours = written(path)[1][FORWARD, "reference"]
    figures = ours["figures"]
    assert figures["time over floor"]["value"] == pytest.approx(2 / (ours["bytes"] / 2**13))
    assert [figures[name]["met"] for name in ("time over floor", "speedup over bare products")] == [True, False]


@pytest.mark.parametrize("mode", [FORWARD, BACKWARD])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_reference_passes(mode, dtype, on_a_cpu):
    assert check(Case(mode, dtype, 40, 50), "reference", CPU) is None


@pytest.mark.parametrize("mode", ["forward", "backward"])
def test_a_wrong_result_gets_no_time(mode, known_times, tmp_path, monkeypatch, capsys):
    right = mlp.functional.mlp
    monkeypatch.setattr(mlp.functional, "mlp", lambda *, bias2, **arguments: right(bias2=1.1 * bias2, **arguments))
    path = tmp_path / "mlp.json"
    assert main([*SMALL, "--mode", mode, "--json", str(path)]) == 1
    assert known_times == [([COPY, LARGE_PRODUCT, PRODUCTS, PYTORCH], 12)]
    row = written(path)[1][FORWARD if mode == "forward" else BACKWARD, "reference"]
    assert row["failure"].startswith("parity failed: result 0") and row["milliseconds"] is None
    assert row["figures"] == {}
    assert "parity failed" in capsys.readouterr().out


def test_a_contender_that_raises_leaves_the_others(known_times, tmp_path, monkeypatch):
    """Here it runs out of memory at full size, after its check."""
    right = mlp.run

    def run(case, contender, tensors):
        if contender == "reference" and case.tokens == 50:
            raise torch.OutOfMemoryError("CUDA out of memory\nand more")
        return right(case, contender, tensors)

    monkeypatch.setattr(mlp, "run", run)
    path = tmp_path / "mlp.json"
    assert main([*SMALL, "--mode", "forward", "--json", str(path)]) == 0
    rows = written(path)[1]
    assert rows[FORWARD, "reference"]["failure"] == "OutOfMemoryError: CUDA out of memory"
    assert rows[FORWARD, PYTORCH]["milliseconds"] == 8.0


def test_runs_with_the_true_timer(on_a_cpu, tmp_path):
    path = tmp_path / "mlp.json"
    assert main([*SMALL, "--dtype", "float16", "--rounds", "2", "--json", str(path)]) == 0
    rows = written(path)[1]
    for (_, contender), row in rows.items():
        assert (row["failure"] is None) == (contender != "cuda")
        assert row["failure"] or (row["milliseconds"] > 0 and len(row["samples"]) == 2 and row["dtype"] == "float16")
    assert all(rows[mode, "reference"]["figures"]["time over floor"]["value"] > 0 for mode in (FORWARD, BACKWARD))


def test_it_says_before_what_it_will_do(known_times, capsys):
    main([*SMALL, "--mode", "forward", "--minutes", "3"])
    captured = capsys.readouterr()
    assert (
        "1 cases on " in captured.out and "s by estimate; none is begun that would end after 3 minutes" in captured.out
    )
    assert "0 s  forward, bfloat16, 50 tokens x 24" in captured.err


def test_the_default_fits_in_five_minutes():
    options = mlp._parser().parse_args([])
    cases = mlp.choose_cases(options)
    assert {case.channels for case in cases if case.mode == FORWARD} == set(mlp.CHANNELS)
    assert sum(mlp.seconds(case, options.rounds) for case in cases) < 60 * options.minutes == 300


def test_without_a_gpu_counts_and_targets(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = tmp_path / "mlp.json"
    assert main(["--json", str(path)]) == 0
    content, _ = written(path)
    assert content["gpu"] is False and {row["milliseconds"] for row in content["results"]} == {None}
    (row,) = [row for row in content["results"] if row["mode"] == FORWARD and row["channels"] == 1536]
    assert row["bytes"] == 6 * 1536 * 100_352 + 16 * 1536**2
    assert row["figures"]["time over floor"] == {"value": None, "target": {"value": 1.25, "at_most": True}, "met": None}
    printed = capsys.readouterr().out
    assert "there is no NVIDIA GPU" in printed and "(≤ 1.25)" in printed and "3788.16" in printed


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--tokens", "0"], "--tokens: got 0"),
        (["--channels", "0"], "--channels: got 0"),
        (["--rounds", "0"], "--rounds: got 0"),
        (["--minutes", "0"], "--minutes: got 0; accepted: more than 0"),
        (["--dtype", "float32"], "--dtype: got 'float32'; accepted: bfloat16, float16"),
        (["--mode", "inference"], "--mode: got 'inference'; accepted: forward, backward"),
        (["--json", "/no/such/folder/file"], "--json: cannot write"),
    ],
)
def test_a_bad_argument_is_named(arguments, text, capsys):
    assert text in refusal(main, arguments, capsys)


@pytest.mark.gpu
def test_on_a_gpu(tmp_path):
    path = tmp_path / "mlp.json"
    assert main(["--channels", "96", "384", "--tokens", "5000", "--rounds", "3", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["results"]
    assert all(row["milliseconds"] > 0 and row["no_graphs"] is None for row in rows if row["failure"] is None)
    assert {row["contender"] for row in rows if row["failure"] is None} >= {*MILLISECONDS} - {"reference"} | {"triton"}
