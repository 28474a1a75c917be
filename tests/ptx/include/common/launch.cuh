// Hands launches over to whoever runs the kernels' PTX: stands in for csrc/common/launch.cuh.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <tuple>

// A kernel by the place of its host's function, blocks, threads and bytes of shared memory, and its parameters with their
// sizes; false where it could not run.
extern "C" {
using Launcher = bool (*)(std::size_t kernel, unsigned const* grid, unsigned threads, std::size_t shared_bytes,
                          void const* const* parameters, std::size_t const* sizes, std::size_t count);
__attribute__((visibility("default"))) inline Launcher ptx_launcher = nullptr;
}

namespace convnext_kernels {

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared_bytes, cudaStream_t,
                   Arguments const&... arguments) {
  std::tuple<Parameters...> const values(arguments...);
  std::size_t const sizes[] = {sizeof(Parameters)...};
  unsigned const blocks[] = {grid.x, grid.y, grid.z};
  bool const ran = std::apply(
      [&](auto const&... parameters) {
        void const* const places[] = {&parameters...};
        return ptx_launcher(reinterpret_cast<std::size_t>(kernel), blocks, block.x, shared_bytes, places, sizes,
                            sizeof...(Parameters));
      },
      values);
  return ran ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace convnext_kernels
