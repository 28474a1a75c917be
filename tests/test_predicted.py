"""The predicted throughput: by hand where that is possible, never above what the products alone allow."""

import pytest
import torch

from benchmarks import predicted
from benchmarks.kernel_work import Shape
from benchmarks.predicted import HALF, PAPER, PEAKS, TF32, gpus, images_per_second, table

A100, H200 = gpus()
MULTIPLY_ADDS = {"tiny": 4.47e9, "small": 8.70e9, "base": 15.4e9, "large": 34.4e9, "xlarge": 61.0e9}
"""Of an image at 224 px: ConvNeXt, arXiv 2201.03545, table 1."""


def test_the_devices_are_those_of_the_report():
    assert (A100.name, A100.architecture, H200.name, H200.architecture) == ("A100", "80", "H200", "90a")


@pytest.mark.parametrize("gpu", [A100, H200], ids=lambda gpu: gpu.name)
@pytest.mark.parametrize("precision", [TF32, HALF], ids=lambda precision: precision.name)
@pytest.mark.parametrize(("model", "resolution"), PAPER)
def test_no_more_than_the_products_allow(gpu, precision, model, resolution):
    multiply_adds = MULTIPLY_ADDS[model.split("_")[1]] * (resolution / 224) ** 2
    bound = PEAKS[gpu.architecture, precision] / (2 * multiply_adds)
    assert 0.4 * bound < images_per_second(gpu, model, resolution, precision) < bound


def test_the_paper_s_own_are_below():
    """They were measured, with kernels that are not fused."""
    for (model, resolution), measured in PAPER.items():
        assert measured < images_per_second(A100, model, resolution, TF32)


@pytest.mark.parametrize(("precision", "itemsize"), [(TF32, 4), (HALF, 2)], ids=["TF32", "16 bits"])
def test_an_mlp_by_hand(precision, itemsize):
    """On an A100: at 96 channels bound by memory, 16 bits in one kernel; at 768 by its two products."""
    rate, tokens = 2.0e12, 256 * 56**2
    seconds = predicted._mlp_seconds(A100, 96, tokens, precision)
    if precision is HALF:
        assert seconds == pytest.approx(max((3 * 96 * tokens + 8 * 96**2) * 2 / rate, 16 * 96**2 * tokens / 312e12))
    else:
        passes = 2 + 5 + 6  # norm, first product, second
        assert seconds == pytest.approx((passes * 96 * tokens + 8 * 96**2) * 4 / rate)
    tokens = 256 * 7**2
    norm = 2 * 768 * tokens * itemsize / rate
    products = 16 * 768**2 * tokens / PEAKS["80", precision]
    assert predicted._mlp_seconds(A100, 768, tokens, precision) == pytest.approx(norm + products)


def test_a_convolution_by_hand():
    """At a predicted map its own clocks; at twice the rows more passes, by the kernel's formula; or memory's."""
    (known,) = [p for p in A100.kernels[TF32.convolution] if (p["channels"], p["size"]) == (96, 56)]
    outputs, speed = 3 * 96 * 56**2, 108 * 1.41e9
    slowest = max(known["clocks"].values())
    assert A100.convolution_seconds(Shape(96, 56), 3, TF32) == pytest.approx(outputs * slowest / speed)
    rows, columns = (96 + 6) * 98 / (7 * 7 * 32 * 96**2), (56 + 6) * 56 / (7 * 7 * 32 * 56**2)
    seconds = A100.convolution_seconds(Shape(128, 96), 3, TF32)
    assert seconds == pytest.approx(3 * 128 * 96**2 * slowest * rows / columns / speed)
    memory = 3 * 96 * 56**2 * 2 * 2 / 2.0e12
    assert A100.convolution_seconds(Shape(96, 56), 3, HALF) == pytest.approx(memory, rel=0.01)


def test_the_table_says_what_it_is():
    caption, _, head, rule, *lines = table().splitlines()
    assert (
        caption.startswith("Upper bounds, predicted and not measured: ")
        and "leave out launches, latencies, caches" in caption
    )
    assert "A100 156 and 312 TFLOP/s in TF32 and 16 bits, 2 TB/s; H200 494.5 and 989" in caption
    assert head.count("bound") == 4 and head.count("|") == rule.count("|") == lines[0].count("|")
    assert [float(line.split("|")[2]) for line in lines] == list(PAPER.values())
    assert lines[0].startswith("| convnext_tiny at 224 px | 1943.5 |")


def test_a_dtype_is_16_bits():
    assert HALF.dtype.itemsize == 2 and TF32.dtype == torch.float32
