"""Depthwise convolution."""

from functools import partial
from typing import ClassVar

import pytest
import torch
from contract import Contract
from support import BACKENDS, arguments_of, assert_far_images_are_right, device_of, evaluate
from torch.utils.checkpoint import checkpoint

from convnext_kernels import parity
from convnext_kernels.functional import OPERATORS
from convnext_kernels.parity import Case

CHEAP_FLOAT16 = ("1x24x1x1", "3x3, no bias", "3x3, dilation 2", "5x5, contiguous")
"""Triton's interpreter takes a second or two for each of these, ten and more for the others."""


def check_filter_errors(contract: Contract) -> None:
    """A filter that does not fit and a dilation that is none, for every operator that convolves."""
    weight = arguments_of(contract.full())["weight"].detach()
    accepted = rf"accepted: \[{len(weight)}, 1, K, K\] with K odd"
    for bad in (weight[..., :2, :2], weight[..., :2], weight.transpose(0, 1), weight[:, 0]):
        message = rf"weight: got shape \[{', '.join(map(str, bad.shape))}\]; {accepted}"
        contract.assert_refused(lambda _, bad=bad: {"weight": bad}, ValueError, message)
    for bad in (0, -1, 1.5):
        message = f"dilation: got {bad}; accepted: an integer of at least 1"
        contract.assert_refused(lambda _, bad=bad: {"dilation": bad}, ValueError, message)


def filter_case(operator: str, shape: tuple[int, int, int, int], size: int = 7, norms: tuple[str, ...] = ()) -> Case:
    """A call with a bias, and other vectors of these names."""
    vectors = {name: shape[1:2] for name in ("bias", *norms)}
    shapes = {"input": shape, "weight": (shape[1], 1, size, size), **vectors}
    return Case(operator, f"{'x'.join(map(str, shape))}, {size}x{size}", shapes)


EDGES = [(2, 1, 3, 5), (1, 2, 1, 9), (1, 5, 9, 1), (1, 8, 2, 140), (1, 8, 67, 2), (11, 24, 7, 7)]
"""Odd channels; one row, one column, wider than a block's strip, higher than its rows, several images in a block."""


class TestDepthwiseConv(Contract):
    operator = "depthwise_conv2d"
    sizes: ClassVar = {**Contract.sizes, "channels": 6}
    cheap_float16 = CHEAP_FLOAT16
    more_cases = tuple(filter_case("depthwise_conv2d", shape) for shape in EDGES)
    spreading = ("grad weight",)  # PyTorch and tensor cores multiply by the zeros around the image

    @staticmethod
    def examples(batch, channels, height, width):
        shapes = {"input": (batch, channels, height, width), "weight": (channels, 1, 3, 3)}
        return [
            Case("depthwise_conv2d", "bias", {**shapes, "bias": (channels,)}),
            Case("depthwise_conv2d", "no bias", shapes),
            Case("depthwise_conv2d", "dilation 2", shapes, {"dilation": 2}),
        ]

    def test_bad_filter(self):
        check_filter_errors(self)

    def test_tokens_have_no_neighbours(self):
        message = r"input: got 3 dimensions \[3, 6, 24\]; accepted: \[N, C, H, W\]"
        self.assert_refused(lambda a: {"input": a["input"].flatten(2)}, ValueError, message)

    def test_a_single_tap_shifts_the_image(self, backend):
        image = arguments_of(self.full(), device=device_of(backend))["input"].detach()
        weight = torch.zeros(image.shape[1], 1, 7, 7, device=image.device)
        weight[:, :, 1, 5] = 1
        output = self.on(backend)(image, weight)
        assert torch.equal(output[:, :, 2:, :-2], image[:, :, :-2, 2:])
        assert not output[:, :, :2].any() and not output[..., -2:].any()

    @pytest.mark.gpu
    def test_offsets_past_32_bits(self, kernels):
        _, function = self.gpu_call(kernels)
        assert_far_images_are_right(function, (64, 32, 48), {"weight": (64, 1, 7, 7), "bias": (64,)}, tensors=5)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operator", ["depthwise_conv2d", "depthwise_conv2d_layer_norm", "convnext_block"])
def test_the_gradient_of_a_filter_has_its_strides(operator, backend, memory_format):
    """Also in the dimension of size 1: DDP warns of others. Inside a checkpoint, which unpacks what is saved once."""
    function = partial(checkpoint, OPERATORS[operator], use_reentrant=False, backend=backend)
    arguments = arguments_of(parity.cases(operator, small=True)[0], device=device_of(backend))
    name = "conv_weight" if operator == "convnext_block" else "weight"
    expected = evaluate(function, arguments)[f"grad {name}"]
    arguments[name] = arguments[name].detach().to(memory_format=memory_format).requires_grad_()
    got = evaluate(function, arguments)[f"grad {name}"]
    assert got.stride() == arguments[name].stride()
    assert torch.equal(got, expected)
