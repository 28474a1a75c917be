"""A ConvNeXt block with its convolution and norm in CUDA C++ and its products in Triton."""

from convnext_kernels.ops.convnext_block.steps import Steps
from convnext_kernels.ops.convnext_block.triton_kernel import fold, unfold
from convnext_kernels.ops.depthwise_conv import cuda_kernel as depthwise_conv
from convnext_kernels.ops.depthwise_conv_layer_norm import cuda_kernel as depthwise_conv_layer_norm
from convnext_kernels.ops.layer_norm import cuda_kernel as layer_norm
from convnext_kernels.ops.mlp import triton_kernel as mlp

_steps = Steps(depthwise_conv_layer_norm, depthwise_conv, layer_norm, mlp, mlp.takes_one_kernel, fold, unfold)
forward, backward = _steps.forward, _steps.backward
