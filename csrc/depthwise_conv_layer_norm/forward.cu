// With two output rows r and r + 1 as the 16 rows of the operand A_h = [T_h; T_(h-1)], h = 0..K (see
// depthwise_conv/toeplitz.cuh), and 8 segments of input row r - K/2 + h as the columns of X_h, the outputs are the sum of
// K + 1 products A_h X_h.
//
// A block owns a tile of 8 segments by 4 rows and walks over the channels, 16 at a time: it copies their inputs,
// convolves, and leaves the outputs in shared memory. When all channels are done it has whole pixels, and normalises
// them.
#include "depthwise_conv_layer_norm/forward.h"

#include "common/launch.cuh"
#include "depthwise_conv/toeplitz.cuh"
#include "depthwise_conv_layer_norm/lane_words.cuh"

namespace convnext_kernels {
namespace {

template <typename Element, int kernel_size>
struct Traits : ToeplitzTraits<Element, kernel_size> {
  using Base = ToeplitzTraits<Element, kernel_size>;
  static constexpr bool may_flip = false;
  static constexpr int segments = 8;      // the columns, N of the product
  static constexpr int output_shift = 6;  // log2 of the outputs in a row
  static constexpr int output_pixels = segments * Base::segment;
  static constexpr int pairs = 2;  // of output rows
  static constexpr int rows = 2 * pairs;
  static constexpr int input_rows = rows + 2 * Base::radius;
  static constexpr int pixels = rows * output_pixels;

  // Of input in a row of a block's strips. Those of less than four segments take more, and more shared memory.
  static constexpr int input_pixels = 80;
  static constexpr int input_row = Base::place(input_pixels);

  // The norm: a pixel is normalised by a few lanes, each with every so many words of it.
  static constexpr int lanes = 8;
  static constexpr int pixels_at_once = Base::threads / lanes;

  static_assert(output_pixels == 1 << output_shift);
};

constexpr int most_lane_words = 8;  // of the norm, in registers
constexpr int most_channels = 2 * 8 * most_lane_words;
constexpr int least_width = 17;  // of an image, whose strips have four segments or eight

struct Tiling {
  Strips strips;
  int row_blocks;
  int pixel_words;  // of a pixel of the tile in shared memory: odd, which keeps lanes on different banks
};

struct Norm {
  void const* weight;
  void const* bias;
  ElementType parameter_type;
  void* convolved;
  float* mean;
  float* rstd;
  float eps;
};

struct Place {
  std::int64_t image;
  int x, first_row;

  template <typename Traits>
  __device__ static Place of(Tiling const& tiling) {
    Place place;
    unsigned index = blockIdx.x;
    place.x = index % tiling.strips.count * (tiling.strips.segments * Traits::segment);
    index /= tiling.strips.count;
    place.first_row = index % tiling.row_blocks * Traits::rows;
    place.image = std::int64_t{index / tiling.row_blocks} * tiling.strips.images;
    return place;
  }
};

// A thread's share of every row of pixels: one word of some of them.
template <typename Traits>
struct Share {
  int word = threadIdx.x % Traits::words;
  int first_pixel = threadIdx.x / Traits::words;

  __device__ __forceinline__ int pixel(int pass) const { return first_pixel + pass * Traits::pixels_per_pass; }
  // In the block's row in shared memory.
  __device__ __forceinline__ int place(int pass) const { return Traits::place(pixel(pass)) + word; }
};

// What one thread copies of every 16 channels. What lies outside the image stays zero throughout.
template <typename Traits>
struct InputCopies {
  static constexpr int passes = ceil_div(Traits::input_pixels, Traits::pixels_per_pass);

  std::uint32_t const* sources[passes];  // in the first row, of the next channels to copy
  bool inside[passes];
  std::int64_t row_stride;  // in words
  unsigned rows_inside;     // a bit for each
  Share<Traits> share;

  __device__ InputCopies(DepthwiseConvForwardParams const& params, Strips const& strips, Place const& place)
      : row_stride(params.input_strides.row / 2), rows_inside(0) {
    int const first_row = place.first_row - Traits::radius;
#pragma unroll
    for (int row = 0; row < Traits::input_rows; ++row) {
      rows_inside |= static_cast<unsigned>(first_row + row >= 0 && first_row + row < params.height) << row;
    }
#pragma unroll
    for (int pass = 0; pass < passes; ++pass) {
      int const pixel = share.pixel(pass);
      std::int64_t const n = place.image + pixel / strips.pixels;
      int const column = place.x - Traits::radius + pixel % strips.pixels;
      inside[pass] = pixel < strips.images * strips.pixels && n < params.batch && !is_dropped(params, n) &&
                     column >= 0 && column < params.width;
      std::int64_t const start = inside[pass] ? n * params.input_strides.image + column * params.input_strides.pixel : 0;
      sources[pass] =
          static_cast<std::uint32_t const*>(params.input) + share.word + start / 2 + first_row * row_stride;
    }
  }

  // What is never copied to: words beside the image, and of a few channels those behind the last.
  __device__ void zero_outside(SharedPointer<std::uint32_t> inputs, int channels) const {
    for (int row = 0; row < Traits::input_rows; ++row) {
#pragma unroll
      for (int pass = 0; pass < passes; ++pass) {
        bool const copied = inside[pass] && (rows_inside >> row & 1) && 2 * share.word < channels;
        if (share.pixel(pass) < Traits::input_pixels && !copied) {
          inputs[row * Traits::input_row + share.place(pass)] = 0;
        }
      }
    }
  }

  // Starts the copies of all rows of the next channels, of which `channels` are left.
  __device__ __forceinline__ void start(SharedPointer<std::uint32_t> inputs, int channels) {
    constexpr unsigned all_rows = (1u << Traits::input_rows) - 1;
    if (rows_inside == all_rows) {
      start_rows(inputs, channels, [](int) { return true; });
    } else {
      start_rows(inputs, channels, [this](int row) { return (rows_inside >> row & 1) != 0; });
    }
  }

 private:
  template <typename RowInside>
  __device__ __forceinline__ void start_rows(SharedPointer<std::uint32_t> inputs, int channels, RowInside row_inside) {
#pragma unroll
    for (int pass = 0; pass < passes; ++pass) {
      if (inside[pass] && 2 * share.word < channels) {
        std::uint32_t const* source = sources[pass];
#pragma unroll
        for (int row = 0; row < Traits::input_rows; ++row) {
          if (row_inside(row)) {
            cp_async<std::uint32_t>(inputs + row * Traits::input_row + share.place(pass), source, true);
          }
          source += row_stride;
        }
      }
      sources[pass] += Traits::words;
    }
  }
};

// The operand A_h of channel c: T_h above T_(h-1), either of which is zero outside the filter.
template <typename Traits>
__device__ __forceinline__ void load_operand(std::uint32_t (&a)[4], ToeplitzFilter<Traits> const& filter, int c, int h) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    a[2 * half] = h < Traits::kernel_size ? filter.fragments[c][h][half] : 0;
    a[2 * half + 1] = h > 0 ? filter.fragments[c][h - 1][half] : 0;
  }
}

template <typename Traits>
using Accumulators = float[Traits::pairs][2][4];  // pair of rows, channel, fragment

// Convolves the warp's two channels. `tile` is the lane's first pixel and the warp's word. Pair m meets input row
// 2 m + h with the operand A_h, which is made once for all pairs.
template <typename Traits>
__device__ __forceinline__ void convolve(Accumulators<Traits>& sums, ToeplitzFilter<Traits> const& filter,
                                         SharedPointer<std::uint32_t> tile) {
#pragma unroll
  for (int i = 0; i < Traits::pairs * 8; ++i) {
    sums[i / 8][i / 4 % 2][i % 4] = filter.bias[i / 4 % 2];
  }
  std::uint32_t b[Traits::input_rows][2][2];
#pragma unroll
  for (int row = 0; row < 2 * (Traits::pairs - 1); ++row) {
    load_segment<Traits>(b[row], tile + row * Traits::input_row);
  }
#pragma unroll
  for (int h = 0; h <= Traits::kernel_size; ++h) {
    int const last_row = h + 2 * (Traits::pairs - 1);
    load_segment<Traits>(b[last_row], tile + last_row * Traits::input_row);
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      std::uint32_t a[4];
      load_operand<Traits>(a, filter, c, h);
#pragma unroll
      for (int pair = 0; pair < Traits::pairs; ++pair) {
        mma_m16n8k16<typename Traits::Element>(sums[pair][c], a, b[h + 2 * pair][c]);
      }
    }
  }
}

// Puts the warp's two channels, rounded, into the tile. `spoilt` becomes NaN, and stays so, if any is not finite.
template <typename Traits>
__device__ __forceinline__ void store_tile(SharedPointer<std::uint32_t> word, Accumulators<Traits> const& sums,
                                           int pixel_words, int lane, std::uint32_t& spoilt) {
#pragma unroll
  for (int pair = 0; pair < Traits::pairs; ++pair) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      int const row = 2 * pair + i / 2, segment = 2 * (lane % 4) + i % 2;
      int const pixel = row * Traits::output_pixels + segment * Traits::segment + lane / 4;
      std::uint32_t const rounded = pack<typename Traits::Element>(sums[pair][0][i], sums[pair][1][i]);
      spoilt = multiply_add_pairs<typename Traits::Element>(rounded, 0, spoilt);
      word[pixel * pixel_words] = rounded;
    }
  }
}

// All channels of the tile; returns a NaN in either half if any output is not finite.
template <typename Traits>
__device__ __forceinline__ std::uint32_t convolve_tile(DepthwiseConvForwardParams const& params, Tiling const& tiling,
                                                       Place const& place, SharedPointer<std::uint32_t> tile,
                                                       SharedPointer<std::uint32_t> inputs) {
  int const warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  SharedPointer<std::uint32_t> const first =
      inputs + tiling.strips.place<Traits>(lane / 4) + 2 * (lane % 4) * Traits::pixel_stride + warp;
  InputCopies<Traits> copies(params, tiling.strips, place);
  copies.zero_outside(inputs, params.channels);
  copies.start(inputs, params.channels);
  cp_async_commit();
  std::uint32_t spoilt = 0;
  for (int channel = 0; channel < params.channels; channel += Traits::channels) {
    ToeplitzFilter<Traits> filter;
    filter.load(params, channel + 2 * warp, lane);
    cp_async_wait<0>();
    __syncthreads();
    Accumulators<Traits> sums;
    convolve<Traits>(sums, filter, first);
    __syncthreads();
    copies.start(inputs, params.channels - channel - Traits::channels);
    cp_async_commit();
    if (channel + 2 * warp < params.channels) {
      store_tile<Traits>(tile + channel / 2 + warp, sums, tiling.pixel_words, lane, spoilt);
    }
  }
  return spoilt;
}

// Where a pixel of the tile lies.
struct Pixel {
  std::int64_t image;
  int row, column;

  template <typename Traits>
  __device__ static Pixel of(Strips const& strips, Place const& place, int index) {
    unsigned const x = static_cast<unsigned>(index) % Traits::output_pixels, row = index / Traits::output_pixels;
    int const strip = static_cast<int>(x >> strips.output_shift);
    return {place.image + strip, place.first_row + static_cast<int>(row),
            place.x + static_cast<int>(x) - (strip << strips.output_shift)};
  }

  __device__ bool exists(DepthwiseConvForwardParams const& params) const {
    return image < params.batch && row < params.height && column < params.width;
  }
};

// Convolves again what is not finite, from its own window alone: what is not finite among the inputs spoils its whole
// segment in products with zeros.
template <typename Traits>
__device__ void correct_tile(DepthwiseConvForwardParams const& params, Tiling const& tiling, Place const& place,
                             SharedPointer<std::uint32_t> tile) {
  using Element = typename Traits::Element;
  int const words = params.channels / 2;
  for (int index = threadIdx.x; index < Traits::pixels * words; index += Traits::threads) {
    int const pixel_index = index / words, word = index % words;
    Pixel const pixel = Pixel::of<Traits>(tiling.strips, place, pixel_index);
    if (!pixel.exists(params) || is_dropped(params, pixel.image)) {
      continue;
    }
    float2 values = unpack<Element>(tile[pixel_index * tiling.pixel_words + word]);
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      float& value = c == 0 ? values.x : values.y;
      if (!isfinite(value)) {
        value = convolve_window<Element, Traits::kernel_size>(params, pixel.image, pixel.row, pixel.column, 2 * word + c);
      }
    }
    tile[pixel_index * tiling.pixel_words + word] = pack<Element>(values.x, values.y);
  }
}

// Normalises the tile's pixels and stores them; those of dropped images as zeros.
template <typename Traits, int count, bool exact>
__device__ __forceinline__ void normalize_tile(DepthwiseConvForwardParams const& params, Norm const& norm,
                                               Tiling const& tiling, Place const& place,
                                               SharedPointer<std::uint32_t> tile) {
  using Element = typename Traits::Element;
  using Words = LaneWords<Traits, count, exact>;
  int const words = params.channels / 2;
  float const scale = 1.0f / static_cast<float>(params.channels);
  Words weight, bias;
  weight.load(norm.weight, norm.parameter_type, words, 1.0f);
  bias.load(norm.bias, norm.parameter_type, words, 0.0f);
  for (int index = threadIdx.x / Traits::lanes; index < Traits::pixels; index += Traits::pixels_at_once) {
    Pixel const pixel = Pixel::of<Traits>(tiling.strips, place, index);
    bool const exists = pixel.exists(params), keep = exists && !is_dropped(params, pixel.image);
    std::uint32_t convolved[count];
    Words centered;
#pragma unroll
    for (int i = 0; i < count; ++i) {
      convolved[i] = 0;
      if (keep && Words::exists(i, words)) {
        convolved[i] = tile[index * tiling.pixel_words + Words::word(i)];
      }
      centered.values[i] = unpack<Element>(convolved[i]);
    }
    float const mean = centered.center(words, scale);
    float const variance = centered.sum_of_squares() * scale;  // all lanes take part, whether they keep it or not
    float const rstd = keep ? rsqrtf(variance + norm.eps) : 0.0f;
    std::int64_t const position = (pixel.image * params.height + pixel.row) * params.width + pixel.column;
    std::uint32_t* const output = static_cast<std::uint32_t*>(params.output) + position * words;
#pragma unroll
    for (int i = 0; i < count; ++i) {
      float2 const value = centered.values[i], w = weight.values[i], b = bias.values[i];
      std::uint32_t const normalized = pack<Element>(value.x * rstd * w.x + b.x, value.y * rstd * w.y + b.y);
      if (exists && Words::exists(i, words)) {
        output[Words::word(i)] = keep ? normalized : 0;
      }
    }
    if (norm.convolved && exists) {
      std::uint32_t* const copy = static_cast<std::uint32_t*>(norm.convolved) + position * words;
#pragma unroll
      for (int i = 0; i < count; ++i) {
        if (Words::exists(i, words)) {
          copy[Words::word(i)] = convolved[i];
        }
      }
    }
    if (exists && threadIdx.x % Traits::lanes == 0) {
      if (norm.mean) {
        norm.mean[position] = mean;
      }
      if (norm.rstd) {
        norm.rstd[position] = rstd;
      }
    }
  }
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::threads, 2)
    depthwise_conv_layer_norm_forward(DepthwiseConvForwardParams const params, Norm const norm, Tiling const tiling) {
  Place const place = Place::of<Traits>(tiling);
  SharedPointer<std::uint32_t> const tile = dynamic_shared<std::uint32_t>();
  SharedPointer<std::uint32_t> const inputs = tile + Traits::pixels * tiling.pixel_words;
  bool correct = false;
  if (tiling.strips.dropped(params, place.image) < tiling.strips.existing(params, place.image)) {
    correct = any_nan<typename Traits::Element>(convolve_tile<Traits>(params, tiling, place, tile, inputs));
  }
  if (__syncthreads_or(correct)) {
    correct_tile<Traits>(params, tiling, place, tile);
    __syncthreads();
  }
  switch (params.channels) {
    case 64: return normalize_tile<Traits, 4, true>(params, norm, tiling, place, tile);
    case 96: return normalize_tile<Traits, 6, true>(params, norm, tiling, place, tile);
    case 128: return normalize_tile<Traits, 8, true>(params, norm, tiling, place, tile);
    default: return normalize_tile<Traits, most_lane_words, false>(params, norm, tiling, place, tile);
  }
}

DepthwiseConvForwardParams convolution_of(DepthwiseConvLayerNormForwardParams const& params) {
  DepthwiseConvForwardParams convolution{};
  convolution.input = params.input;
  convolution.weight = params.weight;
  convolution.bias = params.bias;
  convolution.drop_path_factor = params.drop_path_factor;
  convolution.output = params.output;
  convolution.input_strides = params.input_strides;
  std::int64_t const row = std::int64_t{params.width} * params.channels;
  convolution.output_strides = {params.height * row, row, params.channels};
  convolution.type = params.type;
  convolution.parameter_type = params.parameter_type;
  convolution.batch = params.batch;
  convolution.height = params.height;
  convolution.width = params.width;
  convolution.channels = params.channels;
  convolution.kernel_size = params.kernel_size;
  return convolution;
}

template <typename Traits>
cudaError_t launch_with(DepthwiseConvLayerNormForwardParams const& params, cudaStream_t stream) {
  Tiling tiling;
  tiling.strips = Strips::of<Traits>(params.width);
  tiling.row_blocks = ceil_div(params.height, Traits::rows);
  tiling.pixel_words = params.channels / 2 | 1;
  std::int64_t const positions = std::int64_t{tiling.strips.count} * tiling.row_blocks;
  std::int64_t const image_groups = ceil_div(params.batch, std::int64_t{tiling.strips.images});
  constexpr std::int64_t most_blocks = 0x7fffffff;
  if (image_groups > most_blocks / positions) {
    return cudaErrorInvalidConfiguration;
  }
  dim3 const grid(static_cast<unsigned>(positions * image_groups));
  std::size_t const words = Traits::pixels * tiling.pixel_words + Traits::input_rows * Traits::input_row;
  Norm const norm{params.norm_weight, params.norm_bias, params.norm_parameter_type, params.convolved,
                  params.mean,        params.rstd,      params.eps};
  return launch(depthwise_conv_layer_norm_forward<Traits>, grid, Traits::threads, words * sizeof(std::uint32_t), stream,
                convolution_of(params), norm, tiling);
}

template <typename Element>
cudaError_t launch_size(DepthwiseConvLayerNormForwardParams const& params, cudaStream_t stream) {
  switch (params.kernel_size) {
    case 3: return launch_with<Traits<Element, 3>>(params, stream);
    case 5: return launch_with<Traits<Element, 5>>(params, stream);
    default: return launch_with<Traits<Element, 7>>(params, stream);
  }
}

}  // namespace

bool in_one_pass(DepthwiseConvLayerNormForwardParams const& params) {
  bool const size_fits = params.kernel_size == 3 || params.kernel_size == 5 || params.kernel_size == 7;
  bool const tile_fits = params.channels <= most_channels && params.width >= least_width;
  return size_fits && tile_fits && on_tensor_cores(convolution_of(params));
}

cudaError_t launch_depthwise_conv_layer_norm_forward(DepthwiseConvLayerNormForwardParams const& params,
                                                     cudaStream_t stream) {
  if (params.batch < 0 || params.height < 1 || params.width < 1 || params.channels < 1) {
    return cudaErrorInvalidValue;
  }
  auto const fits = [&](ElementType type) { return type == params.type || type == ElementType::float32; };
  if (!in_one_pass(params) || !fits(params.parameter_type) || !fits(params.norm_parameter_type)) {
    return cudaErrorNotSupported;
  }
  if (params.batch == 0) {
    return cudaSuccess;
  }
  return params.type == ElementType::float16 ? launch_size<__half>(params, stream)
                                             : launch_size<__nv_bfloat16>(params, stream);
}

}  // namespace convnext_kernels
