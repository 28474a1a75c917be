// Depthwise convolution of images in NHWC, stride 1, zeros around the image, output of the input's size:
//   output[n, y, x, c] = bias[c] + sum over i, j of weight[c, i, j] input[n, y + i - K / 2, x + j - K / 2, c]
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/element_type.h"

namespace convnext_kernels {

// In elements; channels lie next to each other.
struct ImageStrides {
  std::int64_t image, row, pixel;
};

struct DepthwiseConvForwardParams {
  void const* input;   // [batch, height, width, channels]
  void const* weight;  // [channels, kernel_size, kernel_size], contiguous
  void const* bias;    // [channels], or null for none
  void* output;        // [batch, height, width, channels]
  ImageStrides input_strides;
  ImageStrides output_strides;
  ElementType type;            // of input and output: float16 or bfloat16
  ElementType parameter_type;  // of weight and bias: the same, or float32
  std::int64_t batch;
  int height, width, channels;
  int kernel_size;  // 3, 5 or 7
};

// On tensor cores: the filter is rounded to the input's type, products are summed in float, the sum is rounded once.
// Outputs are computed in segments of eight by two rows, out of sixteen inputs a row: a NaN or an infinity among these
// makes the whole segment NaN, in the window's rows and one row beside them.
//
// Returns cudaErrorInvalidValue for a size below 1 (the batch may be empty), cudaErrorNotSupported for other types or
// kernel sizes, for channels or strides that are not even, and for tensors not aligned to 4 bytes; else the launch's.
cudaError_t launch_depthwise_conv_forward(DepthwiseConvForwardParams const& params, cudaStream_t stream);

}  // namespace convnext_kernels
