// Elements next to each other in global memory, moved by one instruction and worked on as floats.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/elements.cuh"
#include "common/ptx.cuh"

namespace convnext_kernels {

// The most elements that one instruction moves.
template <typename Element>
constexpr int full_vector = 16 / sizeof(Element);

// A full vector, which needs an alignment of 16 bytes; packed, so that it takes four registers whatever its type.
template <typename Element, int count>
struct alignas(16) Vector {
  static_assert(count == full_vector<Element>, "a vector is full or one element");
  std::conditional_t<std::is_same_v<Element, float>, float, std::uint32_t> words[4];
};

template <typename Element>
struct Vector<Element, 1> {
  Element element;
};

template <int count, typename Element>
__device__ __forceinline__ Vector<Element, count> load_vector(Element const* source) {
  return *reinterpret_cast<Vector<Element, count> const*>(source);
}

template <typename Element, int count>
__device__ __forceinline__ void store_vector(Element* destination, Vector<Element, count> const& vector) {
  *reinterpret_cast<Vector<Element, count>*>(destination) = vector;
}

template <typename Element, int count>
__device__ __forceinline__ void to_floats(Vector<Element, count> const& vector, float (&values)[count]) {
  if constexpr (count == 1) {
    values[0] = to_float(vector.element);
  } else if constexpr (std::is_same_v<Element, float>) {
#pragma unroll
    for (int i = 0; i < count; ++i) {
      values[i] = vector.words[i];
    }
  } else {
#pragma unroll
    for (int i = 0; i < count / 2; ++i) {
      float2 const pair = unpack<Element>(vector.words[i]);
      values[2 * i] = pair.x;
      values[2 * i + 1] = pair.y;
    }
  }
}

template <typename Element, int count>
__device__ __forceinline__ Vector<Element, count> from_floats(float const (&values)[count]) {
  Vector<Element, count> vector;
  if constexpr (count == 1) {
    vector.element = from_float<Element>(values[0]);
  } else if constexpr (std::is_same_v<Element, float>) {
#pragma unroll
    for (int i = 0; i < count; ++i) {
      vector.words[i] = values[i];
    }
  } else {
#pragma unroll
    for (int i = 0; i < count / 2; ++i) {
      vector.words[i] = pack<Element>(values[2 * i], values[2 * i + 1]);
    }
  }
  return vector;
}

}  // namespace convnext_kernels
