"""Products of float32 tensors with PyTorch's TF32 on: other tiles, and on a GPU other instructions."""

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from ptx import running, tf32
from support import assert_parity, device_of

from convnext_kernels import parity
from convnext_kernels.ops.common.launch import float32_precision

SMALL = {
    "mlp": ("3x40x2x2", "recomputed", "GRN, tokens"),
    "patch_linear": ("3x40x5x7 to 80, 2x2",),
    "convnext_block": ("weights alone, sliced",),
}


@pytest.fixture(autouse=True)
def allowed() -> Iterator[None]:
    """PyTorch's products in TF32 as well, where they run on a GPU; `parity` then compares with such convolutions."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    assert float32_precision() == "tf32"
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    "case",
    [
        next(case for case in parity.cases(operator, small=True) if case.name == name)
        for operator, chosen in SMALL.items()
        for name in chosen
    ],
    ids=lambda case: f"{case.operator} {case.name}",
)
def test_tiles_in_triton(case):
    """The interpreter computes them in float32, and is held to its accuracy; what is compiled is held to TF32's."""
    with tf32.rounded() if running.chosen() else nullcontext():
        assert_parity(case, torch.float32, device_of("triton"), "triton")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize(
    "case",
    [case for name in SMALL for case in parity.cases(name, small=False)],
    ids=lambda case: f"{case.operator} {case.name}",
)
def test_gpu_parity(case, backend):
    reasons = parity.unsupported(case, torch.float32, "cuda", backend)
    if reasons:
        pytest.skip("; ".join(reasons))
    assert_parity(case, torch.float32, "cuda", backend)
