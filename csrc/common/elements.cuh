// The types of tensors' elements.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "common/element_type.h"

namespace convnext_kernels {

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

// Rounded to nearest, ties to even.
template <typename Element>
__device__ __forceinline__ Element from_float(float value) {
  if constexpr (std::is_same_v<Element, __half>) {
    return __float2half_rn(value);
  } else if constexpr (std::is_same_v<Element, __nv_bfloat16>) {
    return __float2bfloat16_rn(value);
  } else {
    static_assert(std::is_same_v<Element, float>, "Element is float, __half or __nv_bfloat16");
    return value;
  }
}

// An element of a tensor of parameters, whose type, Element or float32, is known at run time.
template <typename Element>
__device__ __forceinline__ float parameter_at(void const* parameters, ElementType type, std::int64_t index) {
  return type == ElementType::float32 ? static_cast<float const*>(parameters)[index]
                                      : to_float(static_cast<Element const*>(parameters)[index]);
}

}  // namespace convnext_kernels
