// Eight outputs in a row, of one channel, are a banded (Toeplitz) 8 x 16 matrix T_i, made of filter row i, times 16
// inputs. With two output rows r and r + 1 as the 16 rows of the operand A_h = [T_h; T_(h-1)], h = 0..K, and 8 such
// segments of input row r - K/2 + h as the columns of X_h, the outputs are the sum of K + 1 products A_h X_h.
//
// A block walks down the rows of 8 segments (of one image, or of several where these are narrow), each warp with two
// channels. A step takes two input rows, which meet K/2 + 1 pairs of output rows: these wait in a ring of accumulators,
// so that every input is loaded once.
#include "depthwise_conv/forward.h"

#include "common/elements.cuh"
#include "common/launch.cuh"
#include "common/ptx.cuh"
#include "common/shared.cuh"

namespace convnext_kernels {
namespace {

template <typename Element_, int kernel_size_>
struct Traits {
  using Element = Element_;
  static constexpr int kernel_size = kernel_size_;
  static constexpr int radius = kernel_size / 2;
  static constexpr int segment = 8;   // outputs of a column in one row: two rows of them are M = 16 of the product
  static constexpr int segments = 8;  // the columns, N of the product
  static constexpr int depth = 16;    // K of the product: the inputs of a segment, and some that meet zeros
  static constexpr int live_pairs = radius + 1;  // pairs of output rows that a step's input rows take part in
  static constexpr int warps = 8;
  static constexpr int threads = 32 * warps;
  static constexpr int channels = 2 * warps;  // 32 bytes of each pixel, a whole sector
  static constexpr int words = warps;         // of 32 bits: a warp's two channels
  static constexpr int pixels_per_pass = threads / words;
  static constexpr int most_rows = 64;  // of outputs in a block; each split reads 2 radius input rows again

  // Shared memory, in words. An odd pixel stride makes a warp's fragment loads meet a bank twice at most.
  static constexpr int pixel_stride = words + 1;
  static constexpr int input_pixels = 2 * segment * segments;  // in a row of 8 strips of one segment, the most
  static constexpr int output_pixels = segment * segments;
  static constexpr int input_row = input_pixels * pixel_stride;
  static constexpr int output_row = output_pixels * pixel_stride;
  static constexpr int stage = 2 * input_row;
  // A multiple of live_pairs, so that in a loop unrolled by it every place in both rings is a constant.
  static constexpr int stages = live_pairs == 2 ? 4 : live_pairs;

  static_assert(kernel_size % 2 == 1 && segment + 2 * radius <= depth, "a segment's inputs fit into one product");
  static_assert(depth == 2 * segment, "a strip is one segment longer than its outputs");
};

// How a launch's blocks share the work. A strip is what a block sees of a row of one image: its segments with the
// pixels around them.
struct Tiling {
  int strip_segments;  // 8, 4, 2 or 1
  int strip_pixels;    // of input
  int images;          // in a block: 8 / strip_segments
  int pixels;          // of input in a block's row: images * strip_pixels
  int channel_blocks, strips, row_blocks;
  int rows;  // of output in a block, even
  std::int64_t input_stride, output_stride;  // from row to row, in words
};

// The operands T_i of a warp's two channels. Lane 4 g + q holds elements 2 q, 2 q + 1 (half 0) and 2 q + 8, 2 q + 9
// (half 1) of row g; element k of row g is weight[i, k - g], or 0 outside the filter.
template <typename Traits>
struct Filter {
  std::uint32_t fragments[2][Traits::kernel_size][2];
  float bias[2];

  __device__ void load(DepthwiseConvForwardParams const& params, int channel, int lane) {
    if (params.parameter_type == ElementType::float32) {
      load(static_cast<float const*>(params.weight), static_cast<float const*>(params.bias), channel, lane);
    } else {
      using Element = typename Traits::Element;
      load(static_cast<Element const*>(params.weight), static_cast<Element const*>(params.bias), channel, lane);
    }
  }

  template <typename Parameter>
  __device__ void load(Parameter const* weight, Parameter const* bias_pointer, int channel, int lane) {
    constexpr int size = Traits::kernel_size;
    int const first_tap = 2 * (lane % 4) - lane / 4;
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      Parameter const* const filter = weight + std::int64_t{channel + c} * (size * size);
      auto const tap = [=](int i, int j) { return j >= 0 && j < size ? to_float(filter[i * size + j]) : 0.0f; };
      bias[c] = bias_pointer ? to_float(bias_pointer[channel + c]) : 0.0f;
#pragma unroll
      for (int i = 0; i < size; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          int const j = first_tap + half * Traits::segment;
          fragments[c][i][half] = pack<typename Traits::Element>(tap(i, j), tap(i, j + 1));
        }
      }
    }
  }

  // The operand A_h of channel c: T_h above T_(h-1), either of which is zero outside the filter.
  __device__ __forceinline__ void operand(std::uint32_t (&a)[4], int c, int h) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      a[2 * half] = h < Traits::kernel_size ? fragments[c][h][half] : 0;
      a[2 * half + 1] = h > 0 ? fragments[c][h - 1][half] : 0;
    }
  }
};

// A thread's share of every row of pixels: one word of some of them.
template <typename Traits>
struct Share {
  int word = threadIdx.x % Traits::words;
  int first_pixel = threadIdx.x / Traits::words;

  __device__ __forceinline__ int pixel(int pass) const { return first_pixel + pass * Traits::pixels_per_pass; }
  // In the block's row in shared memory.
  __device__ __forceinline__ int place(int pass) const { return pixel(pass) * Traits::pixel_stride + word; }
};

// What one thread copies of each input row. The pixels beside the image stay zero throughout.
template <typename Traits>
struct InputCopies {
  static constexpr int passes = Traits::input_pixels / Traits::pixels_per_pass;

  std::uint32_t const* sources[passes];  // in the next row to copy
  bool inside[passes];
  std::int64_t row_stride;  // in words
  int height;
  Share<Traits> share;

  __device__ InputCopies(DepthwiseConvForwardParams const& params, Tiling const& tiling, std::int64_t image,
                         int first_row, int x, int channel)
      : row_stride(tiling.input_stride), height(params.height) {
    channel += 2 * share.word;
#pragma unroll
    for (int pass = 0; pass < passes; ++pass) {
      int const pixel = share.pixel(pass);
      std::int64_t const n = image + pixel / tiling.strip_pixels;
      int const column = x - Traits::radius + pixel % tiling.strip_pixels;
      inside[pass] = pixel < tiling.pixels && n < params.batch && column >= 0 && column < params.width &&
                     channel < params.channels;
      std::int64_t const start =
          inside[pass] ? n * params.input_strides.image + column * params.input_strides.pixel + channel : 0;
      sources[pass] = static_cast<std::uint32_t const*>(params.input) + start / 2 + first_row * row_stride;
    }
  }

  __device__ void zero_outside(SharedPointer<std::uint32_t> inputs) const {
#pragma unroll
    for (int row_of_ring = 0; row_of_ring < 2 * Traits::stages; ++row_of_ring) {
#pragma unroll
      for (int pass = 0; pass < passes; ++pass) {
        if (!inside[pass]) {
          inputs[row_of_ring * Traits::input_row + share.place(pass)] = 0;
        }
      }
    }
  }

  // Starts the copies of the next two rows, row and row + 1: zeros where they lie above or below the image.
  __device__ __forceinline__ void start(SharedPointer<std::uint32_t> stage, int row) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      bool const row_inside = row + i >= 0 && row + i < height;
#pragma unroll
      for (int pass = 0; pass < passes; ++pass) {
        if (inside[pass]) {
          cp_async<std::uint32_t>(stage + i * Traits::input_row + share.place(pass), sources[pass], row_inside);
        }
        sources[pass] += row_stride;
      }
    }
  }
};

// What one thread stores of each output row.
template <typename Traits>
struct OutputStores {
  static constexpr int passes = Traits::output_pixels / Traits::pixels_per_pass;

  std::uint32_t* destinations[passes];  // in the next row to store
  bool inside[passes];
  std::int64_t row_stride;  // in words
  Share<Traits> share;

  __device__ OutputStores(DepthwiseConvForwardParams const& params, Tiling const& tiling, std::int64_t image,
                          int first_row, int x, int channel)
      : row_stride(tiling.output_stride) {
    int const strip_outputs = tiling.strip_segments * Traits::segment;
    channel += 2 * share.word;
#pragma unroll
    for (int pass = 0; pass < passes; ++pass) {
      int const pixel = share.pixel(pass);
      std::int64_t const n = image + pixel / strip_outputs;
      int const column = x + pixel % strip_outputs;
      inside[pass] = n < params.batch && column < params.width && channel < params.channels;
      std::int64_t const start =
          inside[pass] ? n * params.output_strides.image + column * params.output_strides.pixel + channel : 0;
      destinations[pass] = static_cast<std::uint32_t*>(params.output) + start / 2 + first_row * row_stride;
    }
  }

  // Stores the next two rows, the second only if it is one.
  __device__ __forceinline__ void store(SharedPointer<std::uint32_t> staged, bool second) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int pass = 0; pass < passes; ++pass) {
        if (inside[pass] && (i == 0 || second)) {
          *destinations[pass] = staged[i * Traits::output_row + share.place(pass)];
        }
        destinations[pass] += row_stride;
      }
    }
  }
};

template <typename Traits>
using Accumulators = float[Traits::live_pairs][2][4];  // pair of rows, channel, fragment

// Adds a step's two input rows to the pairs of output rows that they take part in. Pair m lives in slot m % live_pairs;
// the newest is in slot `newest`. `tile` is the lane's first pixel and the warp's word.
template <typename Traits>
__device__ __forceinline__ void accumulate(Accumulators<Traits>& sums, Filter<Traits> const& filter, int newest,
                                           SharedPointer<std::uint32_t> tile) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    std::uint32_t b[2][2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      SharedPointer<std::uint32_t> const pixel =
          tile + i * Traits::input_row + half * Traits::segment * Traits::pixel_stride;
      std::uint32_t const left = pixel[0], right = pixel[Traits::pixel_stride];
      b[0][half] = __byte_perm(left, right, 0x5410);  // the first channel of both pixels
      b[1][half] = __byte_perm(left, right, 0x7632);  // the second
    }
#pragma unroll
    for (int age = 0; age < Traits::live_pairs; ++age) {
      int const slot = (newest - age + Traits::live_pairs) % Traits::live_pairs;
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        std::uint32_t a[4];
        filter.operand(a, c, 2 * age + i);
        mma_m16n8k16<typename Traits::Element>(sums[slot][c], a, b[c]);
      }
    }
  }
}

// Puts a pair of output rows, rounded, where OutputStores finds it.
template <typename Traits>
__device__ __forceinline__ void stage_outputs(SharedPointer<std::uint32_t> staged, float const (&sums)[2][4], int warp,
                                              int lane) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    int const segment = 2 * (lane % 4) + i % 2;
    int const pixel = segment * Traits::segment + lane / 4;
    staged[i / 2 * Traits::output_row + pixel * Traits::pixel_stride + warp] =
        pack<typename Traits::Element>(sums[0][i], sums[1][i]);
  }
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::threads, 2)
    depthwise_conv_forward(DepthwiseConvForwardParams const params, Tiling const tiling) {
  int const warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  unsigned index = blockIdx.x;
  int const channel = index % tiling.channel_blocks * Traits::channels;
  index /= tiling.channel_blocks;
  int const x = index % tiling.strips * (tiling.strip_segments * Traits::segment);
  index /= tiling.strips;
  int const first_row = index % tiling.row_blocks * tiling.rows;
  std::int64_t const image = std::int64_t{index / tiling.row_blocks} * tiling.images;
  int const end_row = min(first_row + tiling.rows, params.height);

  __shared__ SharedArray<std::uint32_t, Traits::stages * Traits::stage> inputs;
  __shared__ SharedArray<std::uint32_t, 2 * 2 * Traits::output_row> outputs;
  // Every strip before the lane's column is one segment longer than its outputs.
  int const column = lane / 4 + lane / 4 / tiling.strip_segments;
  int const tile = (column * Traits::segment + 2 * (lane % 4)) * Traits::pixel_stride + warp;

  Filter<Traits> filter;  // behind the last channel any, as nothing is stored there
  filter.load(params, min(channel + 2 * warp, params.channels - 2), lane);
  int const first_input_row = first_row - Traits::radius, end_input_row = end_row + Traits::radius;
  InputCopies<Traits> copies(params, tiling, image, first_input_row, x, channel);
  copies.zero_outside(inputs);
#pragma unroll
  for (int stage = 0; stage < Traits::stages - 1; ++stage) {
    copies.start(inputs + stage * Traits::stage, first_input_row + 2 * stage);
    cp_async_commit();
  }
  OutputStores<Traits> stores(params, tiling, image, first_row, x, channel);

  Accumulators<Traits> sums;
  // A step stores output rows row and row + 1, which the step before has finished, and finishes the next two. The input
  // rows that it computes with, and those that it starts to copy, are at constant distances from these.
  for (int ring_row = first_row - 2 * Traits::live_pairs;; ring_row += 2 * Traits::stages) {
#pragma unroll
    for (int stage = 0; stage < Traits::stages; ++stage) {
      int const row = ring_row + 2 * stage, next_row = row + 2;
      // Behind this barrier the step's inputs and the outputs of the step before are in shared memory, and nobody reads
      // any more what the step before read: its stage of inputs, and the outputs of the step before that.
      cp_async_wait<Traits::stages - 2>();
      __syncthreads();
      int const input_row = row + Traits::radius + 2 * Traits::stages;
      if (input_row < end_input_row) {
        copies.start(inputs + (stage + Traits::stages - 1) % Traits::stages * Traits::stage, input_row);
      }
      cp_async_commit();
      if (row >= first_row) {
        stores.store(outputs + (row & 2) * Traits::output_row, row + 1 < end_row);
      }
      if (next_row >= end_row) {
        return;
      }
      int const newest = stage % Traits::live_pairs, oldest = (newest + 1) % Traits::live_pairs;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        sums[newest][i / 4][i % 4] = filter.bias[i / 4];
      }
      accumulate<Traits>(sums, filter, newest, inputs + stage * Traits::stage + tile);
      if (next_row >= first_row) {
        stage_outputs<Traits>(outputs + (next_row & 2) * Traits::output_row, sums[oldest], warp, lane);
      }
    }
  }
}

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

template <typename Traits>
Tiling tiling_of(DepthwiseConvForwardParams const& params) {
  Tiling tiling;
  int const segments = static_cast<int>(ceil_div(params.width, Traits::segment));
  tiling.strip_segments = Traits::segments;
  while (tiling.strip_segments / 2 >= segments) {
    tiling.strip_segments /= 2;
  }
  tiling.images = Traits::segments / tiling.strip_segments;
  tiling.strip_pixels = (tiling.strip_segments + 1) * Traits::segment;
  tiling.pixels = tiling.images * tiling.strip_pixels;
  tiling.channel_blocks = static_cast<int>(ceil_div(params.channels, Traits::channels));
  tiling.strips = static_cast<int>(ceil_div(segments, tiling.strip_segments));
  tiling.rows = 2 * static_cast<int>(ceil_div(params.height, 2 * ceil_div(params.height, Traits::most_rows)));
  tiling.row_blocks = static_cast<int>(ceil_div(params.height, tiling.rows));
  tiling.input_stride = params.input_strides.row / 2;
  tiling.output_stride = params.output_strides.row / 2;
  return tiling;
}

template <typename Element, int kernel_size>
cudaError_t launch_with(DepthwiseConvForwardParams const& params, cudaStream_t stream) {
  using Shape = Traits<Element, kernel_size>;
  Tiling const tiling = tiling_of<Shape>(params);
  std::int64_t const positions = std::int64_t{tiling.channel_blocks} * tiling.strips;
  std::int64_t const image_groups = ceil_div(params.batch, tiling.images);
  constexpr std::int64_t most_blocks = 0x7fffffff;
  if (positions > most_blocks / tiling.row_blocks || image_groups > most_blocks / (positions * tiling.row_blocks)) {
    return cudaErrorInvalidConfiguration;
  }
  dim3 const grid(static_cast<unsigned>(positions * tiling.row_blocks * image_groups));
  return launch(depthwise_conv_forward<Shape>, grid, Shape::threads, 0, stream, params, tiling);
}

template <typename Element>
cudaError_t launch_size(DepthwiseConvForwardParams const& params, cudaStream_t stream) {
  switch (params.kernel_size) {
    case 3: return launch_with<Element, 3>(params, stream);
    case 5: return launch_with<Element, 5>(params, stream);
    case 7: return launch_with<Element, 7>(params, stream);
    default: return cudaErrorNotSupported;
  }
}

// Whether two channels lie in one aligned word everywhere.
bool pairs_of_channels(void const* tensor, ImageStrides const& strides, int channels) {
  bool const aligned = reinterpret_cast<std::uintptr_t>(tensor) % sizeof(std::uint32_t) == 0;
  return aligned && (strides.image | strides.row | strides.pixel | channels) % 2 == 0;
}

}  // namespace

bool on_tensor_cores(DepthwiseConvForwardParams const& params) {
  return params.type != ElementType::float32 &&
         pairs_of_channels(params.input, params.input_strides, params.channels) &&
         pairs_of_channels(params.output, params.output_strides, params.channels);
}

cudaError_t launch_depthwise_conv_forward(DepthwiseConvForwardParams const& params, cudaStream_t stream) {
  if (params.batch < 0 || params.height < 1 || params.width < 1 || params.channels < 1) {
    return cudaErrorInvalidValue;
  }
  bool const parameters_fit = params.parameter_type == params.type || params.parameter_type == ElementType::float32;
  if (!parameters_fit || !pairs_of_channels(params.input, params.input_strides, params.channels) ||
      !pairs_of_channels(params.output, params.output_strides, params.channels)) {
    return cudaErrorNotSupported;
  }
  if (params.batch == 0) {
    return cudaSuccess;
  }
  switch (params.type) {
    case ElementType::float16: return launch_size<__half>(params, stream);
    case ElementType::bfloat16: return launch_size<__nv_bfloat16>(params, stream);
    default: return cudaErrorNotSupported;
  }
}

}  // namespace convnext_kernels
