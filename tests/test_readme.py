"""README.md shows what was measured, and its examples run."""

import json
import re

import pytest

from benchmarks import readme, record

TEXT = readme.README.read_text()
SECTIONS = list(readme.SECTION.finditer(TEXT))
EXAMPLES = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def test_figures_are_those_of_the_results():
    assert {section["kind"] for section in SECTIONS} == {"results", "predicted"}
    assert readme.filled(TEXT) == TEXT


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section["file"])
def test_changed_figures_would_be_seen(section):
    figure = re.search(r"\| (\d+\.\d) \|", section[0])
    changed = TEXT.replace(section[0], section[0].replace(figure[0], f"| {float(figure[1]) + 0.1:.1f} |"))
    assert changed != TEXT
    assert readme.filled(changed) == TEXT


def test_a_record_has_a_table_of_whole_models(tmp_path):
    """Ours alone; what was refused has its reason in place of a speed."""
    figures = {"images/s": {"value": 1234.4}, "speedup over PyTorch eager": {"value": 2.5}}
    row = {"case": {"mode": "inference", "model": "convnext_tiny", "batch": 128}, "contender": "convnext-kernels"}
    row |= {"milliseconds": 2.0, "quartiles": [1.9, 2.1], "figures": figures}
    refused = row | {"figures": {name: {"value": None} for name in figures}, "refused": "parity failed"}
    block = row | {"case": {"mode": "block 1, forward", "model": "convnext_tiny"}}
    results = [row, refused, block, row | {"contender": "PyTorch eager"}]
    content = {"kind": record.KIND, "format": record.FORMAT, "device": "GPU", "driver": "580", "date": "2026-01-02"}
    path = tmp_path / "record.json"
    path.write_text(json.dumps(content | {"parts": {"models": {"state": "done", "results": results}}}))
    assert readme.table("results", path).splitlines()[2:] == [
        "| ours | images/s | beside |",
        "| --- | --: | --- |",
        "| inference, convnext_tiny, batch 128 | 1234 | 2.50x PyTorch eager |",
        "| inference, convnext_tiny, batch 128 | parity failed |  |",
    ]


@pytest.mark.parametrize("content", [None, "{", "{}"])
def test_a_result_that_is_missing_or_damaged_leaves_the_readme(content, tmp_path, monkeypatch, capsys):
    path = tmp_path / "README.md"
    path.write_text(text := "<!-- operators: gpu.json -->\nold\n<!-- end of operators -->\n")
    if content is not None:
        (tmp_path / "gpu.json").write_text(content)
    monkeypatch.setattr(readme, "README", path)
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    assert readme.main() == 2 and path.read_text() == text
    error = capsys.readouterr().err
    assert error.startswith("readme: ") and "gpu.json" in error and error.count("\n") == 1


def test_a_record_has_a_table_of_operators(tmp_path):
    """The fastest of ours in each case, without a time where it was refused."""
    case = {"mode": "forward", "dtype": "bfloat16", "channels": 96}
    row = {"case": case, "contender": "cuda", "milliseconds": 2.0, "quartiles": [1.9, 2.1], "failure": None}
    row["figures"] = {"of copy": {"value": 0.8}, "speedup over PyTorch": {"value": 3.0}}
    slower = row | {"contender": "triton", "milliseconds": 3.0}
    refused = row | {"figures": {"of copy": {"value": None}}, "refused": "parity failed"}
    parts = {"depthwise": [slower, row, row | {"contender": "copy", "milliseconds": 1.0}], "mlp": [refused]}
    content = {"kind": record.KIND, "format": record.FORMAT, "device": "GPU", "driver": "580", "date": "2026-01-02"}
    path = tmp_path / "record.json"
    parts = {name: {"state": "done", "results": results} for name, results in parts.items()}
    path.write_text(json.dumps(content | {"parts": parts}))
    assert readme.table("operators", path).splitlines()[2:] == [
        "| operator | fastest of ours | ms | |",
        "| --- | --- | --: | --- |",
        "| depthwise: forward, bfloat16, channels 96 | cuda | 2 | of copy 0.80, speedup over PyTorch 3.00 |",
        "| mlp: forward, bfloat16, channels 96 | cuda |  | parity failed |",
    ]


def test_two_commands_of_one_line_each():
    section = TEXT.split("## Two commands")[1].split("\n## ")[0]
    blocks = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)
    assert [block.count("\n") for block in blocks] == [1, 1]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.strip().splitlines()[-1][:40])
def test_example_runs(example):
    exec(compile(example, "README.md", "exec"), {})


def test_there_are_examples():
    assert len(EXAMPLES) >= 3
