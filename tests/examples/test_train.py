"""examples/train.py as it is called: what it writes, resumes and refuses."""

import random
import signal
from multiprocessing import active_children
from pathlib import Path
from traceback import clear_frames

import pytest
import torch
import train
from launch import python, stop_at, torchrun
from training import data
from training.files import CsvLog, read_log, replacing
from training.learner import Learner
from training.loop import FAILED, REFUSED, STOPPED
from training.processes import Processes

from convnext_kernels import load_checkpoint
from convnext_kernels.model import ConvNeXt

TINY = [
    *("--depths", "1", "1", "--dims", "8", "16", "--resolution", "8", "--batch-size", "256", "--device", "cpu"),
    *("--epochs", "3", "--warmup", "1", "--crop-scale", "0.5", "1"),
]
"""Six steps an epoch, of which the last is smaller."""

ALL_RANDOM = ["--drop-path", "0.3", "--mixup", "0.8", "--cutmix", "1", "--rand-augment", "9", "--random-erasing", "0.3"]


def run(output: Path, *options: str) -> int:
    return train.main([*TINY, "--output", str(output), *options])


def state_of(output: Path) -> dict:
    return torch.load(output / "last.pt")


def assert_identical(got: object, expected: object) -> None:
    """Nested dictionaries and lists of tensors and numbers, bit by bit."""
    if isinstance(expected, torch.Tensor):
        assert torch.equal(got, expected)
    elif isinstance(expected, dict):
        assert got.keys() == expected.keys()
        for key, value in expected.items():
            assert_identical(got[key], value)
    elif isinstance(expected, list | tuple):
        assert len(got) == len(expected)
        for a, b in zip(got, expected, strict=True):
            assert_identical(a, b)
    else:
        assert got == expected


def figures(path: Path) -> list[dict[str, str]]:
    """The rows of a log without speeds."""
    return [{name: value for name, value in row.items() if name != "images_per_second"} for row in read_log(path)]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "whole"
    assert run(output, *ALL_RANDOM) == 0
    return output


def test_logs_and_checkpoints(uninterrupted):
    steps, epochs = read_log(uninterrupted / "steps.csv"), read_log(uninterrupted / "epochs.csv")
    assert [int(row["step"]) for row in steps] == list(range(1, 19))
    assert [int(row["epoch"]) for row in steps] == [0] * 6 + [1] * 6 + [2] * 6
    assert float(steps[5]["lr"]) == 2e-3 and float(steps[-1]["lr"]) < 1e-4
    assert [int(row["step"]) for row in epochs] == [6, 12, 18]
    names = sorted(path.name for path in uninterrupted.iterdir())
    assert names == [".lock", "best.pt", "epochs.csv", "last.pt", "steps.csv"]
    best = torch.load(uninterrupted / "best.pt")
    assert best["accuracy"] == max(float(row[f"{kind}accuracy"]) for row in epochs for kind in ("", "ema_"))
    model = ConvNeXt((1, 1), (8, 16), num_classes=10, layer_scale_init_value=1.0)
    assert load_checkpoint(model, uninterrupted / "best.pt").format == "official"
    assert load_checkpoint(model, uninterrupted / "last.pt").format == "official"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_ended_by_a_signal_and_resumed_is_the_same(uninterrupted, tmp_path, number):
    step = random.randint(4, 11)
    options = [*TINY, *ALL_RANDOM, "--output", str(tmp_path), "--save-every", "3", "--workers", "1"]
    process = python("examples/train.py", *options)
    errors = stop_at(process, tmp_path, step, number)
    assert process.returncode == (-number if number == signal.SIGKILL else STOPPED + number), errors
    logged, saved = len(read_log(tmp_path / "steps.csv")), state_of(tmp_path)["step"]
    assert step <= logged < 18
    # It may have been killed between a row and its checkpoint.
    expected = {logged // 3 * 3, (logged - 1) // 3 * 3} if number == signal.SIGKILL else {logged}
    assert saved in expected, f"signalled after step {step}"
    assert run(tmp_path, *ALL_RANDOM, "--resume") == 0
    assert_identical(state_of(tmp_path), state_of(uninterrupted))
    assert_identical(torch.load(tmp_path / "best.pt"), torch.load(uninterrupted / "best.pt"))
    for log in ("steps.csv", "epochs.csv"):
        assert figures(tmp_path / log) == figures(uninterrupted / log)


def test_a_run_stopped_while_it_is_evaluated_and_resumed_is_the_same(uninterrupted, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        read = data.ValidationImages.__getitem__
        patch.setattr(
            data.ValidationImages, "__getitem__", lambda *key: signal.raise_signal(signal.SIGINT) or read(*key)
        )
        assert run(tmp_path, *ALL_RANDOM) == STOPPED + signal.SIGINT
    assert state_of(tmp_path)["step"] == 6 and read_log(tmp_path / "epochs.csv") == []
    assert run(tmp_path, *ALL_RANDOM, "--resume") == 0
    assert_identical(state_of(tmp_path), state_of(uninterrupted))
    assert figures(tmp_path / "epochs.csv") == figures(uninterrupted / "epochs.csv")


def test_a_finished_run_is_resumed_without_a_change(uninterrupted):
    before = state_of(uninterrupted)
    assert run(uninterrupted, *ALL_RANDOM, "--resume") == 0
    assert_identical(state_of(uninterrupted), before)
    assert len(read_log(uninterrupted / "epochs.csv")) == 3


def test_digits_are_learnt(tmp_path):
    assert train.main(["--output", str(tmp_path), "--epochs", "8", "--device", "cpu"]) == 0
    assert float(read_log(tmp_path / "epochs.csv")[-1]["accuracy"]) >= 0.95


SAME = ["--drop-path", "0", "--ema", "0", "--epochs", "1"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run of nothing but plain PyTorch."""
    output = tmp_path_factory.mktemp("plain")
    assert run(output, *SAME, "--kernels", "off") == 0
    return output


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        (["--kernels", "on"], 1e-4),
        (["--accumulate", "3"], 1e-4),
        (["--checkpoint-activations"], 1e-4),
        (["--compile", "aot_eager"], 1e-4),
        (["--amp", "bf16"], 0.02),
        (["--amp", "fp16"], 0.02),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_that_change_no_more_than_rounding(plain, tmp_path, options, tolerance):
    assert run(tmp_path, *SAME, *options) == 0
    got, expected = (
        [[float(row[name]) for name in ("loss", "gradient_norm")] for row in read_log(folder / "steps.csv")]
        for folder in (tmp_path, plain)
    )
    torch.testing.assert_close(torch.tensor(got), torch.tensor(expected), rtol=tolerance, atol=0)


def test_two_processes_are_stopped_and_one_goes_on(plain, tmp_path):
    """The losses are those of one process; those of the last, smaller batch differ, for two take no odd number."""
    options = [*SAME, "--epochs", "2", "--save-every", "1"]
    process = torchrun("examples/train.py", *TINY, *options, "--output", str(tmp_path))
    errors = stop_at(process, tmp_path, step=3)
    assert process.returncode == 1 and "got signal: 15" in errors and "train.py" not in errors, errors
    done = state_of(tmp_path)["step"]
    assert 3 <= done == len(read_log(tmp_path / "steps.csv"))
    assert run(tmp_path, *options, "--resume") == 0
    rows, expected = read_log(tmp_path / "steps.csv"), read_log(plain / "steps.csv")
    assert len(rows) == 12
    for row, other in zip(rows[:5], expected, strict=False):
        assert float(row["loss"]) == pytest.approx(float(other["loss"]), rel=1e-4)


def test_the_resolution_changes_between_epochs(tmp_path):
    assert run(tmp_path, "--resolution", "8", "16@1", "--epochs", "2", "--compile", "aot_eager") == 0
    assert len(read_log(tmp_path / "epochs.csv")) == 2


def test_fine_tuning(uninterrupted, tmp_path, capsys):
    weights = state_of(uninterrupted)["model"]
    weights |= {"head.weight": torch.randn(7, 16), "head.bias": torch.randn(7)}
    torch.save({"model": weights}, tmp_path / "official.pth")
    options = ["--init", str(tmp_path / "official.pth"), "--drop-path", "0.8", "--freeze", "1", "--layer-decay", "0.7"]
    assert run(tmp_path / "run", *options, "--epochs", "1") == 0
    assert "official checkpoint: 28 parameters loaded; ignored: head.weight, head.bias" in capsys.readouterr().out
    tuned = state_of(tmp_path / "run")["model"]
    changed = {name for name, value in weights.items() if not torch.equal(tuned[name], value)}
    assert "stages.1.0.dwconv.weight" in changed
    assert not {name for name in changed if name.startswith(("stages.0.", "downsample_layers.0."))}


@pytest.fixture
def folder(tmp_path):
    """Two classes of digits: 24 images for training, 4 for validation."""
    for part, count in (("train", 12), ("val", 2)):
        digits = data.Digits(part == "train")
        for label in ("0", "1"):
            (tmp_path / part / label).mkdir(parents=True)
            for index in range(count):
                digits[index][0].save(tmp_path / part / label / f"{index}.png")
    return tmp_path


def run_folder(folder: Path, *options: str) -> int:
    """Six steps an epoch, of four images."""
    small = ["--batch-size", "4", "--workers", "0", "--log-every", "1", "--model", "convnext_atto"]
    return run(folder / "run", *small, "--data", str(folder), *options)


def test_an_unreadable_image_stops_the_run_after_it_was_saved(folder, capsys):
    (_, index), *_ = next(data.TrainingOrder(24, 4, seed=0).steps(2, 3))
    broken = Path(data.open_data(str(folder))[0].samples[index][0])
    whole = broken.read_bytes()
    broken.write_bytes(b"no image")
    assert run_folder(folder) == FAILED
    message = capsys.readouterr().err
    assert f"image {broken} cannot be read: cannot identify image" in message and message.count("\n") == 1
    assert state_of(folder / "run")["step"] == len(read_log(folder / "run" / "steps.csv")) == 2
    broken.unlink()
    assert run_folder(folder, "--resume") == REFUSED
    assert "last.pt is of another run: images is 23 here and 24 there" in capsys.readouterr().err
    broken.write_bytes(whole)
    assert run_folder(folder, "--resume") == 0
    assert len(read_log(folder / "run" / "steps.csv")) == 18


def test_a_run_is_not_resumed_with_other_classes(folder, capsys):
    assert run_folder(folder) == 0
    for part in ("train", "val"):
        (folder / part / "1").rename(folder / part / "-1")
    assert run_folder(folder, "--resume") == REFUSED
    last = folder / "run" / "last.pt"
    assert capsys.readouterr().err == f"train.py: --data: got -1 as class 0; accepted: 0, as in {last}\n"
    state = torch.load(last)
    assert state.pop("class_names") == ["0", "1"]
    torch.save(state, last)
    assert run_folder(folder, "--resume") == 0


def test_an_unreadable_image_for_validation_stops_the_run_until_it_is_there(folder):
    broken = folder / "val" / "1" / "0.png"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:100])
    for again in ([], ["--resume"]):
        assert run_folder(folder, *again) == FAILED
        assert state_of(folder / "run")["step"] == len(read_log(folder / "run" / "steps.csv")) == 6
    broken.write_bytes(whole)
    assert run_folder(folder, "--resume") == 0
    assert len(read_log(folder / "run" / "epochs.csv")) == 3


def fail(*_: object, **__: object) -> None:
    raise RuntimeError("unable to allocate")


def test_images_that_find_no_shared_memory_stop_the_run(folder, capsys, monkeypatch):
    monkeypatch.setattr(data, "default_collate", fail)
    assert run_folder(folder) == FAILED
    assert "--workers: got no memory for an image; accepted: fewer, 0, or a larger" in capsys.readouterr().err


def test_workers_end_with_a_run_that_fails(folder, monkeypatch):
    """One that is left, and ignores SIGTERM, would keep the process from its exit."""
    monkeypatch.setattr(Learner, "evaluate", lambda _, batches: [fail() for _ in batches])
    with pytest.raises(RuntimeError) as failure:
        run_folder(folder, "--workers", "1")
    left = active_children()
    clear_frames(failure.tb)  # else pytest would not end either
    assert str(failure.value) == "unable to allocate" and not left


@pytest.mark.parametrize("log_every", ["1", "100"])
def test_a_loss_that_is_no_number_stops_the_run_and_is_not_saved(tmp_path, capsys, log_every):
    options = ["--lr", "1e30", "--warmup", "0", "--log-every", log_every, "--save-every", "2"]
    assert run(tmp_path, *options) == FAILED
    assert "the loss is nan, the norm of its gradients nan at step 2;" in capsys.readouterr().err
    assert not (tmp_path / "last.pt").exists()


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, capsys, monkeypatch):
    save, saved = torch.save, []

    def save_once(state, path):
        if saved:
            path.write_bytes(b"half")
            raise RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 94656 vs 94576")
        saved.append(path)
        save(state, path)

    monkeypatch.setattr(torch, "save", save_once)
    assert run(tmp_path, "--save-every", "2") == FAILED
    assert "last.pt cannot be written, is the disk full?" in capsys.readouterr().err
    assert state_of(tmp_path)["step"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "epochs.csv", "last.pt", "steps.csv"]


def test_a_folder_is_for_one_run_at_a_time(tmp_path, capsys):
    code = "import pathlib, sys, time; from training.files import claim; lock = claim(pathlib.Path(sys.argv[1]))"
    process = python("-c", f"{code}; print('claimed', flush=True); time.sleep(100)", str(tmp_path))
    try:
        process.stdout.readline()
        assert run(tmp_path) == REFUSED
        assert f"--output: another run is writing into {tmp_path}" in capsys.readouterr().err
    finally:
        process.kill()
        process.wait()
    assert run(tmp_path, "--epochs", "1") == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch-size", "2000"], "--batch-size: got 2000; accepted: at most 1437, the images for training"),
        (["--resolution", "8", "4@2"], "--resolution: got 4; accepted: at least 8, the model's stride"),
        (["--freeze", "2"], "--freeze: got 2; accepted: less than 2, the model's stages"),
        (["--data", "nowhere"], "nowhere/train"),
        (["--init", "nowhere.pth"], "nowhere.pth"),
        (["--fsdp"], "--fsdp: got a process that torchrun did not start"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refused_before_the_start(tmp_path, capsys, options, message):
    assert run(tmp_path / "run", *options) == REFUSED
    error = capsys.readouterr().err
    assert error.startswith("train.py: ") and message in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_batch_that_the_processes_do_not_divide_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert run(tmp_path / "run") == REFUSED
    assert "--batch-size: got 256; accepted: a multiple of 3, the number of processes" in capsys.readouterr().err


def test_nodes_that_do_not_share_the_folder_are_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Processes, "highest", lambda self, value: max(value, 6))
    assert run(tmp_path / "run") == REFUSED
    assert f"other processes see another {tmp_path / 'run' / 'last.pt'}" in capsys.readouterr().err


def test_more_processes_than_gpus_are_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert run(tmp_path / "run", "--device", "cuda") == REFUSED
    assert "--nproc-per-node: got more than 2; accepted: at most one process for each GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "holds a run already; accepted: --resume, or another folder"),
        (["--resume"], "last.pt is of another run: drop_path is 0.05 here and 0.3 there, "),
        (["--resume", *ALL_RANDOM, "--depths", "1", "2"], "depths is [1, 2] here and [1, 1] there"),
    ],
    ids=["no --resume", "other recipe", "other model"],
)
def test_a_run_is_not_overwritten_by_another(uninterrupted, capsys, options, message):
    before = {path: path.read_bytes() for path in uninterrupted.iterdir()}
    assert run(uninterrupted, *options) == REFUSED
    assert message in capsys.readouterr().err
    assert {path: path.read_bytes() for path in uninterrupted.iterdir()} == before


@pytest.mark.parametrize("content", [b"", b"no checkpoint", "weights"], ids=["empty", "no checkpoint", "weights"])
def test_a_file_that_holds_no_run_is_not_resumed(tmp_path, capsys, content):
    if content == "weights":
        torch.save({"model": {}}, tmp_path / "last.pt")
    else:
        (tmp_path / "last.pt").write_bytes(content)
    assert run(tmp_path, "--resume") == REFUSED
    assert str(tmp_path / "last.pt") in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--epochs", "0"], "argument --epochs: got 0; accepted: int in [1, inf)"),
        (["--epochs", "2.5"], "argument --epochs: invalid int value: '2.5'"),
        (["--drop-path", "1"], "argument --drop-path: got 1; accepted: float in [0, 1)"),
        (["--lr", "nan"], "argument --lr: got nan; accepted: float in (0, inf)"),
        (["--betas", "0.9", "1"], "argument --betas: got 1; accepted: float in [0, 1)"),
        (["--rand-augment", "11"], "argument --rand-augment: got 11; accepted: int in [0, 10]"),
        (["--seed", "-1"], "argument --seed: got -1; accepted: int in [0, 4294967295]"),
        (["--crop-scale", "1", "0.5"], "--crop-scale: got [1.0, 0.5]; accepted: the smaller one first"),
        (["--epochs", "5", "--warmup", "5.5"], "--warmup: got 5.5; accepted: at most 5, the epochs"),
        (["--min-lr", "1"], "--min-lr: got 1; accepted: at most 0.002, the learning rate"),
        (["--resolution", "8@1"], "--resolution: got epoch 1 as the first; accepted: R, or R@0 among others"),
        (["--compile", "nosuch"], "--compile: got nosuch; accepted: "),
        (["--resume"], "--resume: got no --output; accepted: with the folder of the run"),
        (["--model", "resnet"], "argument --model: invalid choice: 'resnet'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_that_argparse_refuses(capsys, options, message):
    with pytest.raises(SystemExit) as refusal:
        train.parse(options)
    assert refusal.value.code == REFUSED
    assert f"error: {message}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "warmup"),
    [
        (["--epochs", "1"], 1),
        (["--epochs", "5"], 2),
        (["--data", "folder", "--epochs", "5"], 5),
        (["--data", "folder"], 20),
        (["--epochs", "5", "--warmup", "4"], 4),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_warmup_that_was_not_given_is_no_longer_than_the_run(options, warmup):
    assert train.parse(options).warmup == warmup


def test_a_file_is_replaced_wholly_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    path.write_text("before")
    with pytest.raises(KeyError), replacing(path) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]
    with replacing(path) as temporary:
        temporary.write_text("after")
    assert path.read_text() == "after" and list(tmp_path.iterdir()) == [path]


def test_a_log_is_taken_up_where_the_checkpoint_stands(tmp_path):
    path = tmp_path / "log.csv"
    log = CsvLog(path, ("step", "loss"), before=1)
    for step in (1, 2, 3):
        log.add(step=step, loss=0.5)
    with path.open("a") as file:
        file.write("4")
    CsvLog(path, ("step", "loss"), before=3).add(step=3, loss=0.25)
    assert path.read_text().split() == ["step,loss", "1,0.5", "2,0.5", "3,0.25"]
    CsvLog(None, ("step",), before=1).add(step=1)
