"""Draws runs of examples/train.py on the same data beside each other: loss, accuracy, and how far losses are apart.

    python examples/plot_training.py --plot training.png "plain PyTorch=runs/off" "this package=runs/on"

Differences are those from the first run's loss at each step, in units of it and of float32's precision.
"""

from __future__ import annotations

import argparse
from itertools import cycle
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from training.files import read_log

STYLES = (
    {"color": "#9aa5b1", "linewidth": 5},
    {"color": "#d1495b", "linewidth": 1.6},
    {"color": "#3d5a80", "linewidth": 1.6, "linestyle": (0, (1, 2))},
)
"""Of the first run, which is wide so that the next ones may lie upon it, and of the others."""

Curves = dict[str, list[float]]


def named_folder(text: str) -> tuple[str, Path]:
    name, _, folder = text.partition("=")
    return name, Path(folder)


def curves(runs: dict[str, Path], log: str, column: str) -> Curves:
    return {name: [float(row[column]) for row in read_log(folder / log)] for name, folder in runs.items()}


def draw(axes: Axes, lines: Curves, x: str, y: str, **options: object) -> None:
    for style, (name, values) in zip(cycle(STYLES), lines.items(), strict=False):
        axes.plot(range(1, len(values) + 1), values, label=name, **style | options)
    axes.set(xlabel=x, ylabel=y)
    axes.grid(color="#e3e6ea")


def differences(losses: Curves) -> Curves:
    """|loss - loss of the first run| / loss of the first run / 2**-23, at the steps that both have done."""
    base = next(iter(losses.values()))
    return {
        name: [abs(a - b) / b * 2**23 for a, b in zip(values, base, strict=False)] for name, values in losses.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=named_folder, metavar="NAME=FOLDER")
    parser.add_argument("--plot", type=Path, required=True, metavar="FILE")
    parser.add_argument("--title", default="")
    options = parser.parse_args()
    runs = dict(options.runs)
    losses = curves(runs, "steps.csv", "loss")
    accuracies = {
        name: [100 * value for value in values] for name, values in curves(runs, "epochs.csv", "accuracy").items()
    }
    with rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True}):
        figure = Figure(figsize=(13, 4.4), layout="constrained")
        left, middle, right = figure.subplots(1, 3)
        draw(left, losses, "step", "loss in training")
        draw(middle, accuracies, "epoch", "validation accuracy, %")
        apart = f"loss apart from {options.runs[0][0]},\nin float32's precision (1.2e-7)"
        draw(right, differences(losses), "step", apart, linestyle="none", marker=".")
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(runs), frameon=False)
        figure.suptitle(options.title)
        figure.savefig(options.plot, dpi=150)


if __name__ == "__main__":
    main()
