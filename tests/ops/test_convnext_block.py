"""The whole ConvNeXt block as one operator."""

import torch
from contract import Contract

from convnext_kernels.parity import Case

HIDDEN = 11


class TestBlock(Contract):
    operator = "convnext_block"
    folds = True
    sixteen_bit = torch.float16  # which its products can be interpreted in
    spreading = ("grad conv_weight",)  # PyTorch and tensor cores multiply by the zeros around the image

    @staticmethod
    def examples(batch, channels, height, width):
        image = {"input": (batch, channels, height, width), "conv_weight": (channels, 1, 3, 3)}
        matrices = {"weight1": (HIDDEN, channels), "weight2": (channels, HIDDEN)}
        norm = {"norm_weight": (channels,), "norm_bias": (channels,)}
        biases = {"conv_bias": (channels,), "bias1": (HIDDEN,), "bias2": (channels,)}
        scales = {"layer_scale": (channels,), "drop_path_factor": (batch,)}
        grn = {"grn_weight": (HIDDEN,), "grn_bias": (HIDDEN,)}
        every = {**image, **matrices, **norm, **biases}
        absent = {name: None for name in (*norm, *biases)}
        return [
            Case("convnext_block", "all", {**every, **scales, **grn}, {"grn_eps": 1e-5}),
            Case("convnext_block", "V1", {**every, **scales}),
            Case("convnext_block", "V1, recomputed", {**every, **scales}, {"recompute_hidden": True}),
            Case("convnext_block", "V2", {**every, **grn}),
            Case("convnext_block", "weights alone", {**image, **matrices}, absent),
        ]
