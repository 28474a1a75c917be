#include "common/build_info.h"

namespace convnext_kernels {
namespace {

// Built for the same architectures as every kernel of the library, so what holds for it holds for them.
__global__ void probe_kernel() {}

DeviceSupport current_device_support() {
  cudaFuncAttributes attributes;
  cudaError_t const status = cudaFuncGetAttributes(&attributes, probe_kernel);
  if (status != cudaSuccess) {
    return {DeviceCode::none, status};
  }
  // nvcc's machine code is of the architecture of its PTX; what the driver translated is of the device's, a later one.
  bool const as_built = attributes.binaryVersion == attributes.ptxVersion;
  return {as_built ? DeviceCode::machine_code : DeviceCode::ptx, cudaSuccess};
}

}  // namespace

BuildInfo build_info() {
  return {CONVNEXT_KERNELS_VERSION, CONVNEXT_KERNELS_NVCC, CONVNEXT_KERNELS_ARCHITECTURES, CONVNEXT_KERNELS_PTX};
}

DeviceSupport device_support(int device) {
  int previous_device = 0;
  DeviceSupport support{DeviceCode::unavailable, cudaGetDevice(&previous_device)};
  if (support.status == cudaSuccess) {
    support.status = cudaSetDevice(device);
  }
  if (support.status == cudaSuccess) {
    support = current_device_support();
    cudaSetDevice(previous_device);
  }
  cudaGetLastError();  // the runtime keeps the last error; the next launch must not find this one
  return support;
}

}  // namespace convnext_kernels
