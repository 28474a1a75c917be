"""The pictures and the report of a record: everything is in them, nothing overlaps, nothing comes from elsewhere."""

import copy
import json
import re

import pytest

pytest.importorskip("triton")
pytest.importorskip("matplotlib")
from legible import assert_legible, boxes
from support import refusal
from synthetic_record import SLOWNESS, TUNED_MODELS, gpu_record

from benchmarks import pictures, report
from benchmarks.pictures import PICTURES, best_compiled, draw, fall, measured_ceilings, memory_panels, roofline_points
from benchmarks.record import is_ours, load, refuse, rows
from benchmarks.report import main, page
from convnext_kernels.cli.errors import CommandError
from convnext_kernels.cli.tasks import EAGER, OURS


@pytest.fixture(scope="module")
def record():
    return gpu_record()


@pytest.fixture(scope="module")
def cpu_record():
    """Two tiny models and the blocks of a stage, as `convnext-kernels bench` measures them."""
    content = gpu_record()

    def row(mode, model, contender, over):
        case = {"mode": mode, "model": model, "dtype": "float32", "batch": 2, "resolution": 64}
        figures = {"speedup over PyTorch eager": {"value": over, "target": None, "met": None}} if over else {}
        times = {"milliseconds": 2.0, "quartiles": [1.9, 2.1], "peak_bytes": 70 << 20, "failure": None}
        return {"case": case, "contender": contender, "figures": figures, **times}

    for part in content["parts"].values():
        part["results"] = []
    content["parts"]["cpu_models"]["results"] = [
        row(mode, model, name, over)
        for mode in ("inference", "training")
        for model in ("convnext_atto", "convnextv2_atto")
        for name, over in ((OURS, 0.8), (EAGER, None))
    ]
    content["parts"]["cpu_blocks"]["results"] = [
        row(f"block {stage}, {mode}", "convnext_tiny", OURS, over)
        for stage, over in enumerate((1.7, 0.9, 0.99, 1.0), start=1)
        for mode in ("forward", "forward + backward")
    ]
    return content


@pytest.fixture(scope="module")
def slow_record():
    """Where torch.compile is faster than ours, and our convolution slower than PyTorch's."""
    content = gpu_record()
    for part, row in rows(content):
        if is_ours(row["contender"]) and part == "compiled":
            for name in row["figures"]:
                row["figures"][name]["value"] = 0.4
        if is_ours(row["contender"]) and part == "depthwise":
            row["milliseconds"] *= 5
    return content


def of_parts(*names):
    """A record in which these parts alone were measured."""
    content = gpu_record()
    for name in content["parts"].keys() - set(names):
        content["parts"][name]["results"] = []
    return content


def test_the_roofline_has_every_operator_counted(record):
    points = roofline_points(record)
    cases = {str(row["case"]) for part, row in rows(record) if part in ("depthwise", "mlp", "blocks")}
    backward = [case for case in cases if "forward + backward" in case or "layer_norm_backward" in case]
    assert len(points) == len(cases) - len(backward) and len({point.family for point in points}) == 6
    copy_rate, products = measured_ceilings(record)
    assert (copy_rate, products) == (pytest.approx(4.0), pytest.approx({"bfloat16": 650, "float16": 650}))
    assert all(point.teraflops < min(650, copy_rate * point.intensity) for point in points)
    convolution = next(point for point in points if point.family == "depthwise, forward")
    assert convolution.intensity == 98 / 4


def test_the_fall_adds_up(record):
    found = fall(record)
    assert found.shape == "256x96x56x56, bfloat16" and len(found.savings) == 3
    assert found.eager - sum(found.savings.values()) == pytest.approx(found.ours)
    saved = found.savings["MLP, layer scale\nand residual"]
    of_mlp = [row for part, row in rows(record) if part == "mlp" and row["case"].get("tokens") == 256 * 56**2]
    times = {
        row["contender"]: row["milliseconds"]
        for row in of_mlp
        if row["case"]["channels"] == 96 and row["case"]["mode"] == "forward"
    }
    assert saved == times["PyTorch"] - times["triton"]


def test_compiled_is_the_faster_of_both(record):
    best = best_compiled(record)
    assert len(best) == 3 * 3  # three modes; tiny, and base at two resolutions
    assert {group.split("\n")[0] for _, group, _ in best} == {name.removeprefix("convnext_") for name in TUNED_MODELS}
    ratio = SLOWNESS[OURS] / SLOWNESS["torch.compile max-autotune"]
    assert all(0.85 * ratio < speed < 1.15 * ratio for speed in best.values())


def test_memory_is_that_of_training(record):
    ((title, groups),) = memory_panels(record).items()
    assert title == "training step, bfloat16" and len(groups) == 10
    assert set(groups["V2 tiny\n224 px\nbatch 256"]) == {OURS, EAGER, "timm eager", "transformers eager"}


@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.parametrize("which", ["record", "cpu_record", "slow_record"])
def test_a_picture_is_legible(name, which, request):
    figure = draw(request.getfixturevalue(which), name)
    if which == "cpu_record" and name in ("roofline", "waterfall"):
        assert figure is None
    else:
        assert_legible(figure)
        assert all(axis.get_ylabel() for axis in figure.axes)


@pytest.mark.parametrize("part", ["depthwise", "mlp", "blocks"])
def test_a_roofline_of_one_part_is_legible(part):
    """Both roofs are in it."""
    figure = draw(of_parts("ceilings", part), "roofline")
    assert_legible(figure)
    (axis,) = figure.axes
    heights = axis.lines[0].get_ydata()
    left, right = axis.get_xlim()
    assert heights[0] < heights[1] == heights[2] and list(axis.lines[0].get_xdata())[::2] == [left, right]


@pytest.fixture(scope="module")
def html(record):
    return page(record, {name: b"PNG" for name in PICTURES})


def test_the_report_has_every_table(record, html):
    results = [row for _, row in rows(record)]
    assert html.count('<tr class="ours">') == sum(is_ours(row["contender"]) for row in results) > 200
    tables = {(part, row["case"]["mode"], row["case"]["dtype"]) for part, row in rows(record)}
    assert html.count("<details open>") == len(tables)
    for part, mode, dtype in tables:
        assert f"<h2>{part}</h2>" in html and f"<summary>{mode}, {dtype}</summary>" in html
    figures = {name for row in results for name in row["figures"]}
    assert all(f">{name}</th>" in html for name in figures)
    numbers = (f"{row['milliseconds']:.4g}</td>" for row in results if row["milliseconds"] is not None)
    assert all(number in html for number in numbers)
    assert "there is no such kernel" in html and "inference, tf32, one: left out for the time: 2 minutes" in html
    for entry in ("Invented GPU", "580.1", "clocks.sm 1980", "torch 2.15.0", "0123456789abcdef", "2026-01-02"):
        assert entry in html


def test_what_stands_in_the_tables(record):
    """Numbers with their targets, nothing where nothing was measured, and a column of peaks where there are any."""
    case = {"mode": "forward", "dtype": "bfloat16", "tokens": 100_352, "recompute": True}
    times = {"milliseconds": 2.0, "quartiles": [1.9, 2.1], "failure": None}
    figures = {"time over floor": {"value": 1.5, "target": {"value": 1.6, "at_most": True}, "met": True}}
    ours = {"case": case, "contender": "triton", "figures": figures, **times, "peak_bytes": 70 << 20}
    ours["no_graphs"] = "it synchronises"
    launched = {"case": {**case, "recompute": None}, "contender": "PyTorch", "figures": {}, **times}
    failed = {"case": case, "contender": "cuda", "figures": {}, "failure": "no such kernel", "milliseconds": None}
    other = {"case": {"mode": "backward", "dtype": "bfloat16"}, "contender": "PyTorch", "figures": {}, **times}
    tests = {"mlp": {"passed": 1234, "skipped": 5, "failed": ["a", "b"]}}
    part = {"state": "failed", "reason": "ended with exit code 3", "seconds": 61.5, "tests": tests}
    part["results"] = [ours, launched, failed, other]
    html = page(record | {"driver": None, "parts": {"mlp": part}}, {})
    tables = [
        [re.findall(r">([^<]*)</t[hd]>", line) for line in table.split("</tr>")[:-1]]
        for table in html.split("<table>")[1:]
    ]
    assert ["device", "Invented GPU"] in tables[0] and "driver" not in [line[0] for line in tables[0]]
    assert tables[1:] == [
        [["part", "state", "", "seconds", "results"], ["mlp", "failed", "ended with exit code 3", "61.5", "4"]],
        [["contender", "ms", "quartiles, ms", ""], ["PyTorch", "2", "1.9 to 2.1", ""]],
        [
            ["tokens", "recompute", "contender", "ms", "quartiles, ms", "peak MiB", "time over floor", ""],
            [
                "100,352",
                "True",
                "triton",
                "2",
                "1.9 to 2.1",
                "70",
                "1.5 (≤ 1.6)",
                "without CUDA graphs: it synchronises",
            ],
            ["100,352", "", "PyTorch", "2", "1.9 to 2.1", "", "", ""],
            ["100,352", "True", "cuda", "", "", "", "", "no such kernel"],
        ],
        [["operator", "passed", "skipped", "failed"], ["mlp", "1,234", "5", "2"]],
    ]


def test_the_report_has_every_picture_and_nothing_from_elsewhere(html):
    for name in PICTURES:
        assert f'<figure id="{name}"><img alt=' in html
    assert re.findall(r'src="([^"]*)"', html) == ["data:image/png;base64,UE5H"] * len(PICTURES)
    assert not re.search(r"https?:|url\(|@import|<script|<link|<iframe", html)
    assert "color-scheme: light dark" in html and "prefers-color-scheme: dark" in html


def test_what_is_refused_has_its_reason(record):
    changed = copy.deepcopy(record)
    changed["parity"] = {"mlp": "1 tests failed"}
    results = changed["parts"]["mlp"]["results"]
    changed["parts"]["mlp"]["results"] = [refuse(row, frozenset({"mlp"}), changed["parity"]) for row in results]
    html = page(changed, {})
    assert "No speedup is given for mlp: 1 tests failed" in html
    ours = [row for row in results if row["contender"] == "triton"]
    assert html.count("parity failed in this run, mlp: 1 tests failed") == len(ours) + sum(
        row["contender"] == "cuda" for row in results if not row["failure"]
    )
    section = html.split("<h2>mlp</h2>")[1].split("<h2>")[0]
    speedup = ours[0]["figures"]["speedup over PyTorch"]["value"]
    assert speedup and f">{speedup:,.4g}<" not in section
    assert not [point for point in roofline_points(changed) if point.family == "mlp"] and fall(changed) is None


def test_a_model_that_failed_is_seen_and_one_that_was_planned_is_not(record):
    changed = copy.deepcopy(record)
    for row in changed["parts"]["models"]["results"]:
        wrong = row["case"]["model"] == "convnext_tiny" and row["case"]["dtype"] == "float16"
        row |= {"milliseconds": None, "quartiles": None, "figures": {}, "failure": "parity failed" if wrong else None}
    panels = pictures.speedup_panels(changed)
    assert {group.split("\n")[0] for groups in panels.values() for group in groups} == {"tiny"}
    labels = [text for text, _ in boxes(draw(changed, "speedups")) if text == "none"]
    assert len(labels) == len(panels) == 3
    assert draw(changed, "memory") is None


def test_text_is_escaped(record):
    changed = copy.deepcopy(record)
    changed["device"] = changed["parts"]["mlp"]["results"][0]["contender"] = "<script>alert(1)</script>"
    assert "<script" not in page(changed, {})


def test_the_files(tmp_path, cpu_record, capsys):
    path = tmp_path / "record.json"
    path.write_text(json.dumps(cpu_record))
    assert main([str(path), "--pictures", str(tmp_path / "pictures")]) == 0
    html = path.with_suffix(".html").read_text()
    drawn = sorted(file.name for file in (tmp_path / "pictures").iterdir())
    assert drawn == ["memory.png", "speedups.png"] and html.count("data:image/png;base64,iVBOR") == 2
    assert 'id="roofline">Roofline' in html and "not drawn, it needs the ceilings" in html
    assert "waterfall: not drawn, it needs a block" in capsys.readouterr().err
    assert load(path) == cpu_record


def test_without_matplotlib_the_tables_remain(record, monkeypatch):
    def missing(name):
        raise CommandError("No module named 'matplotlib'")

    monkeypatch.setattr(pictures, "optional", missing)
    drawn = report.pictures(record)
    assert set(drawn.values()) == {"No module named 'matplotlib'"}
    html = page(record, drawn)
    assert html.count("No module named") == len(PICTURES) and "<img" not in html and html.count("<table>") > 20


def test_what_cannot_be_written_is_named(tmp_path, cpu_record, capsys):
    path = tmp_path / "record.json"
    path.write_text(json.dumps(cpu_record))
    assert main([str(path), "--pictures", str(path)]) == 2
    assert f"report: [Errno 17] File exists: '{path}'\n" in capsys.readouterr().err
    missing = str(tmp_path / "missing" / "report.html")
    assert refusal(main, [str(path), "-o", missing], capsys).startswith(f"report: --output: cannot write {missing}")


def test_what_is_no_record_is_named(tmp_path, capsys):
    path = tmp_path / "foreign.json"
    path.write_text('{"results": []}')
    assert refusal(main, [str(path)], capsys) == f"report: {path}: was not written by python -m benchmarks\n"
    assert not path.with_suffix(".html").exists()
