"""README.md shows what was measured, and its examples run."""

import re

import pytest

from benchmarks import readme

TEXT = readme.README.read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def test_figures_are_those_of_the_results():
    assert readme.SECTION.search(TEXT)
    assert readme.filled(TEXT) == TEXT


def test_changed_figures_would_be_seen():
    section = readme.SECTION.search(TEXT)
    figure = re.search(r"\| (\d+\.\d) \|", section[0])
    changed = TEXT.replace(figure[0], f"| {float(figure[1]) + 0.1:.1f} |")
    assert changed != TEXT
    assert readme.filled(changed) == TEXT


def test_two_commands_of_one_line_each():
    section = TEXT.split("## Two commands")[1].split("\n## ")[0]
    blocks = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)
    assert [block.count("\n") for block in blocks] == [1, 1]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.strip().splitlines()[-1][:40])
def test_example_runs(example, capsys):
    exec(compile(example, "README.md", "exec"), {})


def test_there_are_examples():
    assert len(EXAMPLES) >= 3
