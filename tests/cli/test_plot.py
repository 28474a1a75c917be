"""The picture of `bench`: whatever was measured, it can be read."""

import random

import pytest
import torch

pytest.importorskip("matplotlib")
from legible import assert_legible, boxes
from matplotlib.figure import Figure

from convnext_kernels.cli.bench import Options, Row
from convnext_kernels.cli.images import load_photographs
from convnext_kernels.cli.plot import draw
from convnext_kernels.cli.tasks import COMPILED, EAGER, OURS

BLOCKS = [f"block {stage}, {mode}" for stage in range(1, 5) for mode in ("forward", "forward + backward")]


def rows_of(models, modes, speed):
    """Invented times, up to `speed` images per second; one compilation failed."""
    uniform = random.Random(0).uniform
    for model in models:
        for mode in modes:
            for name in (OURS, EAGER, COMPILED):
                rate = speed * uniform(0.05, 1)
                times = {"images_per_second": rate, "milliseconds": 8e3 / rate, "ratio_to_eager": 2.0}
                times["quartiles"] = (0.98 * times["milliseconds"], 1.03 * times["milliseconds"])
                failed = name == COMPILED and mode == "training"
                yield Row(model, mode, name, failure="no compiler") if failed else Row(model, mode, name, **times)


@pytest.mark.parametrize(
    ("models", "modes", "speed"),
    [
        (["convnext_tiny"], ["inference", "training"], 20),
        (["convnext_isotropic_small"], ["inference"], 3e3),
        (["convnext_tiny", "convnextv2_tiny"], ["inference", "training", *BLOCKS], 9e4),
        (["convnext_tiny"], BLOCKS, 2e6),
        (["convnext_tiny", "convnext_small", "convnext_base", "convnext_large"], ["inference", "training"], 9e3),
    ],
    ids=["one", "isotropic", "all", "blocks", "many"],
)
def test_the_picture_is_legible(models, modes, speed, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **options: drawn.append(figure))
    options = Options(models, modes, 8, 224, "float32", torch.device("cpu"), None, True, None, None, None)
    rows = list(rows_of(models, modes, speed))
    draw(tmp_path / "bench.png", rows, options, load_photographs(None, 8))
    assert_legible(drawn[0])
    assert not [tick for axis in drawn[0].axes for tick in axis.get_yticklabels() if "e" in tick.get_text()]
    written = [text for text, _ in boxes(drawn[0])]
    assert written.count(" failed") == sum(row.failure is not None for row in rows)
    assert sum(text.endswith("\n2.00x") for text in written) == len(rows) - written.count(" failed")
