"""The order in which kernels take images under stochastic depth."""

import pytest
import torch
from support import device_of

pytest.importorskip("triton")

from convnext_kernels.ops.common.triton_drop_path import BLOCK, drop_path


@pytest.mark.parametrize("images", [0, 1, 3, BLOCK - 1, BLOCK, 2 * BLOCK + 5])
@pytest.mark.parametrize("rate", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_kept_images_come_first_in_their_order(images, rate, dtype):
    generator = torch.Generator().manual_seed(images)
    kept = torch.rand(images, generator=generator) >= rate
    factor = (kept * torch.randn(images, generator=generator)).to(dtype).to(device_of("triton"))
    result = drop_path(factor, 49)
    assert result.order.dtype == result.kept.dtype == torch.int32
    assert result.kept.tolist() == [factor.count_nonzero()]
    assert torch.equal(result.order.long(), torch.argsort((factor == 0).int(), stable=True))
    assert result.factor is factor and result.tokens_per_image == 49


def test_nan_is_kept():
    factor = torch.tensor([0.0, torch.nan, -0.0, torch.inf], device=device_of("triton"))
    assert drop_path(factor, 1).order.tolist() == [1, 3, 0, 2]


def test_without_a_factor_there_is_no_order():
    assert drop_path(None, 49) is None
