"""Which blocks compute their hidden activations again in backward: data, and the rule."""

from __future__ import annotations

import torch
from torch import Tensor

from convnext_kernels.ops.common.launch import float32_precision

# The pre-activation of a token, 8 C bytes in 16-bit, is written once and read once, or takes 8 C^2 FLOP more: equal at
# C = 2 FLOP/s / bytes/s, that is 290 on an H200 (600 TFLOP/s of products, 4.2 TB/s) and 310 on an A100 (250, 1.6).
# TF32 has half the rate for twice the bytes.
RECOMPUTED_CHANNELS = 256


def recomputes_by_default(input: Tensor, grn: bool) -> bool:
    """Whether a block that was not told saves no pre-activation: on a GPU, where that is predicted to be faster.

    With a response norm the hidden activations are written in any case; float32 in full precision has no fast products.
    """
    slow = input.dtype == torch.float64 or (input.dtype == torch.float32 and float32_precision() == "ieee")
    return input.is_cuda and not grn and not slow and input.shape[1] <= RECOMPUTED_CHANNELS
