// The PTX instructions in use, each as one function; fragment layouts are those of the PTX manual.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "common/shared.cuh"

namespace convnext_kernels {

// Makes the compiler hold the value from here on, in place of computing it again from what it was made of.
__device__ __forceinline__ void keep(std::uint32_t& value) { asm volatile("" : "+r"(value)); }

__device__ __forceinline__ void keep(char const*& value) { asm volatile("" : "+l"(value)); }

// Keeps accesses to memory on their side of it: the compiler moves no loads up, to wait in registers.
__device__ __forceinline__ void keep_in_order() { asm volatile("" ::: "memory"); }

template <typename T>
__device__ __forceinline__ std::uint32_t shared_address(SharedPointer<T> pointer) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}

// Starts the copy of one element of 4, 8 or 16 bytes from global memory; where `valid` is 0 it writes zeros and reads
// nothing. The element is there after cp_async_wait, for other threads after a barrier that follows it.
template <typename T>
__device__ __forceinline__ void cp_async(SharedPointer<T> destination, T const* source, unsigned valid) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "cp.async copies 4, 8 or 16 bytes");
  asm volatile(
      "{\n"
      "  .reg .pred ignored;\n"
      "  setp.eq.u32 ignored, %3, 0;\n"
      "  cp.async.ca.shared.global [%0], [%1], %2, ignored;\n"
      "}" ::"r"(shared_address(destination)),
      "l"(source), "n"(sizeof(T)), "r"(valid)
      : "memory");
}

// Closes the group of this thread's copies since the last commit.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until no more than `pending` of this thread's groups are under way.
template <int pending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// d += a b with a [16, 16], b [16, 8] of T (__half or __nv_bfloat16) and d [16, 8] of float. Lane 4 g + q holds, two
// elements to a register, the lower column (of b: row) in its lower half:
//   a[0], a[1], a[2], a[3]: columns 2 q, 2 q + 1 of row g, of row g + 8, then columns 2 q + 8, 2 q + 9 of both rows
//   b[0], b[1]: rows 2 q, 2 q + 1, then rows 2 q + 8, 2 q + 9 of column g
//   d[0..1], d[2..3]: columns 2 q, 2 q + 1 of row g, of row g + 8
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], std::uint32_t const (&a)[4], std::uint32_t const (&b)[2]) {
  if constexpr (std::is_same_v<T, __half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    static_assert(std::is_same_v<T, __nv_bfloat16>, "T is __half or __nv_bfloat16");
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

// a * b + c of both halves, each rounded once.
template <typename T>
__device__ __forceinline__ std::uint32_t multiply_add_pairs(std::uint32_t a, std::uint32_t b, std::uint32_t c) {
  std::uint32_t result;
  if constexpr (std::is_same_v<T, __half>) {
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
  } else {
    static_assert(std::is_same_v<T, __nv_bfloat16>, "T is __half or __nv_bfloat16");
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
  }
  return result;
}

// Two floats rounded to T, nearest and ties to even, `low` in the lower half.
template <typename T>
__device__ __forceinline__ std::uint32_t pack(float low, float high) {
  std::uint32_t packed;
  if constexpr (std::is_same_v<T, __half>) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  } else {
    static_assert(std::is_same_v<T, __nv_bfloat16>, "T is __half or __nv_bfloat16");
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  }
  return packed;
}

// Two elements, or floats to be rounded, as a pair of T.
template <typename T, typename From>
__device__ __forceinline__ std::uint32_t pack_as(From low, From high) {
  if constexpr (std::is_same_v<From, float>) {
    return pack<T>(low, high);
  } else {
    static_assert(std::is_same_v<From, T>, "From is float or T");
    std::uint16_t bits[2];
    memcpy(bits, &low, sizeof low);
    memcpy(bits + 1, &high, sizeof high);
    return bits[0] | static_cast<std::uint32_t>(bits[1]) << 16;
  }
}

// The floats of a packed pair, the lower half first.
template <typename T>
__device__ __forceinline__ float2 unpack(std::uint32_t packed) {
  if constexpr (std::is_same_v<T, __half>) {
    auto const bits = [](std::uint32_t half) { return __ushort_as_half(static_cast<unsigned short>(half)); };
    return {__half2float(bits(packed & 0xffff)), __half2float(bits(packed >> 16))};
  } else {
    static_assert(std::is_same_v<T, __nv_bfloat16>, "T is __half or __nv_bfloat16");
    return {__uint_as_float(packed << 16), __uint_as_float(packed & 0xffff0000)};
  }
}

}  // namespace convnext_kernels
