"""Comparing two records of the benchmarks: the spread decides, and what is no record is named."""

import copy
import json

import pytest
from support import refusal

from benchmarks import record
from benchmarks.compare import APPEARED, FASTER, GAINED, LOST, SLOWER, VANISHED, compare, main


def result(contender, middle, lower, upper, **case):
    times = {"milliseconds": middle, "quartiles": [lower, upper], "failure": None}
    return {"case": {"mode": "forward", "dtype": "bfloat16", **case}, "contender": contender, **times, "figures": {}}


def record_of(*results):
    parts = {"mlp": {"state": "done", "results": list(results)}}
    return {"kind": record.KIND, "format": record.FORMAT, "device": "GPU", "date": "2026-01-01", "parts": parts}


BEFORE = record_of(result("triton", 2.0, 1.9, 2.1, channels=96), result("PyTorch", 3.0, 2.9, 3.1, channels=96))


def changed(contender="triton", **entries):
    after = copy.deepcopy(BEFORE)
    (row,) = [row for row in after["parts"]["mlp"]["results"] if row["contender"] == contender]
    row.update(entries)
    return after


def written(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(json.dumps(content))
    return str(path)


@pytest.mark.parametrize(
    ("entries", "verdict"),
    [
        ({"milliseconds": 1.8, "quartiles": [1.7, 1.89]}, FASTER),
        ({"milliseconds": 1.8, "quartiles": [1.7, 1.91]}, None),
        ({"milliseconds": 2.2, "quartiles": [2.11, 2.3]}, SLOWER),
        ({"milliseconds": 2.2, "quartiles": [2.09, 2.3]}, None),
        ({"milliseconds": None, "quartiles": None, "failure": "parity failed: output"}, LOST),
        ({"refused": "parity failed in this run"}, LOST),
    ],
)
def test_the_quartiles_decide(entries, verdict):
    changes = list(compare(BEFORE, changed(**entries)))
    assert [change.verdict for change in changes] == ([verdict] if verdict else [])
    assert all(change.key == ("mlp", "forward, bfloat16, channels 96", "triton") for change in changes)
    assert all(change.is_regression == (verdict in (SLOWER, LOST)) for change in changes)


def test_what_appears_vanishes_and_gains():
    old = record_of(result("triton", 2.0, 1.9, 2.1, channels=96), result("cuda", None, 0, 0, channels=96))
    new = record_of(result("triton", 2.0, 1.9, 2.1, channels=192), result("cuda", 1.0, 1, 1, channels=96))
    changes = {change.key[1:]: change.verdict for change in compare(old, new)}
    assert changes == {
        ("forward, bfloat16, channels 192", "triton"): APPEARED,
        ("forward, bfloat16, channels 96", "triton"): VANISHED,
        ("forward, bfloat16, channels 96", "cuda"): GAINED,
    }


def test_a_peer_that_is_slower_is_no_regression():
    (change,) = compare(BEFORE, changed("PyTorch", milliseconds=4.0, quartiles=[3.9, 4.1]))
    assert change.verdict == SLOWER and not change.is_regression


@pytest.mark.parametrize(("strict", "code"), [([], 0), (["--strict"], 1)])
def test_what_is_printed_and_the_exit_code(strict, code, tmp_path, capsys):
    slower = changed(milliseconds=4.0, quartiles=[3.9, 4.1])
    files = [written(tmp_path, "a.json", BEFORE), written(tmp_path, "b.json", slower | {"device": "other GPU"})]
    assert main([*files, *strict]) == code
    printed = capsys.readouterr().out
    assert "slower 0.50x" in printed and "2 (1.9 to 2.1)" in printed and "4 (3.9 to 4.1)" in printed
    assert "0 faster, 1 slower, 1 within the spread" in printed and "different devices" in printed


@pytest.mark.parametrize("lost", [{"refused": "parity failed"}, {"milliseconds": None, "failure": "out of memory"}])
def test_why_a_time_was_lost_is_printed(lost, tmp_path, capsys):
    files = [written(tmp_path, "a.json", BEFORE | {"driver": "580"}), written(tmp_path, "b.json", changed(**lost))]
    assert main(files) == 0
    printed = capsys.readouterr().out
    assert "lost its time │" in printed and [*lost.values()][-1] in printed
    assert "before: GPU, driver 580, PyTorch None, " in printed and "after:  GPU, PyTorch None, " in printed


def test_the_same_file_has_no_changes(tmp_path, capsys):
    """What has no time is within no spread."""
    path = written(tmp_path, "a.json", record_of(*BEFORE["parts"]["mlp"]["results"], result("cuda", None, 0, 0)))
    assert main([path, path, "--strict"]) == 0
    printed = capsys.readouterr().out
    assert "0 faster, 0 slower, 2 within the spread" in printed and "different devices" not in printed


def test_a_case_in_words():
    case = {"mode": "forward", "autograd": True, "compiled": False, "tokens": 100_352, "drop_path_rate": 0.5}
    assert record.label(case) == "forward, autograd, tokens 100,352, drop path rate 0.5"


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "cannot be read: No such file or directory"),
        ("", "is no JSON, or not all of it"),
        (json.dumps(BEFORE)[:200], "is no JSON, or not all of it"),
        (b"\xff\xfe", "is no JSON, or not all of it"),
        ("[1, 2]", "was not written by python -m benchmarks"),
        ('{"results": []}', "was not written by python -m benchmarks"),
        (json.dumps(BEFORE | {"format": 99}), "has format 99; accepted: 1"),
        (json.dumps(BEFORE | {"parts": 3}), "is damaged"),
        (json.dumps(BEFORE | {"parts": {"mlp": {"state": "done", "results": [{"contender": "a"}]}}}), "is damaged"),
        (json.dumps(record_of(result("triton", 2.0, 1.9, "high"))), "is damaged"),
        (json.dumps(changed(quartiles=None)), "is damaged"),
        (json.dumps(changed(figures={"speedup": 3})), "is damaged"),
        (json.dumps(changed(figures={"speedup": {}})), "is damaged"),
    ],
)
def test_what_is_no_record_is_named(content, text, tmp_path, capsys):
    good, bad = written(tmp_path, "good.json", BEFORE), tmp_path / "bad.json"
    if content is not None:
        bad.write_bytes(content if isinstance(content, bytes) else content.encode())
    for files in ([good, str(bad)], [str(bad), good]):
        assert refusal(main, files, capsys).startswith(f"compare: {bad}: {text}")
