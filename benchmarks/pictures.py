"""The pictures of a record of `python -m benchmarks`: roofline, speedups, memory, and where a block's time went."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.mlp import COPY, LARGE_PRODUCT
from benchmarks.record import Record, is_ours, rows
from convnext_kernels.cli.errors import optional
from convnext_kernels.cli.plot import STYLE
from convnext_kernels.cli.tasks import EAGER

GRID, INK, OURS_COLOUR = "#e3e6ea", "#333333", "#d1495b"
PALETTE = (OURS_COLOUR, "#3d5a80", "#e0a03c", "#6a994e", "#9aa5b1")
"""Told apart by lightness too."""

OVER_EAGER = f"speedup over {EAGER}"
MOST_LEVEL_LABELS = 12
"""Beyond so many bars their numbers stand upright."""

DTYPES = ("bfloat16", "float16", "tf32", "float32")
MODELS_PARTS, COMPILED_PART = ("models", "cpu_models", "cpu_blocks"), "compiled"
TRAINING = ("training step", "training")

Result = dict[str, Any]


def value(row: Result, figure: str) -> float | None:
    """A figure of a result, None where it was not measured or was refused."""
    return row["figures"].get(figure, {}).get("value")


def timed(record: Record, *parts: str) -> Iterator[Result]:
    """The results of some parts that have a time."""
    for part, row in rows(record):
        if part in parts and row.get("milliseconds") is not None and "refused" not in row:
            yield row


def fastest(results: Sequence[Result]) -> Result | None:
    """The fastest of ours."""
    ours = [row for row in results if is_ours(row["contender"])]
    return min(ours, key=lambda row: row["milliseconds"], default=None)


def _by_case(results: Iterator[Result]) -> Iterator[list[Result]]:
    cases: dict[str, list[Result]] = {}
    for row in results:
        cases.setdefault(str(row["case"]), []).append(row)
    yield from cases.values()


@dataclass(frozen=True)
class Point:
    """An operator in the roofline."""

    family: str
    channels: int
    intensity: float  # operations for each byte
    teraflops: float


def roofline_points(record: Record) -> list[Point]:
    """The fastest of ours in every case whose bytes and operations were counted."""
    points = []
    for family in ("depthwise", "mlp", "blocks"):
        for results in _by_case(timed(record, family)):
            row = fastest(results)
            if row and row.get("flops") and row.get("bytes"):
                mode = f"{family}, {row['case']['mode'].replace('_', ' ')}" if family == "depthwise" else family
                intensity, rate = row["flops"] / row["bytes"], row["flops"] / row["milliseconds"] / 1e9
                if row["case"]["mode"] != "forward + backward":
                    points.append(Point(mode, row["case"]["channels"], intensity, rate))
    return points


def measured_ceilings(record: Record) -> tuple[float, dict[str, float]]:
    """TB/s of the copy, and TFLOP/s of the product by dtype."""
    results = list(timed(record, "ceilings"))
    copies = [value(row, "TB/s") for row in results if row["contender"] == COPY]
    products = {row["case"]["dtype"]: value(row, "TFLOP/s") for row in results if row["contender"] == LARGE_PRODUCT}
    return max((rate for rate in copies if rate), default=0.0), {name: rate for name, rate in products.items() if rate}


def roofline(record: Record, figure: Any) -> None:
    """Operators between the roofs that a copy and a product of the same run set."""
    points, (copy, products) = roofline_points(record), measured_ceilings(record)
    axis = figure.subplots()
    top = max(products.values())
    knee = top / copy
    intensities = [knee, *(point.intensity for point in points)]
    xs = [min(intensities) / 3, max(intensities) * 3]
    axis.plot([xs[0], knee, xs[1]], [copy * xs[0], top, top], color=INK, linewidth=1.5)
    middle = (xs[0] * knee) ** 0.5
    beside = {"textcoords": "offset points", "color": INK, "ha": "left", "va": "top"}
    axis.annotate(f"copy: {copy:.2f} TB/s", (middle, copy * middle), (8, 0), **beside)
    names = ", ".join(f"{dtype} {rate:.0f}" for dtype, rate in products.items())
    axis.text(xs[1], top * 1.06, f"large product, TFLOP/s: {names}", color=INK, ha="right", va="bottom")
    families = sorted({point.family for point in points})
    for index, (family, marker) in enumerate(zip(families, "Pos^Dv", strict=False)):
        of_family = [point for point in points if point.family == family]
        apart = 1.0 if family in ("mlp", "blocks") else 0.88 + 0.08 * index
        x, y = [apart * point.intensity for point in of_family], [point.teraflops for point in of_family]
        look = {"s": 64, "marker": marker, "color": [*PALETTE, INK][index], "edgecolor": "white", "linewidth": 0.6}
        axis.scatter(x, y, label=family, zorder=3, **look)
        if family in ("mlp", "blocks"):
            _label_widths(axis, of_family, above=family == "blocks")
    axis.set(xscale="log", yscale="log", xlim=xs, ylim=(None, top * 1.8))
    axis.set_xlabel("operations for each byte that must pass through memory")
    axis.set_ylabel("TFLOP/s")
    axis.grid(color=GRID, which="major")
    axis.legend(loc="lower right", frameon=False, fontsize=10)


def _label_widths(axis: Any, points: Sequence[Point], above: bool) -> None:
    """Channels beside the outermost point of each width."""
    for channels in {point.channels for point in points}:
        outermost = max if above else min
        point = outermost((p for p in points if p.channels == channels), key=lambda p: p.teraflops)
        offset, side = ((0, 6), "bottom") if above else ((0, -7), "top")
        at = (point.intensity, point.teraflops)
        axis.annotate(str(channels), at, offset, textcoords="offset points", ha="center", va=side, fontsize=8)


def _panel(case: dict[str, Any]) -> str:
    """What is drawn together: single images apart from batches, blocks apart from models."""
    if case["mode"].startswith("block"):
        return f"blocks of {case['model']}, batch {case['batch']}"
    return f"{case['mode']}, one image" if case["batch"] == 1 else case["mode"]


def _group(case: dict[str, Any]) -> str:
    """A model in short lines; of a block its stage."""
    if case["mode"].startswith("block"):
        return case["mode"].replace(", ", "\n").replace(" + ", " +\n")
    name = case["model"].removeprefix("convnext_").replace("convnextv2_", "V2 ").replace("_", " ")
    return f"{name}\n{case['resolution']} px\nbatch {case['batch']}"


Groups = dict[str, dict[str, Result]]
"""By group of a panel and then by what its bars are."""


def _panels(results: Iterator[Result], bar: Callable[[Result], str]) -> dict[str, Groups]:
    panels: dict[str, Groups] = {}
    for row in results:
        case = row["case"]
        panels.setdefault(_panel(case), {}).setdefault(_group(case), {}).setdefault(bar(row), row)
    return panels


def _draw_bars(
    axis: Any,
    groups: Groups,
    bars: Sequence[str],
    height: Callable[[Result], float | None],
    text: str,
    least: float = 0,
) -> None:
    """Bars side by side in each group, each with its number; colours are those of `bars`, the axis reaches `least`."""
    width = 0.84 / len(bars)
    top = max([least, *(height(row) or 0 for of_group in groups.values() for row in of_group.values())]) or 1
    upright = {"rotation": 90 if len(groups) * len(bars) > MOST_LEVEL_LABELS else 0, "zorder": 4}
    paper = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
    for x, of_group in enumerate(groups.values()):
        for index, name in enumerate(bars):
            if name not in of_group:
                continue
            at = x + (index - (len(bars) - 1) / 2) * width
            tall = height(of_group[name])
            axis.bar(at, tall or 0, width * 0.92, color=PALETTE[index % len(PALETTE)])
            label = "none" if tall is None else text.format(tall)
            place = {"ha": "center", "va": "bottom", "fontsize": 8, "bbox": paper, **upright}
            axis.text(at, (tall or 0) + 0.02 * top, label, **place)
    axis.set_xticks(range(len(groups)), list(groups), fontsize=9)
    axis.set_xlim(-0.6, len(groups) - 0.4)
    axis.set_ylim(0, 1.28 * top)
    axis.grid(axis="y", color=GRID)


def _bars_of(panels: dict[str, Groups], order: Sequence[str] = ()) -> list[str]:
    """What bars there are in any panel, those of `order` first."""
    found = dict.fromkeys(name for groups in panels.values() for of_group in groups.values() for name in of_group)
    return [*(name for name in order if name in found), *(name for name in found if name not in order)]


def _legend(figure: Any, names: Sequence[str], extra: Sequence[Any] = ()) -> None:
    patch = optional("matplotlib.patches").Patch
    handles = [patch(color=PALETTE[index % len(PALETTE)], label=name) for index, name in enumerate(names)]
    figure.legend(handles=[*handles, *extra], loc="outside upper right", ncols=len(names) + 1, frameon=False)


def speedup_panels(record: Record) -> dict[str, Groups]:
    """Ours of whole models and blocks by dtype; what failed or was refused too, so that it is seen."""
    ours = (row for part, row in rows(record) if part in MODELS_PARTS and is_ours(row["contender"]))
    beside_eager = (row for row in ours if not row["case"].get("accelerated"))
    tried = (row for row in beside_eager if row.get("milliseconds") is not None or row.get("failure"))
    return _panels(tried, lambda row: row["case"]["dtype"])


def best_compiled(record: Record) -> dict[tuple[str, str, str], float]:
    """By panel, group and dtype: how much faster than ours torch.compile was, at its best, in its own cases."""
    best: dict[tuple[str, str, str], float] = {}
    for row in timed(record, COMPILED_PART):
        over = [figure["value"] for name, figure in row["figures"].items() if name.startswith("speedup over")]
        key = (_panel(row["case"]), _group(row["case"]), row["case"]["dtype"])
        if is_ours(row["contender"]) and over and over[0]:
            best[key] = max(best.get(key, 0.0), 1 / over[0])
    return best


def speedups(record: Record, figure: Any) -> None:
    """Ours over eager PyTorch, by model and dtype; a black line is torch.compile where it was measured."""
    panels, compiled = speedup_panels(record), best_compiled(record)
    dtypes = _bars_of(panels, DTYPES)
    axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    width = 0.84 / len(dtypes)
    for axis, (title, groups) in zip(axes, panels.items(), strict=True):
        levels = {
            (x, dtypes.index(dtype)): ours * compiled[title, group, dtype]
            for x, (group, of_group) in enumerate(groups.items())
            for dtype, row in of_group.items()
            if (ours := value(row, OVER_EAGER)) and (title, group, dtype) in compiled
        }
        _draw_bars(axis, groups, dtypes, lambda row: value(row, OVER_EAGER), "{:.2f}x", max([1, *levels.values()]))
        axis.axhline(1, color=INK, linewidth=1)
        for (x, index), level in levels.items():
            at = x + (index - (len(dtypes) - 1) / 2) * width
            axis.plot([at - 0.55 * width, at + 0.55 * width], [level] * 2, color="black", linewidth=2.5)
        axis.set_title(title, loc="left", weight="bold")
        axis.set_ylabel("speed over eager")
    line = optional("matplotlib.lines").Line2D([], [], color="black", linewidth=2.5, label="best torch.compile")
    _legend(figure, dtypes, [line] if compiled else [])


def memory_panels(record: Record) -> dict[str, Groups]:
    """Peaks of training in the first dtype that was measured, by contender."""
    beside_eager = (row for row in timed(record, *MODELS_PARTS) if not row["case"].get("accelerated"))
    training = [row for row in beside_eager if row["case"]["mode"] in TRAINING and row.get("peak_bytes")]
    dtype = next((dtype for dtype in DTYPES if any(row["case"]["dtype"] == dtype for row in training)), None)
    of_dtype = (row for row in training if row["case"]["dtype"] == dtype)
    return {f"{title}, {dtype}": groups for title, groups in _panels(of_dtype, lambda row: row["contender"]).items()}


def memory(record: Record, figure: Any) -> None:
    """The peak of memory in a training step, by model and contender."""
    panels = memory_panels(record)
    names = _bars_of(panels)
    names.sort(key=lambda name: not is_ours(name))
    axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axis, (title, groups) in zip(axes, panels.items(), strict=True):
        largest = max(row["peak_bytes"] for of_group in groups.values() for row in of_group.values())
        unit, size = ("GiB", 2**30) if largest >= 2**30 else ("MiB", 2**20)
        _draw_bars(axis, groups, names, lambda row, size=size: row["peak_bytes"] / size, "{:.3g}")
        axis.set_title(title, loc="left", weight="bold")
        axis.set_ylabel(f"peak memory, {unit}")
    _legend(figure, names)


@dataclass(frozen=True)
class Fall:
    """A block's time from eager to ours: what each fused operator takes off, by itself, and what is left to explain."""

    shape: str
    eager: float
    ours: float
    savings: dict[str, float]


def _times(record: Record, part: str, peer: str, **case: Any) -> tuple[float, float] | None:
    """Milliseconds of a peer and of the fastest of ours in one case."""
    results = [row for row in timed(record, part) if case.items() <= row["case"].items()]
    theirs, ours = [row for row in results if row["contender"] == peer], fastest(results)
    return (theirs[0]["milliseconds"], ours["milliseconds"]) if theirs and ours else None


def fall(record: Record) -> Fall | None:
    """Of the first block that was measured whole and in its parts, forward."""
    for row in timed(record, "blocks"):
        case = row["case"]
        if case["mode"] != "forward" or case.get("compiled"):
            continue
        same = {key: case[key] for key in ("dtype", "batch", "channels", "size")}
        tokens = {"dtype": case["dtype"], "channels": case["channels"], "tokens": case["batch"] * case["size"] ** 2}
        block = _times(record, "blocks", EAGER, mode="forward", compiled=False, **same)
        convolution = _times(record, "depthwise", "PyTorch", mode="conv_layer_norm", **same)
        mlp = _times(record, "mlp", "PyTorch", mode="forward", **tokens)
        if block and convolution and mlp:
            savings = {
                "convolution and\nLayerNorm": convolution[0] - convolution[1],
                "MLP, layer scale\nand residual": mlp[0] - mlp[1],
            }
            savings["the rest: layouts,\nwhat overlaps"] = block[0] - block[1] - sum(savings.values())
            shape = "{batch}x{channels}x{size}x{size}, {dtype}".format(**same)
            return Fall(shape, *block, savings)
    return None


def waterfall(record: Record, figure: Any) -> None:
    """A block's forward from eager PyTorch to ours: what each part saves where it is timed by itself."""
    found = fall(record)
    if found is None:
        raise ValueError("record: no block was measured whole and in parts")
    axis, level = figure.subplots(), found.eager
    bars = [("eager block", 0.0, found.eager, PALETTE[-1])]
    for name, saving in found.savings.items():
        bars.append((name, level - saving, saving, PALETTE[3] if saving >= 0 else PALETTE[2]))
        level -= saving
    bars.append(("our block", 0.0, found.ours, OURS_COLOUR))
    for x, (_, bottom, height, colour) in enumerate(bars):
        axis.bar(x, height, 0.62, bottom=bottom, color=colour)
        whole = x in (0, len(bars) - 1)
        text = f"{height:.3f} ms" if whole else f"{-height:+.3f} ms"
        axis.text(x, max(bottom, bottom + height) + 0.01 * found.eager, text, ha="center", va="bottom")
        if x + 1 < len(bars):
            edge = height if x == 0 else bottom
            axis.plot([x + 0.31, x + 0.69], [edge] * 2, color=INK, linewidth=0.8)
    axis.set_xticks(range(len(bars)), [name for name, *_ in bars])
    axis.set_ylabel("milliseconds")
    axis.set_ylim(0, 1.12 * max(max(bottom, bottom + height) for _, bottom, height, _ in bars))
    axis.grid(axis="y", color=GRID)
    axis.set_title(f"Forward of a block, {found.shape}", loc="left", weight="bold")


@dataclass(frozen=True)
class Picture:
    """A picture, what it shows in words, and what must have been measured for it."""

    title: str
    draw: Callable[[Record, Any], None]
    has_data: Callable[[Record], Any]
    needs: str
    size: Callable[[Record], tuple[float, float]]


PICTURES = {
    "roofline": Picture(
        "Roofline: our operators under the ceilings of the same run (the convolution's points are set slightly apart)",
        *(roofline, lambda record: roofline_points(record) and all(measured_ceilings(record))),
        *("the ceilings, and the convolution, the MLP or blocks, on a GPU", lambda record: (10.5, 6.5)),
    ),
    "speedups": Picture(
        "Speed over eager PyTorch by model and dtype",
        *(speedups, speedup_panels, "whole models or blocks"),
        lambda record: (12.0, 0.8 + 3.1 * len(speedup_panels(record))),
    ),
    "memory": Picture(
        "Peak of memory in a training step beyond what is allocated before it",
        *(memory, memory_panels, "training steps with their peaks"),
        lambda record: (12.0, 0.8 + 4.0 * len(memory_panels(record))),
    ),
    "waterfall": Picture(
        "Where a block's time went: eager PyTorch to ours, by what each part saves when timed by itself",
        *(waterfall, fall, "a block, and its convolution and MLP at the same shape, on a GPU"),
        lambda record: (10.5, 5.0),
    ),
}


def draw(record: Record, name: str) -> Any:
    """A picture as matplotlib's Figure, or None where the record has not what it needs."""
    picture = PICTURES[name]
    if not picture.has_data(record):
        return None
    with optional("matplotlib").rc_context(STYLE):
        figure = optional("matplotlib.figure").Figure(figsize=picture.size(record), layout="constrained")
        picture.draw(record, figure)
    return figure
