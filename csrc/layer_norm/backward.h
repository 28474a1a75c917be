// The gradients of LayerNorm, with x = (input - mean) rstd and g = grad_output weight:
//   grad_input[t, c] = rstd[t] (g[t, c] - mean over channels of g[t] - x[t, c] (mean over channels of g[t] x[t]))
//   grad_weight[c]   = sum over t of grad_output[t, c] x[t, c]
//   grad_bias[c]     = sum over t of grad_output[t, c]
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/element_type.h"

namespace convnext_kernels {

struct LayerNormBackwardParams {
  void const* grad_output;  // [tokens, channels], contiguous
  void const* input;        // [tokens, channels], contiguous
  void const* weight;       // [channels], or null for ones
  float const* mean;        // [tokens], or null: then input is x, normalised already
  float const* rstd;        // [tokens]
  // [tokens / tokens_per_image], or null: the tokens of an image whose factor is 0 are skipped. Their grad_input is 0
  // and they add nothing to the sums, whatever they hold.
  float const* drop_path_factor;
  void* grad_input;  // [tokens, channels], contiguous, or null if not wanted
  // [layer_norm_backward_splits, 2, channels], or null if not wanted: grad_weight and grad_bias, summed over a part of
  // the tokens each. launch_partial_sums adds them up.
  float* partials;
  ElementType type;            // of grad_output, input and grad_input
  ElementType parameter_type;  // of weight: the same, or float32
  std::int64_t tokens;
  std::int64_t tokens_per_image;  // read only where there are drop path factors
  int channels;
};

// How many partial sums the launch writes: at least 1, a matter of type and sizes alone.
std::int64_t layer_norm_backward_splits(LayerNormBackwardParams const& params);

// Everything in float, in an order that type, sizes and alignment to 16 bytes fix; grad_input is rounded once.
//
// Returns cudaErrorInvalidValue for channels below 1 or tokens below 0, else the launch's.
cudaError_t launch_layer_norm_backward(LayerNormBackwardParams const& params, cudaStream_t stream);

}  // namespace convnext_kernels
