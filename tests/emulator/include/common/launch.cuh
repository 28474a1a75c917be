// Runs a kernel's blocks one after the other: stands in for csrc/common/launch.cuh.
#pragma once

#include <cuda_runtime.h>

#include "common/shared.cuh"

namespace convnext_kernels {

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared_bytes, cudaStream_t,
                   Arguments const&... arguments) {
  constexpr std::size_t most_shared_bytes = 163 * 1024;  // of a block on sm_80; later ones have more
  constexpr unsigned most_threads = 1024, most_blocks_y_or_z = 65535, most_blocks_x = 0x7fffffff;
  std::size_t const threads = std::size_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > most_threads || shared_bytes > most_shared_bytes) {
    return cudaErrorInvalidValue;
  }
  if (!grid.x || !grid.y || !grid.z || grid.x > most_blocks_x || grid.y > most_blocks_y_or_z ||
      grid.z > most_blocks_y_or_z) {
    return cudaErrorInvalidConfiguration;
  }
  emulator::Region dynamic(shared_bytes);
  emulator::dynamic_region = &dynamic;
  emulator::block.kernel = [&] { kernel(Parameters(arguments)...); };
  gridDim = grid;
  blockDim = block;
  for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z) {
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y) {
      for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
        emulator::Region::forget_all();
        emulator::block.run();
      }
    }
  }
  emulator::dynamic_region = nullptr;
  return cudaSuccess;
}

}  // namespace convnext_kernels
