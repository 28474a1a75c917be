"""What one pass of a warp through the main loop of each CUDA kernel does, for `benchmarks.static_report`.

A new kernel gets an entry in WORK: how many passes an output takes, with the formula, and the bytes that go through
memory for it. Without an entry a kernel is compiled and counted, but nothing is predicted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """A stage of a model: channels, and the height and width of its maps."""

    channels: int
    size: int


SHAPES = (Shape(96, 56), Shape(192, 28), Shape(384, 14), Shape(768, 7), Shape(128, 56), Shape(1024, 7))


@dataclass(frozen=True)
class Work:
    """A kernel's work at a shape.

    passes: of a warp through the main loop for each output, those that prepare and those on idle places included.
    bytes: through memory for each output, each tensor once.
    inner: passes through the loops inside the main loop, for each of it.
    copying: how many of the lanes that copy to shared memory (cp.async) have anything to copy.
    conflicts: how often shared memory is accessed for what would be one access without bank conflicts.
    marker: the instruction that the main loop is known by.
    matrix: whether it runs on tensor cores.
    runs: whether the kernel serves the shape.
    few_blocks, slow: why less than two blocks fit on a multiprocessor; why a pipe needs more clocks than memory.
    """

    passes: Callable[[Shape], float]
    bytes: float
    dynamic_shared: Callable[[Shape], int] = lambda shape: 0
    inner: Callable[[Shape], int] = lambda shape: 1
    copying: Callable[[Shape], float] = lambda shape: 1
    conflicts: float = 1
    marker: str = "HMMA"
    matrix: bool = False
    runs: Callable[[Shape], bool] = lambda shape: True
    few_blocks: str = ""
    slow: str = ""


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()


def _strip_segments(size: int) -> int:
    """How many of the 8 segments of 8 pixels, that a block of Toeplitz products works on, lie in one image."""
    return min(8, _power_of_two(_ceil_div(size, 8)))


def _copied_pixels(size: int) -> int:
    """Of a row of the input, at most 128: each image's part has a segment more than its outputs."""
    strip = _strip_segments(size)
    return 8 // strip * (strip + 1) * 8


def _depthwise_forward(size: int, residual: bool) -> Work:
    """csrc/depthwise_conv/forward_tensor_cores.cu

    A step takes 2 rows of 64 pixels, 2 channels of each in a warp; the loop is unrolled over `stages` steps. Before a
    block's first outputs come size // 2 steps. Shared memory, in words of 2 channels, 9 for a pixel: `stages` steps of
    2 x 128 pixels, then 2 x 64 for two steps of outputs and, if there is one, `stages` of the residual.
    """
    stages = {3: 4, 5: 3, 7: 4}[size]

    def passes(shape: Shape) -> float:
        steps = _ceil_div(shape.size, 2) + size // 2
        return steps / stages / (2 * 8 // _strip_segments(shape.size) * shape.size**2)

    shared = 4 * 9 * (stages * 2 * 128 + (2 + stages * residual) * 2 * 64)
    slow = (
        "a matrix operand is four registers next to each other, two of which every other operand shares: assembling"
        " them takes a third of the instructions; and the more rows a map has, the less the first steps weigh"
    )
    return Work(
        passes,
        bytes=6 if residual else 4,
        dynamic_shared=lambda _: shared,
        copying=lambda shape: _copied_pixels(shape.size) / 128,
        conflicts=2,  # at 9 words a pixel, whichever way a warp reads or writes them
        matrix=True,
        slow=slow,
    )


def _norm_tiling(channels: int, vector: int) -> tuple[int, int]:
    """Vectors of a thread and threads of a token; tile_tokens in csrc/layer_norm/tokens.cuh."""
    vectors = channels // vector
    tilings = [(items, _power_of_two(_ceil_div(vectors, items))) for items in (1, 2, 3)]
    return min(tilings, key=lambda tiling: (tiling[0] * tiling[1], -tiling[0]))


def _norm_shuffles(lanes: int) -> int:
    """Steps of a sum over the lanes of a token, within a warp."""
    return min(lanes, 32).bit_length() - 1


def _layer_norm_forward(vector: int, items: int, element_bytes: int) -> Work:
    """csrc/layer_norm/forward.cu

    A pass normalises the 32 / lanes tokens of a warp; weight and bias lie in shared memory.
    """

    def lanes(shape: Shape) -> int:
        return _norm_tiling(shape.channels, vector)[1]

    return Work(
        passes=lambda shape: lanes(shape) / 32 / shape.channels,
        bytes=2 * element_bytes,
        dynamic_shared=lambda shape: 4 * (32 + 2 * items * lanes(shape) * vector),
        inner=lambda shape: _norm_shuffles(lanes(shape)),
        marker="MUFU",
        runs=lambda shape: _norm_tiling(shape.channels, vector)[0] == items,
    )


WORK = {
    **{
        f"depthwise_conv_forward<Traits<*, {size}, {str(residual).lower()}>>": _depthwise_forward(size, residual)
        for size in (3, 5, 7)
        for residual in (False, True)
    },
    **{f"layer_norm_forward<float, 4, {items}>": _layer_norm_forward(4, items, 4) for items in (1, 2, 3)},
    **{f"layer_norm_forward<*, 8, {items}>": _layer_norm_forward(8, items, 2) for items in (1, 2, 3)},
}
"""Work by a pattern of the kernel's name, as fnmatch reads it."""
