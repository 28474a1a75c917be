// Shared memory by names of our own, so that tests/emulator can watch every access; here they are plain pointers and
// arrays. In kernels, name the type of what is read (float x = tile[i], not auto): a watched element is no float yet.
#pragma once

#include <cuda_runtime.h>

namespace convnext_kernels {

template <typename T>
using SharedPointer = T*;

// Static shared memory: __shared__ SharedArray<float, 32> sums;
template <typename T, int count>
using SharedArray = T[count];

// The start of the dynamic shared memory, which is aligned to 16 bytes.
template <typename T>
__device__ __forceinline__ SharedPointer<T> dynamic_shared() {
  extern __shared__ __align__(16) unsigned char dynamic_shared_memory[];
  return reinterpret_cast<T*>(dynamic_shared_memory);
}

// The same bytes as elements of another type.
template <typename To, typename From>
__device__ __forceinline__ SharedPointer<To> reinterpret_shared(SharedPointer<From> pointer) {
  return reinterpret_cast<To*>(pointer);
}

}  // namespace convnext_kernels
