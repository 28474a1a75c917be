// Pixels in the registers of the lanes that normalise them.
#pragma once

#include <cuda_runtime.h>

#include "common/element_type.h"
#include "common/elements.cuh"

namespace convnext_kernels {

// The sum over the lanes of a pixel, the same in each.
template <typename Traits>
__device__ __forceinline__ float sum_over_lanes(float value) {
#pragma unroll
  for (int distance = 1; distance < Traits::lanes; distance *= 2) {
    value += __shfl_xor_sync(0xffffffff, value, distance);
  }
  return value;
}

// A lane's part of a pixel, or of what belongs to its channels: words lane, lane + 8, ... of two channels each. Where it
// is exact all of them exist.
template <typename Traits, int count, bool exact>
struct LaneWords {
  float2 values[count];

  __device__ __forceinline__ static int word(int i) { return i * Traits::lanes + threadIdx.x % Traits::lanes; }
  __device__ __forceinline__ static bool exists(int i, int words) { return exact || word(i) < words; }

  template <typename Parameter>
  __device__ __forceinline__ void load(Parameter const* parameter, int words, float otherwise) {
#pragma unroll
    for (int i = 0; i < count; ++i) {
      values[i] = parameter && exists(i, words) ? float2{to_float(parameter[2 * word(i)]), to_float(parameter[2 * word(i) + 1])}
                                                : float2{otherwise, otherwise};
    }
  }

  __device__ __forceinline__ void load(void const* parameter, ElementType type, int words, float otherwise) {
    if (type == ElementType::float32) {
      load(static_cast<float const*>(parameter), words, otherwise);
    } else {
      load(static_cast<typename Traits::Element const*>(parameter), words, otherwise);
    }
  }

  // Returns the mean over all channels, and the values become their distances from it; behind the last both are 0.
  __device__ __forceinline__ float center(int words, float scale) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < count; ++i) {
      sum += values[i].x + values[i].y;
    }
    float const mean = sum_over_lanes<Traits>(sum) * scale;
#pragma unroll
    for (int i = 0; i < count; ++i) {
      float const distance = exists(i, words) ? mean : 0.0f;
      values[i] = {values[i].x - distance, values[i].y - distance};
    }
    return mean;
  }

  __device__ __forceinline__ float sum_of_squares() const {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < count; ++i) {
      sum += values[i].x * values[i].x + values[i].y * values[i].y;
    }
    return sum_over_lanes<Traits>(sum);
  }
};

}  // namespace convnext_kernels
