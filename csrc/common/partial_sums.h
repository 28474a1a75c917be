// The second pass of a deterministic reduction.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace convnext_kernels {

// sums[e] = partials[0, e] + ... + partials[count - 1, e], added in an order that `count` alone fixes; partials are
// [count, elements]. A count of 0 gives zeros. Returns cudaErrorInvalidValue for negative sizes, else the launch's.
cudaError_t launch_partial_sums(float const* partials, std::int64_t count, std::int64_t elements, float* sums,
                                cudaStream_t stream);

}  // namespace convnext_kernels
