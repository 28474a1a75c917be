// Depthwise convolution of images, stride 1, zeros around the image, output of the input's size:
//   output[n, y, x, c] = bias[c] + sum over i, j of weight[c, i, j] input[n, y + i - K / 2, x + j - K / 2, c]
//                      + residual[n, y, x, c]
// The gradient with respect to the input is the same with the filter flipped.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/element_type.h"
#include "common/images.h"

namespace convnext_kernels {

struct DepthwiseConvForwardParams {
  void const* input;     // [batch, height, width, channels]
  void const* weight;    // [channels, kernel_size, kernel_size], contiguous
  void const* bias;      // [channels], or null for none
  void const* residual;  // as output, strides included, or null for none
  // [batch], or null: the convolution of an image whose factor is 0 is skipped and counts as 0, whatever the image holds.
  // Other factors change nothing.
  float const* drop_path_factor;
  void* output;  // [batch, height, width, channels]
  ImageStrides input_strides;
  ImageStrides output_strides;
  ElementType type;            // of input, residual and output
  ElementType parameter_type;  // of weight and bias: the same, or float32
  std::int64_t batch;
  int height, width, channels;
  int kernel_size;    // 3, 5 or 7
  bool flip_filter;  // take weight[c, K - 1 - i, K - 1 - j] instead
};

// Products are summed in float and the sum is rounded once. On tensor cores where `on_tensor_cores` says so, the filter
// then rounded to the input's type; else on CUDA cores.
//
// Returns cudaErrorInvalidValue for a size below 1 (the batch may be empty), cudaErrorNotSupported for other types or
// kernel sizes; else the launch's.
cudaError_t launch_depthwise_conv_forward(DepthwiseConvForwardParams const& params, cudaStream_t stream);

// Whether the convolution runs on tensor cores: float16 or bfloat16, channels and strides even, tensors aligned to 4
// bytes.
bool on_tensor_cores(DepthwiseConvForwardParams const& params);

}  // namespace convnext_kernels
