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
  // [tokens / tokens_per_image], or null: the tokens of an image whose factor is 0 are not read. Their output and mean
  // are 0, their rstd is finite.
  float const* drop_path_factor;
  void* output;        // [tokens, channels], contiguous
  float* mean;         // [tokens], or null if not wanted
  float* rstd;         // [tokens], or null if not wanted
  ElementType type;            // of input and output
  ElementType parameter_type;  // of weight and bias: the same, or float32
  std::int64_t tokens;
  std::int64_t tokens_per_image;  // read only where there are drop path factors
  int channels;
  float eps;
};

// Mean and variance in float, in two passes over values held in registers; the result is rounded once.
//
// Returns cudaErrorInvalidValue for channels below 1 or tokens below 0, else the launch's.
cudaError_t launch_layer_norm_forward(LayerNormForwardParams const& params, cudaStream_t stream);

}  // namespace convnext_kernels
