"""The definition of depthwise convolution + LayerNorm and its gradients: one reference after the other."""

from convnext_kernels.ops.depthwise_conv import reference as depthwise_conv
from convnext_kernels.ops.depthwise_conv_layer_norm.two_steps import TwoSteps
from convnext_kernels.ops.layer_norm import reference as layer_norm

_two_steps = TwoSteps(depthwise_conv, layer_norm)
forward, forward_normalized, backward = _two_steps.forward, _two_steps.forward_normalized, _two_steps.backward
