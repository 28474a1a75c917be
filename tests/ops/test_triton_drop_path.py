"""The order in which kernels take tokens under stochastic depth."""

import pytest
import torch
from support import device_of

pytest.importorskip("triton")

from convnext_kernels.ops.common import triton_drop_path
from convnext_kernels.ops.common.triton_drop_path import drop_path
from convnext_kernels.parity import poisoned_memory

BLOCK = 32


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """So that few images, each a program, are more than a block."""
    monkeypatch.setattr(triton_drop_path, "BLOCK", BLOCK)


@pytest.mark.parametrize(("images", "tokens"), [(0, 1), (1, 49), (3, BLOCK + 1), (7, 1), (BLOCK + 5, 2)])
@pytest.mark.parametrize("rate", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_kept_images_come_first(images, tokens, rate, dtype):
    generator = torch.Generator().manual_seed(images)
    kept = torch.rand(images, generator=generator) >= rate
    image_factor = (kept * torch.randn(images, generator=generator)).to(dtype).to(device_of("triton"))
    with poisoned_memory():
        order, factor, count = drop_path(image_factor, tokens)
    token_factor = image_factor.repeat_interleave(tokens)
    expected = torch.argsort((token_factor == 0).int(), stable=True)
    assert order.dtype == count.dtype == torch.int32 and torch.equal(order.long(), expected)
    assert factor.dtype == torch.float32 and torch.equal(factor, token_factor[expected].float())
    assert count.tolist() == [token_factor.count_nonzero()]


def test_nan_is_kept():
    factor = torch.tensor([0.0, torch.nan, -0.0, torch.inf], device=device_of("triton"))
    assert drop_path(factor, 1).order.tolist() == [1, 3, 0, 2]


def test_without_a_factor_there_is_no_order():
    assert drop_path(None, 49) is None
