// A block walks down the rows of 16 segments (of one image, or of several where these are narrow), each warp with two
// channels; see toeplitz.cuh. A step takes one input row, 16 segments X of 16 inputs, which meets K output rows: the
// products X T_i' are added to these in a ring of accumulators, so that every input is loaded once.
#include "common/launch.cuh"
#include "depthwise_conv/paths.h"
#include "depthwise_conv/toeplitz.cuh"

namespace convnext_kernels {
namespace {

template <typename Element, int kernel_size, bool has_residual_>
struct Traits : ToeplitzTraits<Element, kernel_size> {
  using Base = ToeplitzTraits<Element, kernel_size>;
  static constexpr bool has_residual = has_residual_;
  static constexpr int segments = 16;     // M of the product
  static constexpr int output_shift = 7;  // log2 of the outputs in a row
  static constexpr int output_pixels = segments * Base::segment;
  static constexpr int passes = output_pixels / 32;  // of a thread over a row, 32 pixels and 8 words at once
  static constexpr int most_rows = 64;  // of outputs in a block; each split reads 2 radius input rows again
  static constexpr int stages = 5;

  // Shared memory, in bytes.
  static constexpr int word_bytes = sizeof(std::uint32_t);
  static constexpr int output_row = segments * Base::segment_stride * word_bytes;
  static constexpr int pass_words = Base::place(32);
  static constexpr int residual_rows = has_residual ? stages : 0;
  static constexpr int shared_bytes(int input_row) { return stages * input_row + (2 + residual_rows) * output_row; }

  static_assert(output_pixels == 1 << output_shift);
  static_assert(Base::threads == 32 * Base::words);
  static_assert(2 * shared_bytes(2 * output_row) <= 163 * 1024, "two blocks fit on a multiprocessor of sm_80");
};

// Where a thread's pixel of a pass lies.
struct Pass {
  int images, columns;         // from the first
  int input_place;             // from the first, in shared memory, in bytes
  std::int64_t input, output;  // from the pass before, in memory, in bytes
};

// How a launch's blocks share the work.
struct Tiling {
  Strips strips;
  int channel_blocks, row_blocks;
  int rows;          // of output in a block
  int input_column;  // the first to copy, from the strip's first output: those beside the image stay zero
  int second_half;   // from a lane's first segment to its second, in bytes of shared memory
  int input_row;     // of shared memory, in bytes
  Pass passes[5];    // the last: the pixels behind a strip that has neighbours
  std::int64_t input_stride, output_stride;  // from row to row, in bytes
};

// Where a block's work begins and ends.
struct Place {
  std::int64_t image;
  int channel, x, first_row, end_row;

  template <typename Traits>
  __device__ static Place of(DepthwiseConvForwardParams const& params, Tiling const& tiling) {
    Place place;
    unsigned index = blockIdx.x;
    place.channel = index % tiling.channel_blocks * Traits::channels;
    index /= tiling.channel_blocks;
    place.x = index % tiling.strips.count * Traits::output_pixels;
    index /= tiling.strips.count;
    place.first_row = index % tiling.row_blocks * tiling.rows;
    place.end_row = min(place.first_row + tiling.rows, params.height);
    place.image = std::int64_t{index / tiling.row_blocks} * tiling.strips.images;
    return place;
  }
};

// What one thread copies and stores of each row: a word of every 32nd pixel.
template <typename Traits>
struct Share {
  char const* input;     // the first pixel, in the next row to copy
  char const* residual;  // in the next row to copy
  char* output;          // in the next row to store
  bool input_inside[Traits::passes + 1], output_inside[Traits::passes];
  int input_place, output_place;  // in a row in shared memory, in bytes

  __device__ Share(DepthwiseConvForwardParams const& params, Tiling const& tiling, Place const& place) {
    Strips const& strips = tiling.strips;
    int const word = threadIdx.x % Traits::words, pixel = threadIdx.x / Traits::words;
    int const strip = pixel >> strips.output_shift, x = pixel - (strip << strips.output_shift);
    int const channel = place.channel + 2 * word, column = place.x + x, first_input = column + tiling.input_column;
    std::int64_t const image = place.image + strip;
#pragma unroll
    for (int i = 0; i <= Traits::passes; ++i) {
      Pass const& pass = tiling.passes[i];
      std::int64_t const n = image + pass.images;
      bool const exists = n < params.batch && channel < params.channels;
      int const in = first_input + pass.columns;
      bool const used = i < Traits::passes || (strips.count > 1 && pixel < Traits::segment);
      input_inside[i] = exists && used && in >= 0 && in < params.width && !is_dropped(params, n);
      if (i < Traits::passes) {
        output_inside[i] = exists && column + pass.columns < params.width;
      }
    }
    auto const bytes = [&](ImageStrides const& strides, int y, int from) {
      return (image * strides.image + y * strides.row + from * strides.pixel + channel) * 2;
    };
    input = static_cast<char const*>(params.input) +
            bytes(params.input_strides, place.first_row - Traits::radius, first_input);
    std::int64_t const first_output = bytes(params.output_strides, place.first_row, column);
    output = static_cast<char*>(params.output) + first_output;
    residual = static_cast<char const*>(params.residual) + (Traits::has_residual ? first_output : 0);
    int const input_pixel = strip * strips.pixels + x + tiling.input_column + Traits::radius;
    input_place = (Traits::place(input_pixel) + word) * Traits::word_bytes;
    output_place = (Traits::place(pixel) + word) * Traits::word_bytes;
  }

  // Starts the copies of a row of the image.
  __device__ __forceinline__ void start_input(Tiling const& tiling, SharedPointer<char> row) const {
    row += input_place;
    char const* source = input;
#pragma unroll
    for (int i = 0; i <= Traits::passes; ++i) {
      source += tiling.passes[i].input;
      if (input_inside[i]) {
        copy(row + tiling.passes[i].input_place, source);
      }
    }
  }

  __device__ __forceinline__ void start_residual(Tiling const& tiling, SharedPointer<char> row) const {
    row += output_place;
    char const* source = residual;
#pragma unroll
    for (int i = 0; i < Traits::passes; ++i) {
      source += tiling.passes[i].output;
      if (output_inside[i]) {
        copy(row + i * Traits::pass_words * Traits::word_bytes, source);
      }
    }
  }

  __device__ __forceinline__ void store(Tiling const& tiling, SharedPointer<char> row) const {
    SharedPointer<std::uint32_t> const words = reinterpret_shared<std::uint32_t>(row + output_place);
    char* destination = output;
#pragma unroll
    for (int i = 0; i < Traits::passes; ++i) {
      destination += tiling.passes[i].output;
      if (output_inside[i]) {
        *reinterpret_cast<std::uint32_t*>(destination) = words[i * Traits::pass_words];
      }
    }
  }

 private:
  __device__ __forceinline__ static void copy(SharedPointer<char> destination, char const* source) {
    cp_async(reinterpret_shared<std::uint32_t>(destination), reinterpret_cast<std::uint32_t const*>(source), 1);
  }
};

template <typename Traits>
using Accumulators = float[Traits::kernel_size][2][4];  // output row, channel, fragment

// Adds an input row to the output rows that it takes part in. Output row r is in slot (r + n) % K for some n, the last
// of them in slot `newest`. `tile` is the lane's first pixel and the warp's word.
template <typename Traits>
__device__ __forceinline__ void accumulate(Accumulators<Traits>& sums, ToeplitzFilter<Traits> const& filter, int newest,
                                           SharedPointer<char> tile, int second_half) {
  std::uint32_t upper[2][2], lower[2][2];  // segments lane / 4 and lane / 4 + 8
  load_segment<Traits>(upper, reinterpret_shared<std::uint32_t>(tile));
  load_segment<Traits>(lower, reinterpret_shared<std::uint32_t>(tile + second_half));
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    std::uint32_t const a[4] = {upper[c][0], lower[c][0], upper[c][1], lower[c][1]};
#pragma unroll
    for (int i = 0; i < Traits::kernel_size; ++i) {
      int const slot = (newest - i + Traits::kernel_size) % Traits::kernel_size;
      mma_m16n8k16<typename Traits::Element>(sums[slot][c], a, filter.fragments[c][i]);
    }
  }
}

// Puts an output row, with the residual and rounded, where Share finds it. `spoilt` becomes NaN, and stays so, if any
// output is not finite. Both places are the lane's first pixel and the warp's word.
template <typename Traits>
__device__ __forceinline__ void stage_outputs(SharedPointer<char> outputs, SharedPointer<char> residuals,
                                              float const (&sums)[2][4], std::uint32_t& spoilt) {
  using Element = typename Traits::Element;
  SharedPointer<std::uint32_t> const words = reinterpret_shared<std::uint32_t>(outputs);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    int const place = i / 2 * (Traits::segments / 2) * Traits::segment_stride + i % 2 * Traits::pixel_stride;
    float2 output{sums[0][i], sums[1][i]};
    if constexpr (Traits::has_residual) {
      float2 const residual = unpack<Element>(reinterpret_shared<std::uint32_t>(residuals)[place]);
      output = {output.x + residual.x, output.y + residual.y};
    }
    std::uint32_t const rounded = pack<Element>(output.x, output.y);
    spoilt = multiply_add_pairs<Element>(rounded, 0, spoilt);
    words[place] = rounded;
  }
}

// Goes over the block's outputs again: those of dropped images, and those that are not finite, as what is not finite
// among the inputs spoils its whole segment in products with zeros.
template <typename Traits>
__device__ void correct_outputs(DepthwiseConvForwardParams const& params, Tiling const& tiling) {
  using Element = typename Traits::Element;
  Place const place = Place::of<Traits>(params, tiling);
  int const count = (place.end_row - place.first_row) * Traits::output_pixels * Traits::channels;
  for (int index = threadIdx.x; index < count; index += Traits::threads) {
    int const channel = place.channel + index % Traits::channels;
    int const pixel = index / Traits::channels % Traits::output_pixels;
    int const row = place.first_row + index / (Traits::channels * Traits::output_pixels);
    int const strip = pixel >> tiling.strips.output_shift;
    int const column = place.x + pixel - (strip << tiling.strips.output_shift);
    std::int64_t const n = place.image + strip;
    if (n >= params.batch || column >= params.width || channel >= params.channels) {
      continue;
    }
    ImageStrides const& strides = params.output_strides;
    std::int64_t const offset = n * strides.image + row * strides.row + column * strides.pixel + channel;
    Element& output = static_cast<Element*>(params.output)[offset];
    bool const drop = is_dropped(params, n);
    if (!drop && isfinite(to_float(output))) {
      continue;
    }
    float value = 0.0f;
    if (!drop) {
      value = convolve_window<Element, Traits::kernel_size>(params, n, row, column, channel);
    }
    if constexpr (Traits::has_residual) {
      value += to_float(static_cast<Element const*>(params.residual)[offset]);
    }
    output = from_float<Element>(value);
  }
}

// Offsets into the rings of rows in shared memory, which advance together.
template <typename Traits>
struct RingRow {
  int input = 0, residual = 0;  // in bytes

  __device__ __forceinline__ void advance(Tiling const& tiling) {
    bool const last = input == (Traits::stages - 1) * tiling.input_row;
    input = last ? 0 : input + tiling.input_row;
    residual = last ? 0 : residual + Traits::output_row;
  }
};

// The block's outputs, but for those that correct_outputs must correct; returns a NaN in either half if there are any.
template <typename Traits>
__device__ __forceinline__ std::uint32_t convolve_block(DepthwiseConvForwardParams const& params, Tiling const& tiling,
                                                        Place const& place) {
  constexpr int size = Traits::kernel_size, ahead = Traits::stages - 1;
  int const warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int const word = warp + 2 * (lane % 4) * Traits::pixel_stride;  // of the lane's first pixel, in its segment
  SharedPointer<char> const outputs = dynamic_shared<char>();                         // two rows
  SharedPointer<char> const residuals = outputs + 2 * Traits::output_row;             // a ring of rows
  SharedPointer<char> const inputs = residuals + Traits::residual_rows * Traits::output_row;  // a ring of rows
  int const tile = (tiling.strips.place<Traits>(lane / 4) + word) * Traits::word_bytes;
  int const first_output = (lane / 4 * Traits::segment_stride + word) * Traits::word_bytes;
  // Zero beside the image, where nothing is copied: a NaN left there would set correct_outputs to work in vain.
  int const ring_bytes = Traits::residual_rows * Traits::output_row + Traits::stages * tiling.input_row;
  for (int i = threadIdx.x; i < ring_bytes / Traits::word_bytes; i += Traits::threads) {
    reinterpret_shared<std::uint32_t>(residuals)[i] = 0;
  }
  ToeplitzFilter<Traits> filter;
  filter.load(params, place.channel + 2 * warp, lane);
  Share<Traits> share(params, tiling, place);
  __syncthreads();

  // A step computes with input row `row`, finishes output row `row - radius`, stores the one before and starts the
  // copies of input row `row + ahead` and of the residual that goes with it. Rows outside the image take no part.
  int const end_input = min(params.height, place.end_row + Traits::radius);
  RingRow<Traits> written, read;
  auto const start_copies = [&](int row) {
    if (row >= 0 && row < end_input) {
      share.start_input(tiling, inputs + written.input);
    }
    share.input += tiling.input_stride;
    keep(share.input);
    int const residual_row = row - Traits::radius;
    if (Traits::has_residual && residual_row >= place.first_row && residual_row < place.end_row) {
      share.start_residual(tiling, residuals + written.residual);
      share.residual += tiling.output_stride;
    }
    cp_async_commit();
    written.advance(tiling);
  };
  int const first_row = place.first_row - Traits::radius;
#pragma unroll
  for (int i = 0; i < ahead; ++i) {
    start_copies(first_row + i);
  }

  Accumulators<Traits> sums;
  std::uint32_t spoilt = 0;
  for (int first_of_ring = first_row;; first_of_ring += size) {
#pragma unroll
    for (int phase = 0; phase < size; ++phase) {
      int const row = first_of_ring + phase, output_row = row - Traits::radius;
      // Behind this barrier the step's inputs and the outputs of the step before are in shared memory, and nobody reads
      // any more what the step before read: its row of inputs, and the outputs of the step before that.
      cp_async_wait<ahead - 1>();
      __syncthreads();
      start_copies(row + ahead);
      if (output_row > place.first_row) {
        share.store(tiling, outputs + (output_row & 1) * Traits::output_row);
        share.output += tiling.output_stride;
      }
      if (output_row >= place.end_row) {
        return spoilt;
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        sums[phase][i / 4][i % 4] = filter.bias[i / 4];
      }
      if (row >= 0 && row < params.height) {
        accumulate<Traits>(sums, filter, phase, inputs + (read.input + tile), tiling.second_half);
      }
      if (output_row >= place.first_row) {
        stage_outputs<Traits>(outputs + (((output_row & 1) ^ 1) * Traits::output_row + first_output),
                              residuals + (read.residual + first_output), sums[(phase + 1) % size], spoilt);
      }
      read.advance(tiling);
    }
  }
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::threads, 2)
    depthwise_conv_forward(DepthwiseConvForwardParams const params, Tiling const tiling) {
  Place const place = Place::of<Traits>(params, tiling);
  Strips const& strips = tiling.strips;
  bool correct = true;
  if (strips.dropped(params, place.image) < strips.existing(params, place.image)) {
    std::uint32_t const spoilt = convolve_block<Traits>(params, tiling, place);
    Place const place = Place::of<Traits>(params, tiling);  // not kept in registers meanwhile
    correct = any_nan<typename Traits::Element>(spoilt) || strips.dropped(params, place.image) > 0;
  }
  if (__syncthreads_or(correct)) {
    correct_outputs<Traits>(params, tiling);
  }
}

template <typename Traits>
Tiling tiling_of(DepthwiseConvForwardParams const& params) {
  Tiling tiling;
  tiling.strips = Strips::of<Traits>(params.width);
  tiling.channel_blocks = ceil_div(params.channels, Traits::channels);
  tiling.rows = ceil_div(params.height, ceil_div(params.height, Traits::most_rows));
  tiling.row_blocks = ceil_div(params.height, tiling.rows);
  tiling.input_column = tiling.strips.count > 1 ? -Traits::radius : 0;
  tiling.second_half = tiling.strips.place<Traits>(Traits::segments / 2) * Traits::word_bytes;
  tiling.input_row = Traits::place(tiling.strips.images * tiling.strips.pixels) * Traits::word_bytes;
  tiling.input_stride = params.input_strides.row * 2;
  tiling.output_stride = params.output_strides.row * 2;
  for (int i = 0; i <= Traits::passes; ++i) {
    // Behind a strip that has neighbours lie more of its own pixels, not the next image's.
    int const images = i < Traits::passes ? 32 * i >> tiling.strips.output_shift : 0;
    int const columns = 32 * i - (images << tiling.strips.output_shift);
    Pass const before = i > 0 ? tiling.passes[i - 1] : Pass{};
    auto const bytes = [=](ImageStrides const& strides) {
      return ((images - before.images) * strides.image + (columns - before.columns) * strides.pixel) * 2;
    };
    int const place = Traits::place(images * tiling.strips.pixels + columns);
    tiling.passes[i] = {images, columns, place * Traits::word_bytes, bytes(params.input_strides),
                        bytes(params.output_strides)};
  }
  return tiling;
}

template <typename Traits>
cudaError_t launch_with(DepthwiseConvForwardParams const& params, cudaStream_t stream) {
  Tiling const tiling = tiling_of<Traits>(params);
  std::int64_t const positions = std::int64_t{tiling.channel_blocks} * tiling.strips.count;
  std::int64_t const image_groups = ceil_div(params.batch, std::int64_t{tiling.strips.images});
  constexpr std::int64_t most_blocks = 0x7fffffff;
  if (positions > most_blocks / tiling.row_blocks || image_groups > most_blocks / (positions * tiling.row_blocks)) {
    return cudaErrorInvalidConfiguration;
  }
  dim3 const grid(static_cast<unsigned>(positions * tiling.row_blocks * image_groups));
  return launch(depthwise_conv_forward<Traits>, grid, Traits::threads, Traits::shared_bytes(tiling.input_row), stream,
                params, tiling);
}

template <typename Element, int kernel_size>
cudaError_t launch_residual(DepthwiseConvForwardParams const& params, cudaStream_t stream) {
  return params.residual ? launch_with<Traits<Element, kernel_size, true>>(params, stream)
                         : launch_with<Traits<Element, kernel_size, false>>(params, stream);
}

template <typename Element>
cudaError_t launch_size(DepthwiseConvForwardParams const& params, cudaStream_t stream) {
  switch (params.kernel_size) {
    case 3: return launch_residual<Element, 3>(params, stream);
    case 5: return launch_residual<Element, 5>(params, stream);
    default: return launch_residual<Element, 7>(params, stream);
  }
}

}  // namespace

cudaError_t launch_depthwise_conv_on_tensor_cores(DepthwiseConvForwardParams const& params, cudaStream_t stream) {
  return params.type == ElementType::float16 ? launch_size<__half>(params, stream)
                                             : launch_size<__nv_bfloat16>(params, stream);
}

}  // namespace convnext_kernels
