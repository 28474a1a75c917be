// What this library was built with, and what of it a device can run.
#pragma once

#include <cuda_runtime_api.h>

namespace convnext_kernels {

struct BuildInfo {
  char const* version;        // of the package that the library belongs to: "0.1.0"
  char const* nvcc;           // release of the compiler: "13.0.88"
  char const* architectures;  // those with machine code in the library: "80,90a"
  char const* ptx;            // the one whose PTX is in the library, for later devices: "90"
};

BuildInfo build_info();

enum class DeviceCode {
  machine_code,  // the library holds machine code that the device runs
  ptx,           // the driver translates the library's PTX for the device
  none,          // the library holds nothing that the device can run
  unavailable,   // there is no driver, no such device, or it cannot be used now
};

struct DeviceSupport {
  DeviceCode code;
  cudaError_t status;  // the reason for `none` and `unavailable`, else cudaSuccess
};

// Asks the driver, which creates the device's context. The calling thread's current device stays what it was.
DeviceSupport device_support(int device);

}  // namespace convnext_kernels
