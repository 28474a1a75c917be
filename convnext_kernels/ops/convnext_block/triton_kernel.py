"""A ConvNeXt block in Triton: the kernels of its operators; of few channels, the MLP's also normalises its input."""

from convnext_kernels.ops.common.triton_layer_gradients import layer_gradients
from convnext_kernels.ops.convnext_block.steps import Steps
from convnext_kernels.ops.depthwise_conv import triton_kernel as depthwise_conv
from convnext_kernels.ops.depthwise_conv_layer_norm import triton_kernel as depthwise_conv_layer_norm
from convnext_kernels.ops.layer_norm import triton_kernel as layer_norm
from convnext_kernels.ops.mlp import triton_kernel as mlp

_steps = Steps(depthwise_conv_layer_norm, depthwise_conv, layer_norm, mlp, mlp.takes_one_kernel, layer_gradients)
forward, backward = _steps.forward, _steps.backward
