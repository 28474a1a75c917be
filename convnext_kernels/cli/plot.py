"""The picture of a benchmark: the photographs on the left, images per second on the right."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convnext_kernels.cli.errors import CommandError, optional
from convnext_kernels.cli.images import Photographs
from convnext_kernels.cli.machine import device_name
from convnext_kernels.cli.tasks import COMPILED, EAGER, OURS

if TYPE_CHECKING:
    from convnext_kernels.cli.bench import Options, Row

COLOURS = {OURS: "#d1495b", EAGER: "#9aa5b1", COMPILED: "#3d5a80"}
"""Ours stands out; the three differ in lightness too, so that they survive a grey print."""

STYLE = {
    "font.size": 12,
    "axes.titlesize": 13,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "ytick.left": False,
    "xtick.bottom": False,
}

MAXIMUM_PHOTOGRAPHS = 3


def check_format(path: Path) -> None:
    """Raises `CommandError` where matplotlib is missing or cannot write such a file."""
    optional("matplotlib").use("Agg")
    accepted = optional("matplotlib.figure").Figure().canvas.get_supported_filetypes()
    if path.suffix.lstrip(".").lower() not in accepted:
        raise CommandError(f"--plot: got {path.name!r}; accepted: a file ending in .{', .'.join(sorted(accepted))}")


def draw(path: Path, rows: Sequence[Row], options: Options, photographs: Photographs) -> None:
    """Writes the picture: one panel for whole models and one for the blocks of each, whichever were measured."""
    panels: dict[str, list[Row]] = {}
    for row in rows:
        title = f"Blocks of {row.model}" if row.mode.startswith("block") else "Whole models"
        panels.setdefault(title, []).append(row)
    groups = max(len(_groups(of_panel)) for of_panel in panels.values())
    with optional("matplotlib").rc_context(STYLE):
        size = (max(11.0, 4.0 + 1.7 * groups), 1.2 + 4.4 * len(panels))
        figure = optional("matplotlib.figure").Figure(figsize=size, layout="constrained")
        left, right = figure.subfigures(1, 2, width_ratios=(3.2, size[0] - 3.2))
        _draw_photographs(left, photographs)
        axes = right.subplots(len(panels), 1, squeeze=False)[:, 0]
        for axis, (title, of_panel) in zip(axes, panels.items(), strict=True):
            _draw_bars(axis, of_panel)
            if len(panels) > 1:
                axis.set_title(title, loc="left", weight="bold")
        models = ", ".join(options.models)
        figure.suptitle(
            f"{models}: {options.dtype}, batch {options.batch_size} at {options.resolution} x {options.resolution}\n"
            f"{device_name(options.device)}"
        )
        figure.savefig(path, dpi=160)


def _draw_photographs(figure: Any, photographs: Photographs) -> None:
    shown = list(photographs.images.items())[:MAXIMUM_PHOTOGRAPHS]
    axes = figure.subplots(len(shown), 1, squeeze=False)[:, 0]
    for axis, (name, image) in zip(axes, shown, strict=True):
        axis.imshow(image)
        axis.set_title(name, fontsize=10)
        axis.set_axis_off()
    more = len(photographs.images) - len(shown)
    if more:
        axes[-1].text(0.5, -0.04, f"and {more} more", transform=axes[-1].transAxes, ha="center", va="top", fontsize=10)


def _groups(rows: Sequence[Row]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((row.model, row.mode) for row in rows))


def _quartiles(row: Row) -> tuple[float, float]:
    """Images per second at the slow and at the fast quartile of time."""
    fast, slow = row.quartiles or (math.nan, math.nan)
    batch = (row.images_per_second or math.nan) * (row.milliseconds or math.nan)
    return batch / slow, batch / fast


def _short(speed: float) -> str:
    """No wider than a bar: labels of neighbours would meet."""
    scaled, unit = (speed / 1e6, "M") if speed >= 1e6 else (speed / 1e3, "k") if speed >= 1e4 else (speed, "")
    return f"{scaled:,.{0 if scaled >= 100 else 1}f}{unit}"


def _draw_bars(axis: Any, rows: Sequence[Row]) -> None:
    groups = _groups(rows)
    contenders = [name for name in COLOURS if any(row.contender == name for row in rows)]
    width = 0.8 / len(contenders)
    top = max((_quartiles(row)[1] for row in rows if row.failure is None), default=1.0)
    for row in rows:
        index = contenders.index(row.contender)
        x = groups.index((row.model, row.mode)) + (index - (len(contenders) - 1) / 2) * width
        if row.failure is not None or row.images_per_second is None:
            axis.text(x, 0, " failed", rotation=90, ha="center", va="bottom", color=COLOURS[row.contender])
            continue
        slow, fast = _quartiles(row)
        error = [[row.images_per_second - slow], [fast - row.images_per_second]]
        axis.bar(
            x,
            row.images_per_second,
            width * 0.92,
            color=COLOURS[row.contender],
            yerr=error,
            error_kw={"ecolor": "#333333", "elinewidth": 1, "capsize": 3},
        )
        label = f"{_short(row.images_per_second)}\n{row.ratio_to_eager:.2f}x"
        weight = "bold" if row.contender == OURS else "normal"
        axis.text(x, fast + 0.015 * top, label, ha="center", va="bottom", fontsize=10, weight=weight)
    axis.yaxis.set_major_formatter("{x:,.10g}")
    several = len({model for model, _ in groups}) > 1
    labels = [(f"{model}\n" if several else "") + mode.replace(", ", "\n") for model, mode in groups]
    axis.set_xticks(range(len(groups)), labels)
    axis.set_xlim(-0.55, len(groups) - 0.45)
    axis.set_ylim(0, 1.2 * top)
    axis.set_ylabel("images per second")
    axis.grid(axis="y", color="#e3e6ea")
    axis.legend(
        handles=[_swatch(name) for name in contenders],
        loc="lower right",
        bbox_to_anchor=(1.0, 1.0),
        ncols=len(contenders),
        frameon=False,
    )


def _swatch(contender: str) -> Any:
    return optional("matplotlib.patches").Patch(color=COLOURS[contender], label=contender)
