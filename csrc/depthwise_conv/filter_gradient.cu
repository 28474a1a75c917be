#include "depthwise_conv/filter_gradient.h"

#include "depthwise_conv/filter_gradient_paths.cuh"

namespace convnext_kernels {
namespace {

bool valid_sizes(DepthwiseConvFilterGradientParams const& params) {
  return params.batch >= 0 && params.height > 0 && params.width > 0 && params.channels > 0;
}

// Whether two channels lie in one aligned word everywhere.
bool pairs_of_channels(void const* tensor, ImageStrides const& strides, int channels) {
  bool const aligned = reinterpret_cast<std::uintptr_t>(tensor) % sizeof(std::uint32_t) == 0;
  return aligned && (strides.image | strides.row | strides.pixel | channels) % 2 == 0;
}

bool on_tensor_cores(DepthwiseConvFilterGradientParams const& params) {
  return params.type != ElementType::float32 &&
         pairs_of_channels(params.grad_output, params.grad_output_strides, params.channels) &&
         pairs_of_channels(params.input, params.input_strides, params.channels);
}

// Blocks run in waves, each as long as its longest block: the number of splits that ends first, on an H200 with its
// 132 multiprocessors, for any device, as the result must not depend on the device.
std::int64_t best_splits(FilterGradientWork const& work) {
  constexpr std::int64_t multiprocessors = 132;
  std::int64_t const wave = multiprocessors * work.resident_blocks;
  std::int64_t best = 1, best_time = 0;
  for (std::int64_t splits = 1; splits <= wave; ++splits) {
    std::int64_t const waves = ceil_div(work.channel_blocks * splits, wave);
    std::int64_t const time = waves * (ceil_div(work.units, splits) + work.overhead);
    if (splits == 1 || time < best_time) {
      best = splits;
      best_time = time;
    }
  }
  return best;
}

}  // namespace

std::int64_t filter_gradient_splits(DepthwiseConvFilterGradientParams const& params) {
  if (!valid_sizes(params)) {
    return 1;
  }
  return best_splits(params.type == ElementType::float32 ? filter_gradient_work_on_cuda_cores(params)
                                                         : filter_gradient_work_on_tensor_cores(params));
}

cudaError_t launch_depthwise_conv_filter_gradient(DepthwiseConvFilterGradientParams const& params,
                                                  cudaStream_t stream) {
  if (!valid_sizes(params)) {
    return cudaErrorInvalidValue;
  }
  std::int64_t const splits = filter_gradient_splits(params);
  return on_tensor_cores(params) ? launch_filter_gradient_on_tensor_cores(params, splits, stream)
                                 : launch_filter_gradient_on_cuda_cores(params, splits, stream);
}

}  // namespace convnext_kernels
