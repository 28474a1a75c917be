// The two ways to convolve behind launch_depthwise_conv_forward, which has checked the arguments.
#pragma once

#include "depthwise_conv/forward.h"

namespace convnext_kernels {

cudaError_t launch_depthwise_conv_on_tensor_cores(DepthwiseConvForwardParams const& params, cudaStream_t stream);
cudaError_t launch_depthwise_conv_on_cuda_cores(DepthwiseConvForwardParams const& params, cudaStream_t stream);

}  // namespace convnext_kernels
