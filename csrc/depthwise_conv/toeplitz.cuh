// Eight outputs in a row, of one channel, are a banded (Toeplitz) 8 x 16 matrix T_i, made of filter row i, times 16
// inputs. T_i is one operand of a product, and the inputs of several such segments are the other.
#pragma once

#include "common/integers.h"
#include "common/ptx.cuh"
#include "common/shared.cuh"
#include "depthwise_conv/forward.h"
#include "depthwise_conv/window.cuh"

namespace convnext_kernels {

template <typename Element_, int kernel_size_>
struct ToeplitzTraits {
  using Element = Element_;
  static constexpr int kernel_size = kernel_size_;
  static constexpr bool may_flip = true;  // where it cannot, every tap lies at a constant distance from the first
  static constexpr int radius = kernel_size / 2;
  static constexpr int segment = 8;  // outputs
  static constexpr int depth = 16;   // K of the product: the inputs of a segment, and some that meet zeros
  static constexpr int warps = 8;
  static constexpr int threads = 32 * warps;
  static constexpr int channels = 2 * warps;  // 32 bytes of each pixel, a whole sector
  static constexpr int words = warps;         // of 32 bits: a warp's two channels
  static constexpr int pixels_per_pass = threads / words;

  // Shared memory, in words. Segments lie an odd number of words apart, so that a warp that loads or stores fragments
  // meets a bank twice at most, and one that takes 8 words of 4 pixels of a segment once.
  static constexpr int pixel_stride = words;
  static constexpr int segment_stride = segment * pixel_stride + 1;
  __host__ __device__ static constexpr int place(int pixel) { return pixel * pixel_stride + pixel / segment; }

  static_assert(kernel_size % 2 == 1 && segment + 2 * radius <= depth, "a segment's inputs fit into one product");
  static_assert(depth == 2 * segment, "a strip is one segment longer than its outputs");
};

// How blocks share the columns and the images. A strip is what a block sees of a row of one image: its segments with the
// pixels around them.
struct Strips {
  int segments;      // of a strip: those of a block or a half, a quarter, ... of them
  int output_shift;  // log2 of the outputs in a row of a strip
  int pixels;        // of input in a strip: a segment more
  int images;        // in a block
  int count;         // across the image

  // The narrowest that cover the width, so that the columns of the products are in use.
  template <typename Traits>
  static Strips of(int width) {
    int const needed = ceil_div(width, Traits::segment);
    Strips strips;
    strips.segments = Traits::segments;
    strips.output_shift = Traits::output_shift;
    while (strips.segments / 2 >= needed) {
      strips.segments /= 2;
      --strips.output_shift;
    }
    strips.pixels = (strips.segments + 1) * Traits::segment;
    strips.images = Traits::segments / strips.segments;
    strips.count = ceil_div(needed, strips.segments);
    return strips;
  }

  // Of the images of a block, from this one on, that are.
  __device__ int existing(DepthwiseConvForwardParams const& params, std::int64_t image) const {
    return static_cast<int>(min(params.batch - image, std::int64_t{images}));
  }

  // How many of these are dropped.
  __device__ int dropped(DepthwiseConvForwardParams const& params, std::int64_t image) const {
    int count = 0;
    for (int i = 0; i < existing(params, image); ++i) {
      count += is_dropped(params, image + i);
    }
    return count;
  }

  // Where a segment's inputs begin in a row of the block's strips in shared memory, in words: every strip before it is
  // one segment longer than its outputs.
  template <typename Traits>
  __host__ __device__ __forceinline__ int place(int segment) const {
    return (segment + segment / segments) * Traits::segment_stride;
  }
};

// Elements 2 q, 2 q + 1 and 2 q + 8, 2 q + 9 of a segment's inputs, of both channels of a warp: inputs[channel][half].
// `first` is the first of these pixels, and the warp's word.
template <typename Traits>
__device__ __forceinline__ void load_segment(std::uint32_t (&inputs)[2][2], SharedPointer<std::uint32_t> first) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    SharedPointer<std::uint32_t> const pixel = first + half * Traits::segment_stride;
    std::uint32_t const left = pixel[0], right = pixel[Traits::pixel_stride];
    inputs[0][half] = __byte_perm(left, right, 0x5410);  // the first channel of both pixels
    inputs[1][half] = __byte_perm(left, right, 0x7632);  // the second
  }
}

// The operands T_i of a warp's two channels. Lane 4 g + q holds elements 2 q, 2 q + 1 (half 0) and 2 q + 8, 2 q + 9
// (half 1) of row g; element k of row g is tap k - g of filter row i, or 0 outside the filter. These are fragments of T_i
// as the first operand, but for its rows 8 to 15, and of its transpose as the second.
template <typename Traits>
struct ToeplitzFilter {
  std::uint32_t fragments[2][Traits::kernel_size][2];
  float bias[2];

  // Behind the last channel that of another, as nothing is stored there.
  __device__ void load(DepthwiseConvForwardParams const& params, int channel, int lane) {
    channel = min(channel, params.channels - 2);
    if (params.parameter_type == ElementType::float32) {
      load_as<float>(params, channel, lane);
    } else {
      load_as<typename Traits::Element>(params, channel, lane);
    }
  }

 private:
  template <typename Parameter>
  __device__ __forceinline__ void load_as(DepthwiseConvForwardParams const& params, int channel, int lane) {
    constexpr int size = Traits::kernel_size, last = size * size - 1;
    bool const flip = Traits::may_flip && params.flip_filter;
    // Of a row's two pairs at most one meets the filter: the second where the first ends before it. Loads stay within the
    // filter, the masks take away what lies outside.
    int const first_tap = 2 * (lane % 4) - lane / 4;
    int const used_half = first_tap >= -1 ? 0 : 1, j = first_tap + used_half * Traits::segment;
    std::uint32_t const mask = (j >= 0 && j < size ? 0xffffu : 0) | (j >= -1 && j + 1 < size ? 0xffff0000u : 0);
    std::uint32_t const masks[2] = {used_half == 0 ? mask : 0, used_half == 1 ? mask : 0};
    int const left = min(max(j, 0), size - 1), right = min(max(j + 1, 0), size - 1), step = flip ? -size : size;
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      Parameter const* const filter =
          static_cast<Parameter const*>(params.weight) + std::int64_t{channel + c} * (last + 1);
      Parameter const* const lefts = filter + (flip ? last - left : left);
      Parameter const* const rights = filter + (flip ? last - right : right);
      bias[c] = params.bias ? to_float(static_cast<Parameter const*>(params.bias)[channel + c]) : 0.0f;
#pragma unroll
      for (int i = 0; i < size; ++i) {
        std::uint32_t const taps = pack_as<typename Traits::Element>(lefts[i * step], rights[i * step]);
        fragments[c][i][0] = taps & masks[0];
        fragments[c][i][1] = taps & masks[1];
        keep(fragments[c][i][0]);
        keep(fragments[c][i][1]);
      }
    }
  }
};

// Whether either half of a pair is NaN.
template <typename Element>
__device__ __forceinline__ bool any_nan(std::uint32_t packed) {
  float2 const values = unpack<Element>(packed);
  return isnan(values.x) || isnan(values.y);
}

}  // namespace convnext_kernels
