"""Bad arguments: one line on stderr and exit code 2, before any work."""

import os
import sys

import pytest
from support import refusal

from convnext_kernels.cli import bench as bench_command
from convnext_kernels.cli import main


@pytest.fixture
def no_work(monkeypatch):
    def work(*arguments):
        raise AssertionError("work was begun")

    monkeypatch.setattr(bench_command, "run_tasks", work)


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["bench", "--model", "convnext_huge_typo"], "'convnext_huge_typo'"),
        (["bench", "--model", ","], "--model: got nothing"),
        (["bench", "--batch-size", "0"], "--batch-size: got 0"),
        (["bench", "--batch-size", "two"], "--batch-size"),
        (["bench", "--resolution", "31"], "--resolution: got 31"),
        (["bench", "--dtype", "float64"], "--dtype: got 'float64'"),
        (["bench", "--mode", "inference,sleep"], "--mode: got 'sleep'"),
        (["bench", "--runs", "0"], "--runs: got 0"),
        (["bench", "--threads", "0"], "--threads: got 0"),
        (["bench", "--device", "cuda:99"], "--device: got 'cuda:99'"),
        (["bench", "--device", "toaster"], "--device: got 'toaster'"),
        (["bench", "--json", "/no/such/folder/file.json"], "--json: cannot write"),
        (["bench", "--plot", "/no/such/folder/file.png"], "--plot: cannot write"),
        (["bench", "--plot", "picture.docx"], "--plot: got 'picture.docx'"),
        (["bench", "--images", "/no/such/folder"], "--images: got /no/such/folder"),
        (["verify", "--operator", "pooling"], "--operator: got 'pooling'"),
        (["verify", "--dtype", "int8"], "--dtype: got 'int8'"),
        (["verify", "--backend", "metal"], "--backend: got 'metal'"),
        (["verify", "--device", "toaster"], "--device: got 'toaster'"),
        (["verify", "--json", "/no/such/folder/file.json"], "--json: cannot write"),
        (["dance"], "dance"),
        ([], "required"),
    ],
)
def test_a_bad_argument_is_named(arguments, named, capsys, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert named in refusal(main, arguments, capsys)


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_a_folder_in_which_nothing_may_be_written_is_named(option, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: (path, mode) != (tmp_path, os.W_OK))
    path = tmp_path / "file.png"
    assert f"{option}: cannot write {path}; accepted" in refusal(main, ["bench", option, str(path)], capsys)


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("missing", ["sklearn.datasets", "PIL.Image", "matplotlib"])
def test_a_missing_library_is_named_with_the_extra(missing, capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, missing, None)
    message = refusal(main, ["bench", "--device", "cpu", "--plot", str(tmp_path / "picture.png")], capsys)
    assert missing in message and "pip install 'convnext-kernels[bench]'" in message


def test_help_names_the_commands(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"  {command} " in shown for command in ("info", "verify", "bench", "tune"))
