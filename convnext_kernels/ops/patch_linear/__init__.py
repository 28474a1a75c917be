"""Linear embedding of non-overlapping patches: ConvNeXt's stem (4x4) and downsampling (2x2) convolutions."""

from __future__ import annotations

from torch import Tensor

from convnext_kernels.backends import requested_backend
from convnext_kernels.ops.common.checks import autocast, check_input, check_parameter, check_tensor
from convnext_kernels.ops.patch_linear.operator import CALL


def patch_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """The convolution of size P and stride P, as one matrix product over patches:

        out[n, o, h, w] = bias[o] + sum_cij weight[o, c, i, j] * input[n, c, P h + i, P w + j]

    Rows and columns beyond the last whole patch are not read, as in PyTorch's strided convolution. Products of 16-bit
    tensors accumulate in float32; those of float32 tensors follow PyTorch's TF32 setting
    (`torch.set_float32_matmul_precision`).

    Args:
        input: [N, C, H, W], H and W >= P, float16, bfloat16, float32 (float64: reference only). Channels-last memory
            is native; other strides are copied once. N may be 0.
        weight: [O, C, P, P], float32 or the input's dtype.
        bias: [O] or None, float32 or the input's dtype.
        backend: "auto", "cuda", "triton" or "reference"; None takes that of `use_backend`.

    Returns:
        [N, O, H // P, W // P] in the input's dtype (autocast's where it is on), channels-last memory.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it, what was got and what is accepted.
        BackendError: the backend asked for by name cannot run the call.

    Source: ConvNeXt, arXiv 2201.03545, sections 2.2 ("patchify" stem) and 2.6 (separate downsampling layers).
    """
    check_input(input, (4,))
    check_tensor("weight", weight)
    input = autocast(input)
    outputs, size = (weight.shape[0], weight.shape[-1]) if weight.dim() == 4 else (0, 0)
    if size < 1 or outputs < 1 or weight.shape != (outputs, input.shape[1], size, size):
        accepted = f"[O, {input.shape[1]}, P, P] for an input of {input.shape[1]} channels"
        raise ValueError(f"weight: got shape {list(weight.shape)}; accepted: {accepted}")
    if min(input.shape[2:]) < size:
        raise ValueError(f"input: got {list(input.shape)}; accepted: H and W of at least the patch size {size}")
    check_parameter("weight", weight, tuple(weight.shape), input)
    check_parameter("bias", bias, (outputs,), input)
    return CALL(input, weight, bias, requested_backend(backend))
