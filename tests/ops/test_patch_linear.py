"""Linear embedding of patches."""

import pytest
import torch
from contract import Contract
from support import arguments_of, device_of, evaluate

from convnext_kernels.parity import Case


class TestPatchLinear(Contract):
    operator = "patch_linear"

    @staticmethod
    def examples(batch, channels, height, width):
        shapes = {"input": (batch, channels, 2 * height + 1, 2 * width), "weight": (11, channels, 2, 2)}
        return [
            Case("patch_linear", "bias, a row too many", {**shapes, "bias": (11,)}),
            Case("patch_linear", "3x3", {**shapes, "weight": (11, channels, 3, 3)}),
        ]

    def test_bad_weight(self):
        weight = arguments_of(self.full())["weight"].detach()
        for bad in (weight[..., :1], weight[:, 0], weight[:0], weight[:, :3], weight[..., :0, :0]):
            message = rf"weight: got shape \[{', '.join(map(str, bad.shape))}\]; accepted: \[O, 5, P, P\]"
            self.assert_refused(lambda _, bad=bad: {"weight": bad}, ValueError, message)

    def test_an_image_smaller_than_a_patch(self):
        message = r"input: got \[3, 5, 1, 12\]; accepted: H and W of at least the patch size 2"
        self.assert_refused(lambda a: {"input": a["input"][:, :, :1]}, ValueError, message)

    @pytest.mark.parametrize("odd_row", [0.0, torch.nan])
    def test_pixels_beyond_the_last_patch_are_not_read(self, backend, odd_row):
        arguments = arguments_of(self.full(), device=device_of(backend))
        image = arguments["input"].detach().clone()
        image[:, :, -1] = odd_row
        results = evaluate(self.on(backend), {**arguments, "input": image.requires_grad_()})
        expected = evaluate(self.on(backend), arguments)
        assert all(torch.equal(results[name], value) for name, value in expected.items())
        assert not results["grad input"][:, :, -1].any()
