// A depthwise filter in memory, and what a single output takes.
#pragma once

#include <cstdint>

#include "common/elements.cuh"
#include "depthwise_conv/forward.h"

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

__device__ __forceinline__ bool is_dropped(DepthwiseConvForwardParams const& params, std::int64_t image) {
  return params.drop_path_factor && params.drop_path_factor[image] == 0.0f;
}

// One output, without the residual, from its own window alone; the filter is rounded to Element as on tensor cores.
template <typename Element, int kernel_size, typename Parameter>
__device__ float convolve_window_as(DepthwiseConvForwardParams const& params, std::int64_t image, int row, int column,
                                    int channel) {
  constexpr int radius = kernel_size / 2;
  Taps<Parameter, kernel_size> const taps{static_cast<Parameter const*>(params.weight), params.flip_filter};
  ImageStrides const& strides = params.input_strides;
  Element const* const input = static_cast<Element const*>(params.input) + image * strides.image + channel;
  float sum = params.bias ? to_float(static_cast<Parameter const*>(params.bias)[channel]) : 0.0f;
  for (int i = 0; i < kernel_size; ++i) {
    for (int j = 0; j < kernel_size; ++j) {
      int const y = row + i - radius, x = column + j - radius;
      if (y >= 0 && y < params.height && x >= 0 && x < params.width) {
        float const tap = to_float(from_float<Element>(taps(channel, i, j)));
        sum += tap * to_float(input[y * strides.row + x * strides.pixel]);
      }
    }
  }
  return sum;
}

template <typename Element, int kernel_size>
__device__ float convolve_window(DepthwiseConvForwardParams const& params, std::int64_t image, int row, int column,
                                 int channel) {
  return params.parameter_type == ElementType::float32
             ? convolve_window_as<Element, kernel_size, float>(params, image, row, column, channel)
             : convolve_window_as<Element, kernel_size, Element>(params, image, row, column, channel);
}

}  // namespace convnext_kernels
