"""LayerNorm over channels."""

import pytest
import torch
from contract import Contract
from support import assert_far_images_are_right

from convnext_kernels.parity import Case


class TestLayerNorm(Contract):
    operator = "layer_norm"
    more_cases = tuple(
        Case("layer_norm", "x".join(map(str, shape)), {"input": shape, "weight": shape[-1:], "bias": shape[-1:]})
        for shape in [(2, 3, 1), (1, 5, 2), (1, 300, 5), (1, 3, 768), (1, 3, 1030)]
    )

    @staticmethod
    def examples(batch, channels, height, width):
        affine = {"weight": (channels,), "bias": (channels,)}
        image, tokens = (batch, channels, height, width), (batch, height * width, channels)
        return [
            Case("layer_norm", "affine", {"input": image, **affine}, {"eps": 1e-5}),
            Case("layer_norm", "bias", {"input": image, "bias": (channels,)}),
            Case("layer_norm", "tokens", {"input": tokens, "weight": (channels,)}),
            Case("layer_norm", "no affine", {"input": image}),
        ]

    @pytest.mark.parametrize("eps", [0.0, -1e-6, torch.nan])
    def test_bad_eps(self, eps):
        self.assert_refused(lambda _: {"eps": eps}, ValueError, f"eps: got {eps}; accepted: a number greater than 0")

    @pytest.mark.gpu
    def test_offsets_past_32_bits(self, kernels):
        _, function = self.gpu_call(kernels)
        assert_far_images_are_right(function, (2048, 128), {"weight": (128,), "bias": (128,)}, tensors=5)
