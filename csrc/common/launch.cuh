// The one way to launch a kernel.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

namespace convnext_kernels {

// A block gets no more dynamic shared memory than this unless the kernel's attribute says so.
constexpr std::size_t shared_bytes_without_attribute = 48 * 1024;

// Launches on the current device. Arguments are converted to the kernel's parameters.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared_bytes, cudaStream_t stream,
                   Arguments const&... arguments) {
  if (shared_bytes > shared_bytes_without_attribute) {
    cudaError_t const status =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (status != cudaSuccess) {
      return status;
    }
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}

}  // namespace convnext_kernels
