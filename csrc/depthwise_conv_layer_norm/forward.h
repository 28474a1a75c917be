// Depthwise convolution, then LayerNorm over channels, in one pass over memory:
//   output = layer_norm(depthwise_conv(input, weight, bias), norm_weight, norm_bias, eps)
// see depthwise_conv/forward.h and layer_norm/forward.h.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/element_type.h"
#include "common/images.h"

namespace convnext_kernels {

struct DepthwiseConvLayerNormForwardParams {
  void const* input;        // [batch, height, width, channels]
  void const* weight;       // [channels, kernel_size, kernel_size], contiguous
  void const* bias;         // [channels], or null for none
  void const* norm_weight;  // [channels], or null for ones
  void const* norm_bias;    // [channels], or null for zeros
  float const* drop_path_factor;  // [batch], or null: of an image whose factor is 0 every result is 0
  void* output;             // [batch, height, width, channels], contiguous
  void* convolved;          // the convolution, like output, or null if not wanted
  float* mean;              // [batch, height, width], or null if not wanted
  float* rstd;              // [batch, height, width], or null if not wanted
  ImageStrides input_strides;
  ElementType type;                 // of input, output and convolved: float16 or bfloat16
  ElementType parameter_type;       // of weight and bias: the same, or float32
  ElementType norm_parameter_type;  // of norm_weight and norm_bias: the same as type, or float32
  std::int64_t batch;
  int height, width, channels;
  int kernel_size;  // 3, 5 or 7
  float eps;
};

// Whether whole pixels of a tile fit into shared memory, so that one pass does it: for float16 and bfloat16, few enough
// channels and what the tensor cores ask for, as in depthwise_conv/forward.h.
bool in_one_pass(DepthwiseConvLayerNormForwardParams const& params);

// On tensor cores. The convolution is rounded to the tensors' type before it is normalised, as it is where it is saved.
//
// Returns cudaErrorInvalidValue for a size below 1 (the batch may be empty), cudaErrorNotSupported where in_one_pass says
// no; else the launch's.
cudaError_t launch_depthwise_conv_layer_norm_forward(DepthwiseConvLayerNormForwardParams const& params,
                                                     cudaStream_t stream);

}  // namespace convnext_kernels
