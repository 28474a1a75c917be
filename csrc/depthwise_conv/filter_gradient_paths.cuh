// The two ways to compute the gradient of filter and bias, between which filter_gradient.cu chooses.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "common/integers.h"
#include "depthwise_conv/filter_gradient.h"

namespace convnext_kernels {

// What a launch has to do. A block adds up an equal part of the work for some channels.
struct FilterGradientWork {
  std::int64_t units;           // of one block's channels
  std::int64_t overhead;        // of a block besides its units, as so many units
  std::int64_t channel_blocks;  // that every split needs
  int resident_blocks;          // on a multiprocessor
};

FilterGradientWork filter_gradient_work_on_tensor_cores(DepthwiseConvFilterGradientParams const& params);
FilterGradientWork filter_gradient_work_on_cuda_cores(DepthwiseConvFilterGradientParams const& params);

// These write `splits` partial sums, whatever the number, of valid sizes.
cudaError_t launch_filter_gradient_on_tensor_cores(DepthwiseConvFilterGradientParams const& params, std::int64_t splits,
                                               cudaStream_t stream);
cudaError_t launch_filter_gradient_on_cuda_cores(DepthwiseConvFilterGradientParams const& params, std::int64_t splits,
                                             cudaStream_t stream);

// Where the part of a split begins, of `units` shared by `splits`; the part of `splits` begins at the end.
__host__ __device__ inline std::int64_t first_unit(std::int64_t units, std::int64_t splits, std::int64_t split) {
  std::int64_t const remainder = units % splits;
  return units / splits * split + (split < remainder ? split : remainder);
}

// Where a split's sums for a channel begin.
template <int kernel_size>
__device__ __forceinline__ float* weight_partial(DepthwiseConvFilterGradientParams const& params, std::int64_t split,
                                                 int channel) {
  constexpr int taps = kernel_size * kernel_size;
  return params.partials + split * params.channels * (taps + 1) + std::int64_t{channel} * taps;
}

template <int kernel_size>
__device__ __forceinline__ float* bias_partial(DepthwiseConvFilterGradientParams const& params, std::int64_t split,
                                               int channel) {
  return weight_partial<kernel_size>(params, split, params.channels) + channel;
}

// Calls launch(std::integral_constant<int, kernel_size>) for a kernel size that there are kernels for.
template <typename Launch>
cudaError_t with_kernel_size(int kernel_size, Launch const& launch) {
  switch (kernel_size) {
    case 3: return launch(std::integral_constant<int, 3>{});
    case 5: return launch(std::integral_constant<int, 5>{});
    case 7: return launch(std::integral_constant<int, 7>{});
    default: return cudaErrorNotSupported;
  }
}

}  // namespace convnext_kernels
