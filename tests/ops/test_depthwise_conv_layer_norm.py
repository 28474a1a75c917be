"""Depthwise convolution and LayerNorm in one."""

from typing import ClassVar

import pytest
import torch
from contract import Contract
from support import arguments_of, assert_parity, device_of, relative_error
from test_depthwise_conv import CHEAP_FLOAT16, EDGES, check_filter_errors, filter_case

from convnext_kernels.functional import depthwise_conv2d, layer_norm
from convnext_kernels.parity import Case


class TestDepthwiseConvLayerNorm(Contract):
    operator = "depthwise_conv2d_layer_norm"
    # Wide enough for the CUDA kernel that does it in one pass.
    sizes: ClassVar = {**Contract.sizes, "channels": 6, "width": 18}
    cheap_float16 = CHEAP_FLOAT16
    more_cases = tuple(
        filter_case("depthwise_conv2d_layer_norm", shape, size, ("norm_weight", "norm_bias"))
        for shape, size in [*((edge, 7) for edge in EDGES), ((1, 128, 5, 17), 3), ((3, 40, 2, 33), 5)]
    )
    more_dtypes = (torch.bfloat16,)  # float32 is the two operators, one after the other
    spreading = ("grad weight",)  # PyTorch and tensor cores multiply by the zeros around the image

    @staticmethod
    def examples(batch, channels, height, width):
        shapes = {"input": (batch, channels, height, width), "weight": (channels, 1, 3, 3)}
        affine = {name: (channels,) for name in ("bias", "norm_weight", "norm_bias")}
        absent = {"bias": None, "norm_weight": None, "norm_bias": None}
        return [
            Case("depthwise_conv2d_layer_norm", "affine", {**shapes, **affine}),
            Case("depthwise_conv2d_layer_norm", "no affine", shapes, absent),
            Case("depthwise_conv2d_layer_norm", "dilation 2", shapes, {**absent, "dilation": 2}),
        ]

    def test_bad_filter(self):
        check_filter_errors(self)

    @pytest.mark.parametrize("eps", [0.0, -1.0])
    def test_bad_eps(self, eps):
        self.assert_refused(lambda _: {"eps": eps}, ValueError, f"eps: got {eps}; accepted: a number greater than 0")

    def test_is_the_one_after_the_other(self, example):
        given = arguments_of(example, torch.float64)
        convolved = depthwise_conv2d(given["input"], given["weight"], given["bias"], dilation=given.get("dilation", 1))
        expected = layer_norm(convolved, given["norm_weight"], given["norm_bias"])
        assert relative_error(self.function(**given), expected) < 1e-14

    def test_more_channels_than_registers(self):
        shapes = {"input": (1, 1030, 2, 2), "weight": (1030, 1, 3, 3), "norm_weight": (1030,)}
        assert_parity(Case(self.operator, "wide", shapes), torch.float32, device_of("triton"), "triton")
