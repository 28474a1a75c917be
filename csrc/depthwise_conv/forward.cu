#include "depthwise_conv/forward.h"

#include "depthwise_conv/paths.h"

namespace convnext_kernels {
namespace {

// Whether two channels lie in one aligned word everywhere.
bool pairs_of_channels(void const* tensor, ImageStrides const& strides, int channels) {
  bool const aligned = reinterpret_cast<std::uintptr_t>(tensor) % sizeof(std::uint32_t) == 0;
  return aligned && (strides.image | strides.row | strides.pixel | channels) % 2 == 0;
}

bool supported(DepthwiseConvForwardParams const& params) {
  bool const size_fits = params.kernel_size == 3 || params.kernel_size == 5 || params.kernel_size == 7;
  return size_fits && (params.parameter_type == params.type || params.parameter_type == ElementType::float32);
}

}  // namespace

bool on_tensor_cores(DepthwiseConvForwardParams const& params) {
  return params.type != ElementType::float32 && pairs_of_channels(params.input, params.input_strides, params.channels) &&
         pairs_of_channels(params.residual, params.output_strides, params.channels) &&
         pairs_of_channels(params.output, params.output_strides, params.channels);
}

cudaError_t launch_depthwise_conv_forward(DepthwiseConvForwardParams const& params, cudaStream_t stream) {
  if (params.batch < 0 || params.height < 1 || params.width < 1 || params.channels < 1) {
    return cudaErrorInvalidValue;
  }
  if (!supported(params)) {
    return cudaErrorNotSupported;
  }
  if (params.batch == 0) {
    return cudaSuccess;
  }
  return on_tensor_cores(params) ? launch_depthwise_conv_on_tensor_cores(params, stream)
                                 : launch_depthwise_conv_on_cuda_cores(params, stream);
}

}  // namespace convnext_kernels
