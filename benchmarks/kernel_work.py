"""What one pass of a warp through the main loop of each CUDA kernel does, for `benchmarks.static_report`.

A new kernel gets an entry in WORK: how many passes an output takes, with the formula, and the bytes that go through
memory for it. Without an entry a kernel is compiled and counted, but nothing is predicted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

WORKING = ("HMMA", "FFMA", "LDS", "LDSM", "STS", "LDG", "LDGSTS", "STG")
"""Instructions that a kernel is there for: products, and accesses to memory."""


@dataclass(frozen=True)
class Shape:
    """A stage of a model: channels, and the height and width of its maps."""

    channels: int
    size: int


SHAPES = (Shape(96, 56), Shape(192, 28), Shape(384, 14), Shape(768, 7), Shape(128, 56), Shape(1024, 7))


@dataclass(frozen=True)
class Loop:
    """A loop that takes the kernel's time.

    passes: of a warp for each output, those that prepare and those on idle places included.
    inner: passes through the loops inside it, for each of its own.
    conflicts: how often shared memory is accessed for what would be one access without bank conflicts.
    copies: the same for an instruction of cp.async, less where some lanes have nothing to copy.
    marker: the instruction that the loop is known by.
    variant: which loop of those with as many of these, the smallest first.
    working: the instructions that a full pass has all of; others, under a condition, are left out where they can be.
    """

    passes: Callable[[Shape], float]
    inner: Callable[[Shape], int] = lambda shape: 1
    conflicts: float = 1
    copies: Callable[[Shape], float] = lambda shape: 1
    marker: str = "HMMA"
    variant: Callable[[Shape], int] = lambda shape: 0
    working: tuple[str, ...] = WORKING


@dataclass(frozen=True)
class Work:
    """A kernel's work at a shape.

    bytes: through memory for each output, each tensor once.
    matrix: whether it runs on tensor cores.
    runs: whether the kernel serves the shape.
    few_blocks, slow: why less than two blocks fit on a multiprocessor; why a pipe needs more clocks than memory.
    """

    loops: tuple[Loop, ...]
    bytes: float
    dynamic_shared: Callable[[Shape], int] = lambda shape: 0
    matrix: bool = False
    runs: Callable[[Shape], bool] = lambda shape: True
    few_blocks: str = ""
    slow: str = ""


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()


def _strip_segments(size: int, most: int) -> int:
    """How many of the segments of 8 pixels, `most` of which lie in a row of a block, belong to one image."""
    return min(most, _power_of_two(_ceil_div(size, 8)))


def _input_pixels(size: int) -> int:
    """Of input in a row of a block with 8 segments: each image's part has one more than of outputs."""
    strip = _strip_segments(size, 8)
    return 8 // strip * (strip + 1) * 8


def _depthwise_forward(size: int, residual: bool) -> Work:
    """csrc/depthwise_conv/forward_tensor_cores.cu

    A step takes a row of 128 pixels, 2 channels of each in a warp; the loop is unrolled over `size` steps. Rows outside
    the image are not computed with: size // 2 of them bring copies, as many bring outputs, together a step and a bit
    less. Shared memory: five rows of input, two of outputs and, if there is one, five of the residual, 260 bytes for 16
    channels of 8 pixels.
    """

    def passes(shape: Shape) -> float:
        images = 16 // _strip_segments(shape.size, 16)
        return (shape.size + size // 2) / size / (2 * images * shape.size**2)

    def shared(shape: Shape) -> int:
        strip = _strip_segments(shape.size, 16)
        return 260 * (5 * 16 // strip * (strip + 1) + (2 + 5 * residual) * 16)

    # Fragments meet a bank twice, of 8 loads and 4 stores in 16 accesses of a step; copies, of which one in five is for
    # images of more than one strip, once.
    loop = Loop(passes, conflicts=28 / 16, copies=lambda shape: 4 / 5)
    slow = "" if size == 5 and residual else FORWARD_REASON
    return Work((loop,), bytes=6 if residual else 4, dynamic_shared=shared, matrix=True, slow=slow)


FORWARD_REASON = "on small maps the steps before a block's first outputs and after its last inputs weigh most"


def _depthwise_forward_on_cuda_cores(size: int) -> Work:
    """csrc/depthwise_conv/forward_cuda_cores.cu

    A pass takes `size` rows of 7 columns, a channel in each lane. Before the first outputs come size - 1 rows.
    """

    def passes(shape: Shape) -> float:
        rows, columns = shape.size + size - 1, 7 * _ceil_div(shape.size, 7)
        return rows / size * columns / 7 / (32 * shape.size**2)

    slow = f"{size * size} multiply-adds for 8 bytes, and each row of input meets {size} rows of outputs, there or not"
    return Work((Loop(passes, marker="FFMA"),), bytes=8, slow=slow)


def _filter_gradient(size: int) -> Work:
    """csrc/depthwise_conv/filter_gradient_tensor_cores.cu, an output being an element of grad_output

    A step takes a row of 128 pixels, 2 channels of each in a warp; the loop is unrolled over `size` steps. A strip
    takes size // 2 steps more than it has rows. Shared memory: four steps of 16 segments of both tensors, and 64 bytes
    of each thread's for the next strip.
    """
    shared = 4 * (16 * 600 + 16 * 296) + 256 * 64

    def passes(shape: Shape) -> float:
        images = 16 // _strip_segments(shape.size, 16)
        return (shape.size + size // 2) / size / (2 * images * shape.size**2)

    # One copy in nine is for images of more than one strip; going on to the next strip is rare.
    loop = Loop(passes, copies=lambda shape: 8 / 9, working=("HMMA", "LDGSTS"))
    slow = (
        "each copy of 4 bytes adds its offset and tests its bit; small maps end with steps for their last rows alone"
        if size > 3
        else ""
    )
    return Work((loop,), bytes=4, dynamic_shared=lambda _: shared, matrix=True, slow=slow)


def _filter_gradient_on_cuda_cores(size: int) -> Work:
    """csrc/depthwise_conv/filter_gradient_cuda_cores.cu, an output being an element of grad_output

    A pass takes 2 rows of `size` columns, a channel in each lane. What is done once in 28 columns, adding the sums to
    those in shared memory, is left out.
    """

    def passes(shape: Shape) -> float:
        return _ceil_div(shape.size, 2) * _ceil_div(shape.size, size) / (32 * shape.size**2)

    slow = f"{size * size} multiply-adds for 8 bytes" if size > 3 else ""
    return Work((Loop(passes, marker="FFMA", working=("FFMA", "LDG")),), bytes=8, slow=slow)


def _norm_tiling(channels: int, vector: int) -> tuple[int, int]:
    """Vectors of a thread and threads of a token; tile_tokens in csrc/layer_norm/tokens.cuh."""
    vectors = channels // vector
    tilings = [(items, _power_of_two(_ceil_div(vectors, items))) for items in (1, 2, 3)]
    return min(tilings, key=lambda tiling: (tiling[0] * tiling[1], -tiling[0]))


def _layer_norm(vector: int, items: int, tensors: int, marker: str, shared: Callable[[int], int]) -> Work:
    """csrc/layer_norm/forward.cu and backward.cu: a pass takes the 32 / lanes tokens of a warp.

    Args:
        tensors: read and written.
        shared: bytes of shared memory, from the channels of a token, padded.
    """

    def lanes(shape: Shape) -> int:
        return _norm_tiling(shape.channels, vector)[1]

    loop = Loop(
        passes=lambda shape: lanes(shape) / 32 / shape.channels,
        inner=lambda shape: min(lanes(shape), 32).bit_length() - 1,  # steps of a sum over lanes
        marker=marker,
    )
    return Work(
        (loop,),
        bytes=tensors * 16 / vector,
        dynamic_shared=lambda shape: shared(items * lanes(shape) * vector),
        runs=lambda shape: _norm_tiling(shape.channels, vector)[0] == items,
    )


def _layer_norm_forward(vector: int, items: int) -> Work:
    """Scratch, weight and bias in shared memory."""
    return _layer_norm(vector, items, 2, "MUFU", lambda channels: 4 * (32 + 2 * channels))


def _layer_norm_backward(vector: int, items: int) -> Work:
    """Two stages of both inputs of 256 threads, 16 bytes for each item, then scratch and weight."""
    stages = 2 * 2 * items * 256 * 16
    return _layer_norm(vector, items, 3, "LDGSTS", lambda channels: stages + 4 * (32 + channels))


def _conv_layer_norm(size: int) -> Work:
    """csrc/depthwise_conv_layer_norm/forward.cu

    A pass of the first loop takes 4 rows of 64 pixels, 2 channels of each in a warp; one of the second all channels of
    4 pixels. Shared memory, in words of 2 channels: the tile of 256 pixels, then input, 80 pixels in a row and 65 words
    for 8 of them.
    """

    def blocks(shape: Shape) -> float:
        """For each pixel."""
        return _ceil_div(shape.size, 4) / (8 // _strip_segments(shape.size, 8) * shape.size**2)

    convolution = Loop(
        lambda shape: blocks(shape) / 2, conflicts=2, copies=lambda shape: _input_pixels(shape.size) / 96
    )
    norm = Loop(
        lambda shape: 64 * blocks(shape) / shape.channels,
        conflicts=2,
        marker="SHFL",
        variant=lambda shape: 1 if shape.channels <= 96 else 2,  # the loops for 4, 6 and 8 words of a lane
        working=tuple(name for name in WORKING if name != "STG"),  # nothing is saved for backward
    )
    return Work(
        (convolution, norm),
        bytes=4,
        dynamic_shared=lambda shape: 4 * (256 * (shape.channels // 2 | 1) + (4 + size - 1) * 650),
        matrix=True,
        runs=lambda shape: shape.channels <= 128 and shape.size >= 17,
        few_blocks="a tile of 256 whole pixels of 128 channels, with its input, takes most of 164 KiB on sm_80"
        if size > 3
        else "",
        slow="for 4 rows of outputs a tile copies and loads 10 of input, and the filter of every channel from memory",
    )


WORK = {
    **{
        f"depthwise_conv_forward<Traits<*, {size}, {str(residual).lower()}>>": _depthwise_forward(size, residual)
        for size in (3, 5, 7)
        for residual in (False, True)
    },
    **{
        f"depthwise_conv_forward_on_cuda_cores<Traits<float, {size}>>": _depthwise_forward_on_cuda_cores(size)
        for size in (3, 5, 7)
    },
    **{f"filter_gradient_on_tensor_cores<Traits<*, {size}>>": _filter_gradient(size) for size in (3, 5, 7)},
    **{
        f"filter_gradient_on_cuda_cores<Traits<float, {size}>>": _filter_gradient_on_cuda_cores(size)
        for size in (3, 5, 7)
    },
    **{f"depthwise_conv_layer_norm_forward<Traits<*, {size}>>": _conv_layer_norm(size) for size in (3, 5, 7)},
    **{
        f"layer_norm_{direction}<{element}, {vector}, {items}>": work(vector, items)
        for direction, work in (("forward", _layer_norm_forward), ("backward", _layer_norm_backward))
        for element, vector in (("float", 4), ("*", 8))
        for items in (2, 3)
    },
}
"""Work by a pattern of the kernel's name, as fnmatch reads it."""
