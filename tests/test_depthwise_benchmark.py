"""The benchmark of the depthwise convolution: what it checks, what it writes, and what it says without a GPU."""

import json
from dataclasses import replace

import pytest
import torch
from support import refusal

pytest.importorskip("triton")
from benchmarks import depthwise, timing
from benchmarks.depthwise import COPY, NO_BIAS, OPERATIONS, PYTORCH, Case, check, main, run
from benchmarks.kernel_work import Shape
from convnext_kernels.cli.measure import Timing

CPU = torch.device("cpu")
SMALL = Shape(24, 9)
MILLISECONDS = {
    **{COPY: [1.0, 1.0, 2.0], PYTORCH: [8.0, 8.0, 16.0], NO_BIAS: [4.0, 4.0, 4.0], "reference": [2.0, 2.0, 2.0]},
}


@pytest.fixture
def on_a_cpu(monkeypatch):
    """Small shapes on the CPU, the reference beside CUDA, and times that are known; yields which contenders ran."""
    called = []

    def measure(works, inputs, device, rounds, advance):
        called.append((list(works), rounds))
        for work in works.values():
            work(inputs[0])
        return {name: Timing(MILLISECONDS[name]) for name in works}

    for name, value in {"SHAPES": [SMALL], "OURS": ("cuda", "reference"), "find_gpu": lambda: CPU}.items():
        monkeypatch.setattr(depthwise, name, value)
    monkeypatch.setattr(timing, "measure_over", measure)
    return called


def test_measures_what_can_run_and_names_what_cannot(on_a_cpu, tmp_path, capsys):
    path = tmp_path / "depthwise.json"
    assert main(["--quick", "--json", str(path)]) == 0
    content = json.loads(path.read_text())
    two_passes = ("forward", "filter_gradient")
    assert on_a_cpu == [
        ([COPY, PYTORCH, *([NO_BIAS] if name in two_passes else []), "reference"], 5) for name in OPERATIONS
    ]
    assert {"gpu", "device", "driver", "machine", "versions", "commit", "date", "rounds"} <= content.keys()
    rows = {(row["operation"], row["contender"]): row for row in content["results"]}
    assert len(rows) == len(content["results"]) == 4 * len(OPERATIONS) + len(two_passes)
    assert rows["forward", NO_BIAS]["terabytes_per_second"] == pytest.approx(
        rows["forward", COPY]["bytes"] / 4e-3 / 1e12
    )
    assert rows["forward", "cuda"]["failure"].startswith("not available: depthwise_conv2d: backend 'cuda' cannot run")
    ours = rows["forward", "reference"]
    assert (ours["dtype"], ours["batch"], ours["channels"], ours["size"]) == ("bfloat16", 64, 24, 9)
    assert ours["bytes"] == 2 * 2 * 64 * 24 * 81
    assert ours["milliseconds"] == 2.0 and ours["terabytes_per_second"] == pytest.approx(ours["bytes"] / 2e-3 / 1e12)
    # Medians over rounds: of 1/2, 1/2, 2/2 and of 8/2, 8/2, 16/2.
    assert (ours["of_copy"], ours["over_pytorch"]) == (0.5, 4.0)
    assert (ours["of_copy_target"], ours["over_pytorch_target"]) == (0.6, 3)
    assert rows["forward", PYTORCH]["of_copy"] == pytest.approx(1 / 8)
    assert rows["forward", PYTORCH]["of_copy_target"] is None and rows["forward", COPY]["over_pytorch"] is None
    assert rows["layer_norm_backward", "reference"]["bytes"] == 1.5 * ours["bytes"]
    assert rows["filter_gradient", "reference"]["over_pytorch_target"] == 4
    printed = capsys.readouterr().out
    (line,) = [line for line in printed.splitlines() if "reference" in line and "4.00x" in line and " 3x " in line]
    assert [cell.strip() for cell in line.split("│")[1:-1]] == [
        *("64x24x9x9", "reference", "2.0000", "2.0000 - 2.0000", "0.00", "0.50", "0.6", "4.00x", "3x")
    ]
    assert "forward, cuda: not available" in printed


def test_the_arguments_choose(on_a_cpu, tmp_path):
    path = tmp_path / "depthwise.json"
    arguments = ["--only", "forward", "conv_layer_norm", "--dtype", "float32,float16", "--batch", "2", "3"]
    assert main([*arguments, "--json", str(path)]) == 0
    rows = [row for row in json.loads(path.read_text())["results"] if row["contender"] == "reference"]
    assert [(row["operation"], row["dtype"], row["batch"]) for row in rows] == [
        (operation, dtype, batch)
        for dtype in ("float32", "float16")
        for batch in (2, 3)
        for operation in ("forward", "conv_layer_norm")
    ]
    assert on_a_cpu[0][1] == 30


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_reference_passes_parity(operation, dtype):
    assert check(Case(operation, dtype, 4, SMALL), "reference", CPU) is None


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("result", [0, -1])
def test_a_wrong_result_gets_no_time(operation, result, on_a_cpu, monkeypatch, capsys):
    """One element of one result, 2% off."""
    right = OPERATIONS[operation].ours

    def wrong(tensors, backend):
        results = [tensor.clone() for tensor in right(tensors, backend)]
        largest = results[result].abs().argmax()
        values = results[result].flatten()
        values[largest] *= 1.02
        results[result] = values.view(results[result].shape)
        return results

    monkeypatch.setitem(OPERATIONS, operation, replace(OPERATIONS[operation], ours=wrong))
    assert main(["--only", operation, "--dtype", "float32", "--batch", "2"]) == 1
    assert [names for names, _ in on_a_cpu] == [Case(operation, "float32", 2, SMALL).contenders[:-2]]
    assert "parity failed" in capsys.readouterr().out


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_copy_moves_as_many_bytes_as_the_operation(operation):
    """Every image argument once, and of the results those of an image's size."""
    case = Case(operation, "bfloat16", 2, SMALL)
    tensors = case.draw(CPU, seed=0)
    image = case.elements * 2
    results = sum(result.numel() == case.elements for result in run(case, PYTORCH, tensors))
    read = 1 if operation == "input_gradient" else len(case.of.images)  # the input gradient does not read the input
    assert case.bytes == (read + results) * image
    assert tensors["source"].nbytes + tensors["destination"].nbytes == case.bytes
    if case.of.without_bias:
        alone, *_ = run(case, NO_BIAS, tensors)
        with_bias = run(case, PYTORCH, tensors)[0].float()
        bias = 0 if operation == "filter_gradient" else tensors["bias"].view(-1, 1, 1)
        assert (alone + bias).float().allclose(with_bias, rtol=2e-2, atol=2e-2)
    (copied,) = run(case, COPY, tensors)
    assert torch.equal(copied, tensors["source"])


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--batch", "0"], "--batch: got 0"),
        (["--minutes", "0"], "--minutes: got 0; accepted: more than 0"),
        (["--dtype", "float64"], "--dtype: got 'float64'; accepted: float32, float16, bfloat16"),
        (["--only", "pooling"], "--only: got 'pooling'; accepted: forward, "),
        (["--json", "/no/such/folder/file"], "--json: cannot write"),
    ],
)
def test_a_bad_argument_is_named(arguments, text, capsys):
    assert text in refusal(main, arguments, capsys)


def test_without_a_gpu_it_is_said(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert refusal(main, [], capsys) == "depthwise: needs an NVIDIA GPU that PyTorch can use; there is none\n"


@pytest.mark.gpu
def test_on_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(depthwise, "SHAPES", [SMALL])
    path = tmp_path / "depthwise.json"
    assert main(["--quick", "--batch", "2", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["results"]
    assert all(row["milliseconds"] > 0 for row in rows if row["failure"] is None)
    assert {row["contender"] for row in rows if row["failure"] is None} >= {COPY, PYTORCH, "triton"}
