// The PTX instructions in use, by their definitions in the PTX manual: stands in for csrc/common/ptx.cuh.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <array>
#include <cstdint>
#include <type_traits>

#include "common/shared.cuh"

namespace emulator {

constexpr unsigned all_lanes = 0xffffffff;

template <typename T>
float half_of(std::uint32_t packed, int which) {
  auto const bits = static_cast<std::uint16_t>(packed >> 16 * which);
  if constexpr (std::is_same_v<T, __half>) {
    return __half2float({bits});
  } else {
    static_assert(std::is_same_v<T, __nv_bfloat16>);
    return __bfloat162float({bits});
  }
}

template <typename T>
std::uint32_t rounded_bits(float value) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(value).bits;
  } else {
    static_assert(std::is_same_v<T, __nv_bfloat16>);
    return __float2bfloat16_rn(value).bits;
  }
}

struct MmaOperand {
  float (&d)[4];
  std::uint32_t const (&a)[4];
  std::uint32_t const (&b)[2];
};

}  // namespace emulator

namespace convnext_kernels {

template <typename T>
void keep(T&) {}

inline void keep_in_order() {}

template <typename T>
void cp_async(SharedPointer<T> destination, T const* source, unsigned valid, char const* file = __builtin_FILE(),
              int line = __builtin_LINE()) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "cp.async copies 4, 8 or 16 bytes");
  emulator::Thread& thread = *emulator::block.current;
  std::array<std::byte, sizeof(T)> bytes{};
  if (valid) {
    if (reinterpret_cast<std::uintptr_t>(source) % sizeof(T) != 0) {
      emulator::report("misaligned: thread %d copies %zu bytes from %p", thread.number, sizeof(T),
                       static_cast<void const*>(source));
    }
    std::memcpy(&bytes, source, sizeof(T));
  }
  destination.region()->start_copy(thread, destination.offset(), sizeof(T));
  auto const land = [=, &thread] { destination.region()->land(thread, destination.offset(), &bytes, sizeof(T)); };
  thread.open_group.push_back({land, {file, line}});
}

inline void cp_async_commit() {
  emulator::Thread& thread = *emulator::block.current;
  thread.groups.push_back(std::move(thread.open_group));
  thread.open_group.clear();
}

template <int pending>
void cp_async_wait() {
  emulator::Thread& thread = *emulator::block.current;
  for (; thread.groups.size() > pending; thread.groups.pop_front()) {
    for (emulator::Copy const& copy : thread.groups.front()) {
      copy.land();
    }
  }
}

template <typename T>
void mma_m16n8k16(float (&d)[4], std::uint32_t const (&a)[4], std::uint32_t const (&b)[2],
                  char const* file = __builtin_FILE(), int line = __builtin_LINE()) {
  using emulator::MmaOperand;
  MmaOperand operand{d, a, b};
  emulator::block.collective(emulator::all_lanes, operand, {file, line}, [](MmaOperand** lanes) {
    float matrix_a[16][16], matrix_b[16][8];
    for (int lane = 0; lane < emulator::warp_size; ++lane) {
      int const g = lane / 4, q = lane % 4;
      for (int i = 0; i < 2; ++i) {
        for (int half = 0; half < 2; ++half) {
          int const k = 2 * q + 8 * half + i;
          matrix_a[g][k] = emulator::half_of<T>(lanes[lane]->a[2 * half], i);
          matrix_a[g + 8][k] = emulator::half_of<T>(lanes[lane]->a[2 * half + 1], i);
          matrix_b[k][g] = emulator::half_of<T>(lanes[lane]->b[half], i);
        }
      }
    }
    for (int lane = 0; lane < emulator::warp_size; ++lane) {
      for (int i = 0; i < 4; ++i) {
        int const row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
        for (int k = 0; k < 16; ++k) {
          lanes[lane]->d[i] += matrix_a[row][k] * matrix_b[k][column];
        }
      }
    }
  });
}

template <typename T>
std::uint32_t multiply_add_pairs(std::uint32_t a, std::uint32_t b, std::uint32_t c) {
  std::uint32_t result = 0;
  for (int i = 0; i < 2; ++i) {
    using emulator::half_of;
    double const value = double{half_of<T>(a, i)} * half_of<T>(b, i) + half_of<T>(c, i);  // exact but for far exponents
    result |= emulator::rounded_bits<T>(static_cast<float>(value)) << 16 * i;
  }
  return result;
}

template <typename T>
float2 unpack(std::uint32_t packed) {
  return {emulator::half_of<T>(packed, 0), emulator::half_of<T>(packed, 1)};
}

template <typename T>
std::uint32_t pack(float low, float high) {
  return emulator::rounded_bits<T>(low) | emulator::rounded_bits<T>(high) << 16;
}

template <typename T, typename From>
std::uint32_t pack_as(From low, From high) {
  if constexpr (std::is_same_v<From, float>) {
    return pack<T>(low, high);
  } else {
    static_assert(std::is_same_v<From, T>);
    return low.bits | static_cast<std::uint32_t>(high.bits) << 16;
  }
}

}  // namespace convnext_kernels
