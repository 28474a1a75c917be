"""What every Triton launch asks PyTorch for."""

import pytest
import torch

from convnext_kernels.ops.common.launch import float32_precision


@pytest.fixture
def matmul():
    """PyTorch's settings of CUDA's matrix products, put back afterwards."""
    yield torch.backends.cuda.matmul
    torch.set_float32_matmul_precision("highest")  # the one setting that puts back all the others


def test_precision_by_the_old_names(matmul):
    assert float32_precision() == "ieee"
    matmul.allow_tf32 = True
    assert float32_precision() == "tf32"
    torch.set_float32_matmul_precision("highest")
    assert float32_precision() == "ieee"
    torch.set_float32_matmul_precision("high")
    assert float32_precision() == "tf32"


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="PyTorch before 2.9")
def test_precision_by_the_new_name(matmul):
    matmul.fp32_precision = "tf32"
    assert float32_precision() == "tf32"
    matmul.fp32_precision = "ieee"
    assert float32_precision() == "ieee"
