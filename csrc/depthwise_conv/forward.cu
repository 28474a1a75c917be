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
  static constexpr int pixel_stride = words + 1;  // odd, in words: a warp's fragment loads meet a bank twice at most
  static constexpr int stages = 4;                // of inputs: three steps' are under way; 20 to 36 KB
  static constexpr int pixels_per_pass = threads / words;
  static constexpr int output_pixels = segment * segments;
  static constexpr int output_words = 2 * output_pixels * pixel_stride;
  static constexpr int most_rows = 64;  // of outputs a block walks over; splitting costs 2 radius more input rows each

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
};

// The operands T_i of a warp's two channels. Lane 4 g + q holds elements 2 q, 2 q + 1 (half 0) and 2 q + 8, 2 q + 9
// (half 1) of row g; element k of row g is weight[i, k - g], or 0 outside the filter.
template <typename Traits>
struct Filter {
  std::uint32_t fragments[2][Traits::kernel_size][2];
  float bias[2];

  template <typename Parameter>
  __device__ void load(Parameter const* weight, Parameter const* bias_pointer, int channel, int channels, int lane) {
    constexpr int size = Traits::kernel_size;
    int const first_tap = 2 * (lane % 4) - lane / 4;
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      bool const exists = channel + c < channels;
      Parameter const* const filter = weight + std::int64_t{channel + c} * (size * size);
      auto const tap = [=](int i, int j) {
        return exists && j >= 0 && j < size ? to_float(filter[i * size + j]) : 0.0f;
      };
      bias[c] = exists && bias_pointer ? to_float(bias_pointer[channel + c]) : 0.0f;
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

// What one thread copies of each input row: one word of some pixels.
template <typename Traits>
struct InputCopies {
  static constexpr int most_pixels = (Traits::segments + Traits::segments) * Traits::segment;
  static constexpr int passes = most_pixels / Traits::pixels_per_pass;

  std::uint32_t const* sources[passes];  // in row 0
  bool inside[passes];                   // neither beside the image, nor behind the last image or channel
  int word, first_pixel;

  __device__ void init(DepthwiseConvForwardParams const& params, Tiling const& tiling, std::int64_t image, int x,
                       int channel) {
    word = threadIdx.x % Traits::words;
    first_pixel = threadIdx.x / Traits::words;
    channel += 2 * word;
#pragma unroll
    for (int pass = 0; pass < passes; ++pass) {
      int const pixel = first_pixel + pass * Traits::pixels_per_pass;
      std::int64_t const n = image + pixel / tiling.strip_pixels;
      int const column = x - Traits::radius + pixel % tiling.strip_pixels;
      inside[pass] = n < params.batch && column >= 0 && column < params.width && channel < params.channels;
      std::int64_t const offset =
          inside[pass] ? n * params.input_strides.image + column * params.input_strides.pixel + channel : 0;
      sources[pass] = static_cast<std::uint32_t const*>(params.input) + offset / 2;
    }
  }

  // Starts the copies of rows row and row + 1.
  __device__ __forceinline__ void start(SharedPointer<std::uint32_t> stage, DepthwiseConvForwardParams const& params,
                                        Tiling const& tiling, int row) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      bool const row_inside = row + i >= 0 && row + i < params.height;
      std::int64_t const offset = row_inside ? (row + i) * params.input_strides.row / 2 : 0;
#pragma unroll
      for (int pass = 0; pass < passes; ++pass) {
        int const pixel = first_pixel + pass * Traits::pixels_per_pass;
        if (pixel < tiling.pixels) {
          cp_async<std::uint32_t>(stage + (i * tiling.pixels + pixel) * Traits::pixel_stride + word,
                                  sources[pass] + offset, row_inside && inside[pass]);
        }
      }
    }
  }
};

// What one thread stores of each output row: one word of some pixels.
template <typename Traits>
struct OutputStores {
  static constexpr int passes = Traits::output_pixels / Traits::pixels_per_pass;

  std::uint32_t* destinations[passes];  // in row 0
  bool inside[passes];
  int word, first_pixel;

  __device__ void init(DepthwiseConvForwardParams const& params, Tiling const& tiling, std::int64_t image, int x,
                       int channel) {
    int const strip_outputs = tiling.strip_segments * Traits::segment;
    word = threadIdx.x % Traits::words;
    first_pixel = threadIdx.x / Traits::words;
    channel += 2 * word;
#pragma unroll
    for (int pass = 0; pass < passes; ++pass) {
      int const pixel = first_pixel + pass * Traits::pixels_per_pass;
      std::int64_t const n = image + pixel / strip_outputs;
      int const column = x + pixel % strip_outputs;
      inside[pass] = n < params.batch && column < params.width && channel < params.channels;
      std::int64_t const offset =
          inside[pass] ? n * params.output_strides.image + column * params.output_strides.pixel + channel : 0;
      destinations[pass] = static_cast<std::uint32_t*>(params.output) + offset / 2;
    }
  }

  // Stores rows row and row + 1, as far as they lie before end_row.
  __device__ __forceinline__ void store(SharedPointer<std::uint32_t> staged, DepthwiseConvForwardParams const& params,
                                        int row, int end_row) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      std::int64_t const offset = (row + i) * params.output_strides.row / 2;
#pragma unroll
      for (int pass = 0; pass < passes; ++pass) {
        int const pixel = first_pixel + pass * Traits::pixels_per_pass;
        if (inside[pass] && row + i < end_row) {
          destinations[pass][offset] = staged[(i * Traits::output_pixels + pixel) * Traits::pixel_stride + word];
        }
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
                                           SharedPointer<std::uint32_t> tile, int row_words) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    std::uint32_t b[2][2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      SharedPointer<std::uint32_t> const pixel = tile + i * row_words + half * Traits::segment * Traits::pixel_stride;
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
    int const pixel = i / 2 * Traits::output_pixels + segment * Traits::segment + lane / 4;
    staged[pixel * Traits::pixel_stride + warp] = pack<typename Traits::Element>(sums[0][i], sums[1][i]);
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
  int const pairs = (end_row - first_row + 1) / 2;
  int const steps = pairs + Traits::radius;

  int const row_words = tiling.pixels * Traits::pixel_stride;
  int const stage_words = 2 * row_words;
  SharedPointer<std::uint32_t> const inputs = dynamic_shared<std::uint32_t>();
  SharedPointer<std::uint32_t> const outputs = inputs + Traits::stages * stage_words;
  // Every strip before the lane's column is one segment longer than its outputs.
  int const column = lane / 4 + lane / 4 / tiling.strip_segments;
  int const tile_offset = (column * Traits::segment + 2 * (lane % 4)) * Traits::pixel_stride + warp;

  InputCopies<Traits> copies;
  copies.init(params, tiling, image, x, channel);
  int const first_input_row = first_row - Traits::radius;
#pragma unroll
  for (int stage = 0; stage < Traits::stages - 1; ++stage) {
    if (stage < steps) {
      copies.start(inputs + stage * stage_words, params, tiling, first_input_row + 2 * stage);
    }
    cp_async_commit();
  }
  OutputStores<Traits> stores;
  stores.init(params, tiling, image, x, channel);
  Filter<Traits> filter;
  if (params.parameter_type == ElementType::float32) {
    filter.load(static_cast<float const*>(params.weight), static_cast<float const*>(params.bias),
                channel + 2 * warp, params.channels, lane);
  } else {
    using Element = typename Traits::Element;
    filter.load(static_cast<Element const*>(params.weight), static_cast<Element const*>(params.bias),
                channel + 2 * warp, params.channels, lane);
  }

  Accumulators<Traits> sums;
  for (int first_step = 0;; first_step += Traits::live_pairs) {
#pragma unroll
    for (int slot = 0; slot < Traits::live_pairs; ++slot) {
      int const step = first_step + slot;
      // Behind this barrier the step's inputs and the outputs of the step before are in shared memory, and nobody reads
      // any more what the step before read: its stage of inputs, and the outputs of the step before that.
      cp_async_wait<Traits::stages - 2>();
      __syncthreads();
      int const next = step + Traits::stages - 1;
      if (next < steps) {
        copies.start(inputs + next % Traits::stages * stage_words, params, tiling, first_input_row + 2 * next);
      }
      cp_async_commit();
      if (step > Traits::radius) {
        stores.store(outputs + (step - 1) % 2 * Traits::output_words, params,
                     first_row + 2 * (step - 1 - Traits::radius), end_row);
      }
      if (step == steps) {
        return;
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        sums[slot][i / 4][i % 4] = filter.bias[i / 4];
      }
      accumulate<Traits>(sums, filter, slot, inputs + step % Traits::stages * stage_words + tile_offset, row_words);
      if (step >= Traits::radius) {
        int const oldest = (slot + 1) % Traits::live_pairs;
        stage_outputs<Traits>(outputs + step % 2 * Traits::output_words, sums[oldest], warp, lane);
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
  tiling.row_blocks = static_cast<int>(ceil_div(params.height, Traits::most_rows));
  tiling.rows = 2 * static_cast<int>(ceil_div(params.height, 2 * tiling.row_blocks));
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
  int const words = Shape::stages * 2 * tiling.pixels * Shape::pixel_stride + 2 * Shape::output_words;
  dim3 const grid(static_cast<unsigned>(positions * tiling.row_blocks * image_groups));
  return launch(depthwise_conv_forward<Shape>, grid, Shape::threads, words * sizeof(std::uint32_t), stream, params,
                tiling);
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
