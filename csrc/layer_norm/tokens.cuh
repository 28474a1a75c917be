// How LayerNorm's kernels share tokens among threads: a token lies in the registers of `lanes` threads next to each
// other, vector i * lanes + lane of it as item i of thread `lane`, and a block walks over groups of tokens. With up to
// three items the widths of ConvNeXt, powers of two and three times powers of two, leave no lane idle.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/element_type.h"
#include "common/integers.h"
#include "common/shared.cuh"
#include "common/vectors.cuh"

namespace convnext_kernels {

struct NormTraits {
  static constexpr int warp = 32;
  static constexpr int threads = 256;
  static constexpr int warps = threads / warp;
  static constexpr int most_items = 3;
  static constexpr int sums = 2;                    // over a token at once, the most
  static constexpr int scratch = 2 * warps * sums;  // floats of shared memory: two places to sum over warps, by turns
  static constexpr int four = 4;                    // floats that one instruction moves in shared memory
  static_assert(scratch % four == 0, "what follows the scratch is aligned");
};

struct TokenTiling {
  int channels, vectors;  // of a token
  int items;              // vectors of a thread
  int lane_bits;          // of the number of a thread in its token

  __host__ __device__ int lanes() const { return 1 << lane_bits; }                     // threads of a token
  __host__ __device__ int groups() const { return NormTraits::threads >> lane_bits; }  // tokens of a block at once
  __host__ __device__ int padded_vectors() const { return items << lane_bits; }
};

// As few idle places as can be, and of tilings with as many, the one with more in flight in each thread.
inline TokenTiling tile_tokens(int channels, int vector, int fewest_items) {
  TokenTiling best{channels, ceil_div(channels, vector), 0, 0};
  for (int items = fewest_items; items <= NormTraits::most_items; ++items) {
    TokenTiling tiling{channels, best.vectors, items, 0};
    while (tiling.groups() > 1 && tiling.padded_vectors() < tiling.vectors) {
      ++tiling.lane_bits;
    }
    bool const fits = tiling.padded_vectors() >= tiling.vectors;
    if (fits && (best.items == 0 || tiling.padded_vectors() <= best.padded_vectors())) {
      best = tiling;
    }
  }
  return best;
}

// Each value's sum over groups of so many lanes, a power of two.
template <int count>
__device__ __forceinline__ void butterfly(float (&values)[count], int lanes) {
#pragma unroll 1
  for (int bits = 1; bits < lanes; bits *= 2) {
#pragma unroll
    for (float& value : values) {
      value += __shfl_xor_sync(0xffffffff, value, bits);
    }
  }
}

// Adds up each value over the lanes of a token, in a fixed order; all threads of the block call it, and all lanes get
// the sums. Where a token has several warps there is a barrier in it, after which `scratch` is read: before the next
// barrier the block takes other scratch.
template <int count>
__device__ __forceinline__ void sum_over_lanes(float (&values)[count], int lanes, SharedPointer<float> scratch) {
  static_assert(count <= NormTraits::sums, "the scratch has room for so many sums");
  butterfly(values, min(lanes, NormTraits::warp));
  int const warps = lanes / NormTraits::warp;
  if (warps <= 1) {
    return;
  }
  int const warp = threadIdx.x / NormTraits::warp, lane = threadIdx.x % NormTraits::warp;
  if (lane == 0) {
#pragma unroll
    for (int i = 0; i < count; ++i) {
      scratch[warp * count + i] = values[i];
    }
  }
  __syncthreads();
  int const other = (warp & -warps) + (lane & (warps - 1));
#pragma unroll
  for (int i = 0; i < count; ++i) {
    values[i] = scratch[other * count + i];
  }
  butterfly(values, warps);
}

// The scratch of the block's round, of which the next has the other.
__device__ __forceinline__ SharedPointer<float> round_scratch(SharedPointer<float> scratch, int round) {
  return scratch + round % 2 * (NormTraits::scratch / 2);
}

// Whether there is such a token, and its image is not dropped.
template <typename Params>
__device__ __forceinline__ bool is_kept(Params const& params, std::int64_t token) {
  return token < params.tokens &&
         !(params.drop_path_factor && params.drop_path_factor[token / params.tokens_per_image] == 0.0f);
}

// This thread's part of each token.
template <typename Element, int vector, int items>
struct TokenShare {
  using Vectors = Vector<Element, vector>[items];

  int lanes, vectors, lane, group;

  __device__ explicit TokenShare(TokenTiling const& tiling)
      : lanes(tiling.lanes()),
        vectors(tiling.vectors),
        lane(threadIdx.x & (tiling.lanes() - 1)),
        group(threadIdx.x >> tiling.lane_bits) {}

  __device__ __forceinline__ int vector_of(int item) const { return item * lanes + lane; }
  __device__ __forceinline__ bool has(int item) const { return vector_of(item) < vectors; }

  // Zeros behind the last channel, and where the token is not wanted, nothing of which is then read.
  __device__ __forceinline__ void load(Vectors& loaded, Element const* token, bool wanted) const {
#pragma unroll
    for (int item = 0; item < items; ++item) {
      loaded[item] = {};
      if (wanted & has(item)) {
        loaded[item] = load_vector<vector>(token + vector_of(item) * vector);
      }
    }
  }
};

// A float for every channel of a token, padded, in shared memory. Fours of neighbours lie together, and those that a
// warp's lanes read at once next to each other.
template <int vector>
struct ChannelFloats {
  static constexpr int four = vector < NormTraits::four ? vector : NormTraits::four;
  struct alignas(four * sizeof(float)) Four {
    float values[four];
  };

  SharedPointer<float> floats;
  int vectors;

  __device__ ChannelFloats(SharedPointer<float> floats, TokenTiling const& tiling)
      : floats(floats), vectors(tiling.padded_vectors()) {}

  __device__ __forceinline__ SharedPointer<Four> fours(int part, int index) const {
    return reinterpret_shared<Four>(floats) + part * vectors + index;
  }

  __device__ __forceinline__ void load(float (&values)[vector], int index) const {
#pragma unroll
    for (int part = 0; part < vector / four; ++part) {
      Four const loaded = *fours(part, index);
#pragma unroll
      for (int i = 0; i < four; ++i) {
        values[part * four + i] = loaded.values[i];
      }
    }
  }

  __device__ __forceinline__ void store(float const (&values)[vector], int index) const {
#pragma unroll
    for (int part = 0; part < vector / four; ++part) {
      Four stored;
#pragma unroll
      for (int i = 0; i < four; ++i) {
        stored.values[i] = values[part * four + i];
      }
      *fours(part, index) = stored;
    }
  }

  // Where a channel's float lies.
  __device__ __forceinline__ int place(int channel) const {
    int const part = channel % vector / four;
    return (part * vectors + channel / vector) * four + channel % four;
  }

  // The block's threads fill it with a parameter, or with `absent` where that is null, and zeros behind the last
  // channel. A barrier has to follow.
  template <typename Element>
  __device__ void fill(void const* parameter, ElementType type, int channels, float absent) const {
#pragma unroll 1
    for (int c = threadIdx.x; c < vectors * vector; c += NormTraits::threads) {
      float value = 0.0f;
      if (c < channels) {
        value = parameter ? parameter_at<Element>(parameter, type, c) : absent;
      }
      floats[place(c)] = value;
    }
  }
};

inline bool aligned_to_vectors(void const* tensor) { return reinterpret_cast<std::uintptr_t>(tensor) % 16 == 0; }

// Calls Kernels::launch<vector, items>(params, tiling, stream), with full vectors where tensors are `aligned` to them
// and channels are whole vectors; Kernels::launch_long(params, stream) where a token does not fit into registers.
template <typename Kernels, typename Params>
cudaError_t launch_tiled(Params const& params, bool aligned, cudaStream_t stream) {
  constexpr int vector = full_vector<typename Kernels::Element>, most_items = NormTraits::most_items;
  if (aligned && params.channels % vector == 0) {
    TokenTiling const tiling = tile_tokens(params.channels, vector, 1);
    switch (tiling.items) {
      case 1: return Kernels::template launch<vector, 1>(params, tiling, stream);
      case 2: return Kernels::template launch<vector, 2>(params, tiling, stream);
      case 3: return Kernels::template launch<vector, 3>(params, tiling, stream);
      default: break;
    }
  }
  TokenTiling const tiling = tile_tokens(params.channels, 1, most_items);
  return tiling.items == most_items ? Kernels::template launch<1, most_items>(params, tiling, stream)
                                    : Kernels::launch_long(params, stream);
}

template <template <typename> class Kernels, typename Params>
cudaError_t launch_typed(Params const& params, bool aligned, cudaStream_t stream) {
  if (params.parameter_type != params.type && params.parameter_type != ElementType::float32) {
    return cudaErrorNotSupported;
  }
  switch (params.type) {
    case ElementType::float32: return launch_tiled<Kernels<float>>(params, aligned, stream);
    case ElementType::float16: return launch_tiled<Kernels<__half>>(params, aligned, stream);
    case ElementType::bfloat16: return launch_tiled<Kernels<__nv_bfloat16>>(params, aligned, stream);
  }
  return cudaErrorNotSupported;
}

}  // namespace convnext_kernels
