// The gradient of a depthwise convolution with respect to filter and bias, of images [batch, height, width, channels]:
//   grad_weight[c, i, j] = sum over n, y, x of grad_output[n, y, x, c] input[n, y + i - K / 2, x + j - K / 2, c]
//   grad_bias[c]         = sum over n, y, x of grad_output[n, y, x, c]
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/element_type.h"
#include "common/images.h"

namespace convnext_kernels {

struct DepthwiseConvFilterGradientParams {
  void const* grad_output;
  void const* input;
  float const* drop_path_factor;  // [batch], or null: an image whose factor is 0 is skipped, whatever it holds
  // [filter_gradient_splits, channels * (kernel_size * kernel_size + 1)]: the sums over a part of the images each, first
  // grad_weight [channels, kernel_size, kernel_size], then grad_bias [channels]. launch_partial_sums adds them up.
  float* partials;
  ImageStrides grad_output_strides;
  ImageStrides input_strides;
  ElementType type;  // of grad_output and input
  std::int64_t batch;
  int height, width, channels;
  int kernel_size;  // 3, 5 or 7
};

// How many partial sums the launch writes: at least 1, a matter of type and sizes alone.
std::int64_t filter_gradient_splits(DepthwiseConvFilterGradientParams const& params);

// Products of the tensors' own values, summed in float in an order that type and sizes fix. On tensor cores for float16
// and bfloat16 with channels and strides even and tensors aligned to 4 bytes, else on CUDA cores. On tensor cores a NaN
// or an infinity in a channel may reach every element of that channel's gradient.
//
// Returns cudaErrorInvalidValue for a size below 1 (the batch may be empty: zeros), cudaErrorNotSupported for other
// kernel sizes; else the launch's.
cudaError_t launch_depthwise_conv_filter_gradient(DepthwiseConvFilterGradientParams const& params, cudaStream_t stream);

}  // namespace convnext_kernels
