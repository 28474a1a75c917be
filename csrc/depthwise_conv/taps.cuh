// A depthwise filter in memory.
#pragma once

#include <cstdint>

#include "common/elements.cuh"

namespace convnext_kernels {

// [channels, kernel_size, kernel_size], read forward or flipped in both axes.
template <typename Parameter, int kernel_size>
struct Taps {
  static constexpr int count = kernel_size * kernel_size;

  Parameter const* weight;
  bool flip;

  __device__ __forceinline__ float operator()(int channel, int i, int j) const {
    int const tap = i * kernel_size + j;
    return to_float(weight[std::int64_t{channel} * count + (flip ? count - 1 - tap : tap)]);
  }
};

}  // namespace convnext_kernels
