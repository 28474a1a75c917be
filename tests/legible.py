"""What a picture must be: nothing overlaps, nothing is cut off."""

from collections.abc import Iterator
from itertools import combinations

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox


def boxes(figure: Figure) -> Iterator[tuple[str, Bbox]]:
    """What is written in a picture, and where."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    labels = [*figure.texts]
    for axis in figure.axes:
        left, right = axis.get_xlim()
        ticks = [tick for tick in axis.get_xticklabels() if left <= tick.get_position()[0] <= right]
        titles = [axis.title, axis._left_title]
        labels += [*axis.texts, *titles, *([*ticks, axis.yaxis.label, axis.xaxis.label] if axis.axison else [])]
    yield from ((text.get_text(), text.get_window_extent(renderer)) for text in labels if text.get_text())
    for legend in [*figure.legends, *(axis.get_legend() for axis in figure.axes if axis.get_legend())]:
        yield "legend", legend.get_window_extent(renderer)


def assert_legible(figure: Figure) -> None:
    """Nothing overlaps and nothing is cut off, neither what is written nor what is drawn."""
    written = list(boxes(figure))
    assert len(written) > 5
    for axis in figure.axes:
        for drawn in (*axis.lines, *axis.patches):
            bottom, top = drawn.get_window_extent().intervaly
            assert axis.bbox.y0 - 1 <= bottom and top <= axis.bbox.y1 + 1, drawn
    inside = figure.bbox.padded(1)
    cut = [text for text, box in written if not (inside.contains(*box.min) and inside.contains(*box.max))]
    assert cut == []
    overlapping = [(a, b) for (a, box), (b, other) in combinations(written, 2) if box.padded(-1).overlaps(other)]
    assert overlapping == []
