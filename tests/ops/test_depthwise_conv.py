"""Depthwise convolution."""

import torch
from contract import Contract
from support import arguments_of, device_of

from convnext_kernels.parity import Case

CHEAP_FLOAT16 = ("1x24x1x1", "3x3, no bias", "3x3, dilation 2", "5x5, contiguous")
"""Triton's interpreter takes a second or two for each of these, ten and more for the others."""


def check_filter_errors(contract: Contract) -> None:
    """A filter that does not fit and a dilation that is none, for every operator that convolves."""
    weight = arguments_of(contract.full())["weight"].detach()
    for bad in (weight[..., :2, :2], weight[..., :2], weight.transpose(0, 1), weight[:, 0]):
        message = rf"weight: got shape \[{', '.join(map(str, bad.shape))}\]; accepted: \[5, 1, K, K\] with K odd"
        contract.assert_refused(lambda _, bad=bad: {"weight": bad}, ValueError, message)
    for bad in (0, -1, 1.5):
        message = f"dilation: got {bad}; accepted: an integer of at least 1"
        contract.assert_refused(lambda _, bad=bad: {"dilation": bad}, ValueError, message)


class TestDepthwiseConv(Contract):
    operator = "depthwise_conv2d"
    cheap_float16 = CHEAP_FLOAT16
    spreading = ("grad weight",)  # PyTorch multiplies by the zeros of its padding

    @staticmethod
    def examples(batch, channels, height, width):
        shapes = {"input": (batch, channels, height, width), "weight": (channels, 1, 3, 3)}
        return [
            Case("depthwise_conv2d", "bias, dilation 2", {**shapes, "bias": (channels,)}, {"dilation": 2}),
            Case("depthwise_conv2d", "3x3", shapes),
        ]

    def test_bad_filter(self):
        check_filter_errors(self)

    def test_tokens_have_no_neighbours(self):
        message = r"input: got 3 dimensions \[3, 5, 24\]; accepted: \[N, C, H, W\]"
        self.assert_refused(lambda a: {"input": a["input"].flatten(2)}, ValueError, message)

    def test_a_single_tap_shifts_the_image(self, backend):
        image = arguments_of(self.full(), device=device_of(backend))["input"].detach()
        weight = torch.zeros(5, 1, 7, 7, device=image.device)
        weight[:, :, 1, 5] = 1
        output = self.on(backend)(image, weight)
        assert torch.equal(output[:, :, 2:, :-2], image[:, :, :-2, 2:])
        assert not output[:, :, :2].any() and not output[..., -2:].any()
