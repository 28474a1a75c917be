"""The command `bench`: parity before speed, the table, JSON and the picture."""

import pytest
import torch
from PIL import Image

from convnext_kernels.cli import bench as bench_command
from convnext_kernels.cli import main, tasks
from convnext_kernels.cli.measure import Timing
from convnext_kernels.cli.tasks import COMPILED, EAGER, OURS


def of(content, contender):
    return [row for row in content["results"] if row["contender"] == contender]


def test_measures_models_and_blocks(bench, tmp_path, capsys):
    picture = tmp_path / "bench.png"
    code, content = bench("--mode", "inference,training", "--mode", "block", "--plot", str(picture))
    assert code == 0 and content["passed"]
    modes = ["inference", "training"]
    modes += [f"block {stage}, {what}" for stage in range(1, 5) for what in ("forward", "forward + backward")]
    assert [row["mode"] for row in of(content, OURS)] == [row["mode"] for row in of(content, EAGER)] == modes
    for row in content["results"]:
        assert len(row["samples"]) == 2 and row["peak_memory_bytes"] > 0
        assert row["images_per_second"] == pytest.approx(2e3 / row["milliseconds"])
        assert row["quartiles"][0] <= row["milliseconds"] <= row["quartiles"][1]
    assert all(row["ratio_to_eager"] == 1 for row in of(content, EAGER))
    assert [check["tensors"] for check in of(content, OURS)[1]["parity"]] == ["output", "gradients"]
    assert content["arguments"]["models"] == ["convnext_atto"] and content["arguments"]["device"] == "cpu"
    assert content["versions"]["torch"] == torch.__version__ and content["machine"]["cpu"]
    assert content["images"] == {"used": ["china.jpg", "flower.jpg"], "skipped": {}}
    assert "commit" in content and content["date"].endswith("+00:00")
    assert "block 4, forward + backward" in capsys.readouterr().out
    assert min(Image.open(picture).size) > 500


def test_an_interrupted_run_keeps_what_it_has(bench, monkeypatch):
    """The first task's results are in the file when the second one is interrupted."""
    measured = []

    def measure(works, *arguments):
        if measured:
            raise KeyboardInterrupt
        return measured.append(works) or {name: Timing([1.0]) for name in works}

    monkeypatch.setattr(bench_command, "measure", measure)
    code, content = bench("--mode", "inference,training")
    assert code == 130 and [(row["mode"], row["contender"]) for row in content["results"]] == [
        ("inference", OURS),
        ("inference", EAGER),
    ]


def test_16_bit_is_compared_with_float32(bench):
    code, content = bench("--model", "convnextv2_atto", "--dtype", "bfloat16", "--runs", "1")
    assert code == 0
    checks = [check for row in of(content, OURS) for check in row["parity"]]
    assert [check["tensors"] for check in checks] == ["output", "output", "gradients"] * 2
    for check in checks:
        assert 0 < check["error"] <= check["limit"] == 1.5 * check["eager_error"] + torch.finfo(torch.bfloat16).eps


def test_an_isotropic_model_has_one_stage(bench):
    code, content = bench("--model", "convnext_isotropic_small", "--mode", "block", "--runs", "1")
    assert code == 0
    isotropic = [row for row in of(content, OURS) if row["model"] == "convnext_isotropic_small"]
    assert [row["mode"] for row in isotropic] == ["block 1, forward", "block 1, forward + backward"]


def spoil(monkeypatch, change):
    """Lets `change` loose on our model."""
    build = tasks.build_models

    def build_spoilt(name, device):
        reference, ours = build(name, device)
        with torch.no_grad():
            change(ours)
        return reference, ours

    monkeypatch.setattr(tasks, "build_models", build_spoilt)


def test_a_wrong_output_gets_no_speed(bench, monkeypatch, capsys, tmp_path):
    spoil(monkeypatch, lambda ours: ours.stages[2][1].gamma.mul_(1.01))
    picture = tmp_path / "bench.png"
    code, content = bench("--mode", "inference", "--plot", str(picture))
    assert code == 1 and not content["passed"] and picture.stat().st_size > 10_000
    (ours,), (eager,) = of(content, OURS), of(content, EAGER)
    assert ours["failure"].startswith("parity failed: output off by")
    assert ours["images_per_second"] is None and ours["ratio_to_eager"] is None
    assert eager["images_per_second"] > 0
    assert "parity failed" in capsys.readouterr().out


def test_a_wrong_gradient_gets_no_speed(bench, monkeypatch):
    """The hook leaves the output as it is and makes the gradient 1% larger."""
    grow = lambda module, arguments, output: output + 0.01 * (output - output.detach())  # noqa: E731
    spoil(monkeypatch, lambda ours: ours.stages[3].register_forward_hook(grow))
    code, content = bench()
    inference, training = of(content, OURS)
    assert code == 1 and inference["failure"] is None
    assert training["failure"].startswith("parity failed: gradients off by")


def test_nan_fails_parity(bench, monkeypatch):
    spoil(monkeypatch, lambda ours: ours.head.bias.fill_(float("nan")))
    code, content = bench("--mode", "inference")
    assert code == 1 and of(content, OURS)[0]["parity"][0]["error"] is None


@pytest.fixture
def no_compiler_state(monkeypatch):
    """Leaves the compiler unimported, which takes seconds."""
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)


@pytest.mark.usefixtures("no_compiler_state")
def test_a_failed_compilation_is_a_row(bench, monkeypatch, capsys):
    def fail(module):
        raise RuntimeError("no C++ compiler\nand more")

    monkeypatch.setattr(torch.nn.Module, "compile", fail)
    code, content = bench("--mode", "inference", "--compile")
    (row,) = of(content, COMPILED)
    assert code == 0 and row["failure"] == "torch.compile failed: RuntimeError: no C++ compiler"
    assert "no C++ compiler" in capsys.readouterr().out


@pytest.mark.usefixtures("no_compiler_state")
def test_a_compiled_contender_is_timed(bench, monkeypatch):
    calls = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: calls.append(module))
    code, content = bench("--mode", "inference", "--compile")
    assert code == 0 and len(calls) == 1
    assert of(content, COMPILED)[0]["ratio_to_eager"] > 0


def test_tf32_setting_is_restored(bench):
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    bench("--mode", "inference", "--runs", "1")
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == before


def test_scales_are_drawn_near_1():
    reference, ours = tasks.build_models("convnextv2_atto", torch.device("cpu"))
    weights = dict(ours.named_parameters())
    for name, parameter in reference.named_parameters():
        assert torch.equal(parameter, weights[name])
        if name.endswith("gamma"):
            assert parameter.min() >= 0.8 and parameter.std() > 0.05
        if name.endswith(("bias", "beta")):
            assert parameter.std() > 0.05


@pytest.mark.gpu
def test_on_a_gpu(tmp_path):
    arguments = ["--model", "convnext_atto", "--batch-size", "4", "--resolution", "64", "--runs", "2", "--no-compile"]
    assert main(["bench", *arguments, "--mode", "inference,training,block", "--json", str(tmp_path / "b.json")]) == 0
