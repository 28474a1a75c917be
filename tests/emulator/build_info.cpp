// Stands in for csrc/common/build_info.cu, whose question is for the driver.
#include "common/build_info.h"

namespace convnext_kernels {

BuildInfo build_info() { return {CONVNEXT_KERNELS_VERSION, "emulator", "emulator", "emulator"}; }

DeviceSupport device_support(int) { return {DeviceCode::unavailable, cudaSuccess}; }

}  // namespace convnext_kernels
