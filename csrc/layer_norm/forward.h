// LayerNorm of tokens over their channels:
//   output[t, c] = (input[t, c] - mean[t]) rstd[t] weight[c] + bias[c],   rstd[t] = 1 / sqrt(variance[t] + eps)
// with the variance as the mean of (input - mean)^2.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/element_type.h"

namespace convnext_kernels {

struct LayerNormForwardParams {
  void const* input;   // [tokens, channels], contiguous
  void const* weight;  // [channels], or null for ones
  void const* bias;    // [channels], or null for zeros
  void* output;        // [tokens, channels], contiguous
  float* mean;         // [tokens], or null if not wanted
  float* rstd;         // [tokens], or null if not wanted
  ElementType type;            // of input and output
  ElementType parameter_type;  // of weight and bias: the same, or float32
  std::int64_t tokens;
  int channels;
  float eps;
};

// Mean and variance in float, in two passes over values held in registers; the result is rounded once.
//
// Returns cudaErrorInvalidValue for channels below 1 or tokens below 0, else the launch's.
cudaError_t launch_layer_norm_forward(LayerNormForwardParams const& params, cudaStream_t stream);

}  // namespace convnext_kernels
