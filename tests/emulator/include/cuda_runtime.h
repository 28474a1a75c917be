// Of CUDA C++, the language and the runtime, what kernels use.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "block.h"
#include "cuda_runtime_api.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // one block runs at a time

using std::isfinite;
using std::isnan;
using std::max;
using std::min;

inline float rsqrtf(float value) { return 1.0f / std::sqrt(value); }

struct alignas(8) uint2 {
  unsigned x, y;
};

struct alignas(8) float2 {
  float x, y;
};

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline void __syncthreads(char const* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emulator::block.barrier({file, line});
}

// A barrier after which every thread knows whether the predicate holds for any.
inline int __syncthreads_or(int predicate, char const* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emulator::Block& block = emulator::block;
  block.vote = block.vote || predicate;
  block.barrier({file, line});
  int const result = block.vote;
  block.barrier({file, line});
  block.vote = false;
  return result;
}

inline void __syncwarp(unsigned mask = 0xffffffff, char const* file = __builtin_FILE(), int line = __builtin_LINE()) {
  int nothing = 0;
  emulator::block.collective(mask, nothing, {file, line}, [](int**) {
    ++emulator::block.warp_epochs[emulator::block.current->number / emulator::warp_size];
  });
}

namespace emulator {

template <typename T>
struct Shuffle {
  T value;
  int source;
};

// Every lane gets the value of its source, which must take part.
template <typename T>
T shuffle(unsigned mask, T value, int source, Site site) {
  Shuffle<T> operand{value, source};
  block.collective(mask, operand, site, [](Shuffle<T>** lanes) {
    T received[warp_size] = {};
    for (int lane = 0; lane < warp_size; ++lane) {
      if (lanes[lane]) {
        if (!lanes[lanes[lane]->source]) {
          report("lane %d shuffles from lane %d, which takes no part", lane, lanes[lane]->source);
        }
        received[lane] = lanes[lanes[lane]->source]->value;
      }
    }
    for (int lane = 0; lane < warp_size; ++lane) {
      if (lanes[lane]) {
        lanes[lane]->value = received[lane];
      }
    }
  });
  return operand.value;
}

inline int lane() { return block.current->number % warp_size; }

}  // namespace emulator

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, char const* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return emulator::shuffle(mask, value, source & 31, {file, line});
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, char const* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return emulator::shuffle(mask, value, emulator::lane() ^ bits, {file, line});
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, int by, char const* file = __builtin_FILE(), int line = __builtin_LINE()) {
  int const source = emulator::lane() + by;
  return emulator::shuffle(mask, value, source < emulator::warp_size ? source : emulator::lane(), {file, line});
}

inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  std::uint64_t const bytes = static_cast<std::uint64_t>(high) << 32 | low;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    result |= static_cast<unsigned>(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  }
  return result;
}
