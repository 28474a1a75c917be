"""The definition of a ConvNeXt block and its gradients: the references of its operators, one after the other."""

from convnext_kernels.ops.convnext_block.steps import Steps
from convnext_kernels.ops.depthwise_conv import reference as depthwise_conv
from convnext_kernels.ops.depthwise_conv_layer_norm import reference as depthwise_conv_layer_norm
from convnext_kernels.ops.layer_norm import reference as layer_norm
from convnext_kernels.ops.mlp import reference as mlp

_steps = Steps(depthwise_conv_layer_norm, depthwise_conv, layer_norm, mlp)
forward, backward = _steps.forward, _steps.backward
