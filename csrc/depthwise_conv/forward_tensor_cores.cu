// A block walks down the rows of 8 segments (of one image, or of several where these are narrow), each warp with two
// channels; see toeplitz.cuh. A step takes two input rows, which meet K/2 + 1 pairs of output rows: these wait in a ring
// of accumulators, so that every input is loaded once.
#include "common/launch.cuh"
#include "depthwise_conv/paths.h"
#include "depthwise_conv/toeplitz.cuh"

namespace convnext_kernels {
namespace {

template <typename Element, int kernel_size, bool has_residual_>
struct Traits : ToeplitzTraits<Element, kernel_size> {
  using Base = ToeplitzTraits<Element, kernel_size>;
  static constexpr bool has_residual = has_residual_;
  static constexpr int live_pairs = Base::radius + 1;  // pairs of output rows that a step's input rows take part in
  static constexpr int most_rows = 64;  // of outputs in a block; each split reads 2 radius input rows again

  static constexpr int input_row = Base::input_pixels * Base::pixel_stride;
  static constexpr int stage = 2 * input_row;
  // A multiple of live_pairs, so that in a loop unrolled by it every place in both rings is a constant.
  static constexpr int stages = live_pairs == 2 ? 4 : live_pairs;

  static constexpr int output_row = Base::output_pixels * Base::pixel_stride;
  static constexpr int output_step = 2 * output_row;
  static constexpr int residual_steps = has_residual ? stages : 0;
  static constexpr std::size_t shared_bytes =
      sizeof(std::uint32_t) * (stages * stage + (2 + residual_steps) * output_step);

  static_assert(2 * shared_bytes <= 163 * 1024, "two blocks fit on a multiprocessor of sm_80");
};

// What lies where in a block's shared memory.
template <typename Traits>
struct Buffers {
  SharedPointer<std::uint32_t> inputs = dynamic_shared<std::uint32_t>();           // a ring of steps
  SharedPointer<std::uint32_t> outputs = inputs + Traits::stages * Traits::stage;  // two steps
  SharedPointer<std::uint32_t> residuals = outputs + 2 * Traits::output_step;      // a ring of steps
};

// How a launch's blocks share the work.
struct Tiling {
  Strips strips;
  int channel_blocks, row_blocks;
  int rows;  // of output in a block, even
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
    place.x = index % tiling.strips.count * (tiling.strips.segments * Traits::segment);
    index /= tiling.strips.count;
    place.first_row = index % tiling.row_blocks * tiling.rows;
    place.end_row = min(place.first_row + tiling.rows, params.height);
    place.image = std::int64_t{index / tiling.row_blocks} * tiling.strips.images;
    return place;
  }
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

  __device__ InputCopies(DepthwiseConvForwardParams const& params, Strips const& strips, Place const& place)
      : row_stride(params.input_strides.row / 2), height(params.height) {
    int const channel = place.channel + 2 * share.word;
#pragma unroll
    for (int pass = 0; pass < passes; ++pass) {
      int const pixel = share.pixel(pass);
      std::int64_t const n = place.image + pixel / strips.pixels;
      int const column = place.x - Traits::radius + pixel % strips.pixels;
      inside[pass] = pixel < strips.images * strips.pixels && n < params.batch && !is_dropped(params, n) && column >= 0 &&
                     column < params.width && channel < params.channels;
      std::int64_t const start =
          inside[pass] ? n * params.input_strides.image + column * params.input_strides.pixel + channel : 0;
      sources[pass] = static_cast<std::uint32_t const*>(params.input) + start / 2 +
                      (place.first_row - Traits::radius) * row_stride;
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

// What one thread stores of each output row, and copies of the residual's.
template <typename Traits>
struct OutputStores {
  static constexpr int passes = Traits::output_pixels / Traits::pixels_per_pass;

  std::uint32_t* destinations[passes];                                // in the next row to store
  std::uint32_t const* residuals[Traits::has_residual ? passes : 1];  // in the next row to copy, `stages` steps on
  bool inside[passes];
  std::int64_t row_stride;  // in words
  Share<Traits> share;

  __device__ OutputStores(DepthwiseConvForwardParams const& params, Strips const& strips, Place const& place,
                          int first_row)
      : row_stride(params.output_strides.row / 2) {
    int const strip_outputs = strips.segments * Traits::segment, channel = place.channel + 2 * share.word;
#pragma unroll
    for (int pass = 0; pass < passes; ++pass) {
      int const pixel = share.pixel(pass);
      std::int64_t const n = place.image + pixel / strip_outputs;
      int const column = place.x + pixel % strip_outputs;
      inside[pass] = n < params.batch && column < params.width && channel < params.channels;
      std::int64_t const start =
          inside[pass] ? n * params.output_strides.image + column * params.output_strides.pixel + channel : 0;
      std::int64_t const first = start / 2 + first_row * row_stride;
      destinations[pass] = static_cast<std::uint32_t*>(params.output) + first;
      if constexpr (Traits::has_residual) {
        residuals[pass] = static_cast<std::uint32_t const*>(params.residual) + first + 2 * Traits::stages * row_stride;
      }
    }
  }

  __device__ void zero_outside(SharedPointer<std::uint32_t> residuals) const {
#pragma unroll
    for (int row_of_ring = 0; row_of_ring < 2 * Traits::residual_steps; ++row_of_ring) {
#pragma unroll
      for (int pass = 0; pass < passes; ++pass) {
        if (!inside[pass]) {
          residuals[row_of_ring * Traits::output_row + share.place(pass)] = 0;
        }
      }
    }
  }

  // Starts the copies of the next two rows of the residual, `rows` of which exist; zeros elsewhere.
  __device__ __forceinline__ void start_residual(SharedPointer<std::uint32_t> stage, int rows) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int pass = 0; pass < passes; ++pass) {
        if (inside[pass]) {
          cp_async<std::uint32_t>(stage + i * Traits::output_row + share.place(pass),
                                  residuals[pass] + i * row_stride, i < rows);
        }
      }
    }
  }

  // Stores the step's two rows, `rows` of which exist.
  __device__ __forceinline__ void store(SharedPointer<std::uint32_t> staged, int rows) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int pass = 0; pass < passes; ++pass) {
        if (inside[pass] && i < rows) {
          destinations[pass][i * row_stride] = staged[i * Traits::output_row + share.place(pass)];
        }
      }
    }
  }

  __device__ __forceinline__ void advance() {
#pragma unroll
    for (int pass = 0; pass < passes; ++pass) {
      destinations[pass] += 2 * row_stride;
      if constexpr (Traits::has_residual) {
        residuals[pass] += 2 * row_stride;
      }
    }
  }
};

template <typename Traits>
using Accumulators = float[Traits::live_pairs][2][4];  // pair of rows, channel, fragment

// Adds a step's two input rows to the pairs of output rows that they take part in. Pair m lives in slot m % live_pairs;
// the newest is in slot `newest`. `tile` is the lane's first pixel and the warp's word.
template <typename Traits>
__device__ __forceinline__ void accumulate(Accumulators<Traits>& sums, ToeplitzFilter<Traits> const& filter, int newest,
                                           SharedPointer<std::uint32_t> tile) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    std::uint32_t b[2][2];
    load_segments<Traits>(b, tile + i * Traits::input_row);
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

// Puts a pair of output rows, with the residual and rounded, where OutputStores finds it. `spoilt` becomes NaN, and stays
// so, if any is not finite.
template <typename Traits>
__device__ __forceinline__ void stage_outputs(SharedPointer<std::uint32_t> staged,
                                              SharedPointer<std::uint32_t> residuals, float const (&sums)[2][4],
                                              int warp, int lane, std::uint32_t& spoilt) {
  using Element = typename Traits::Element;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    int const segment = 2 * (lane % 4) + i % 2;
    int const pixel = segment * Traits::segment + lane / 4;
    int const place = i / 2 * Traits::output_row + pixel * Traits::pixel_stride + warp;
    float2 output{sums[0][i], sums[1][i]};
    if constexpr (Traits::has_residual) {
      float2 const residual = unpack<Element>(residuals[place]);
      output = {output.x + residual.x, output.y + residual.y};
    }
    std::uint32_t const rounded = pack<Element>(output.x, output.y);
    spoilt = multiply_add_pairs<Element>(rounded, 0, spoilt);
    staged[place] = rounded;
  }
}

// Goes over the block's outputs again: those of dropped images, and those that are not finite, as what is not finite
// among the inputs spoils its whole segment in products with zeros.
template <typename Traits>
__device__ void correct_outputs(DepthwiseConvForwardParams const& params, Tiling const& tiling) {
  using Element = typename Traits::Element;
  Place const place = Place::of<Traits>(params, tiling);
  int const strip_outputs = tiling.strips.segments * Traits::segment;
  int const count = (place.end_row - place.first_row) * Traits::output_pixels * Traits::channels;
  for (int index = threadIdx.x; index < count; index += Traits::threads) {
    int const channel = place.channel + index % Traits::channels;
    int const pixel = index / Traits::channels % Traits::output_pixels;
    int const row = place.first_row + index / (Traits::channels * Traits::output_pixels);
    int const column = place.x + pixel % strip_outputs;
    std::int64_t const n = place.image + pixel / strip_outputs;
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

// The block's outputs, but for those that correct_outputs must correct; returns a NaN in either half if there are any.
template <typename Traits>
__device__ __forceinline__ std::uint32_t convolve_block(DepthwiseConvForwardParams const& params, Strips const& strips,
                                                        Place const& place) {
  int const warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  Buffers<Traits> const buffers;
  int const tile = strips.first_pixel<Traits>(lane) * Traits::pixel_stride + warp;

  ToeplitzFilter<Traits> filter;
  filter.load(params, place.channel + 2 * warp, lane);

  // A step stores output rows row and row + 1, which the step before has finished, and finishes the next two. The input
  // and residual rows that it computes with, and those that it starts to copy, are at constant distances from these.
  int const first_step = place.first_row - 2 * Traits::live_pairs;
  InputCopies<Traits> copies(params, strips, place);
  OutputStores<Traits> stores(params, strips, place, first_step - 2 * (Traits::stages - 1));
  auto const start_copies = [&](int stage, int row) {
    int const residual_row = row + 2 * Traits::stages, input_row = residual_row + Traits::radius;
    if (input_row < place.end_row + Traits::radius) {
      copies.start(buffers.inputs + stage * Traits::stage, input_row);
    }
    if (Traits::has_residual && residual_row >= place.first_row) {
      stores.start_residual(buffers.residuals + stage * Traits::output_step, place.end_row - residual_row);
    }
    cp_async_commit();
  };
  copies.zero_outside(buffers.inputs);
  stores.zero_outside(buffers.residuals);
#pragma unroll
  for (int stage = 0; stage < Traits::stages - 1; ++stage) {
    start_copies(stage, first_step + 2 * (stage - (Traits::stages - 1)));
    stores.advance();
  }

  Accumulators<Traits> sums;
  std::uint32_t spoilt = 0;
  for (int ring_row = first_step;; ring_row += 2 * Traits::stages) {
#pragma unroll
    for (int stage = 0; stage < Traits::stages; ++stage) {
      int const row = ring_row + 2 * stage, next_row = row + 2;
      // Behind this barrier the step's inputs and the outputs of the step before are in shared memory, and nobody reads
      // any more what the step before read: its stage of inputs, and the outputs of the step before that.
      cp_async_wait<Traits::stages - 2>();
      __syncthreads();
      start_copies((stage + Traits::stages - 1) % Traits::stages, row);
      if (row >= place.first_row) {
        stores.store(buffers.outputs + (row & 2) * Traits::output_row, place.end_row - row);
      }
      stores.advance();
      if (next_row >= place.end_row) {
        return spoilt;
      }
      int const newest = stage % Traits::live_pairs, oldest = (newest + 1) % Traits::live_pairs;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        sums[newest][i / 4][i % 4] = filter.bias[i / 4];
      }
      accumulate<Traits>(sums, filter, newest, buffers.inputs + stage * Traits::stage + tile);
      if (next_row >= place.first_row) {
        stage_outputs<Traits>(buffers.outputs + (next_row & 2) * Traits::output_row,
                              buffers.residuals + stage * Traits::output_step, sums[oldest], warp, lane, spoilt);
      }
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
    std::uint32_t const spoilt = convolve_block<Traits>(params, strips, place);
    Place const place = Place::of<Traits>(params, tiling);  // not kept in registers meanwhile
    correct = any_nan<typename Traits::Element>(spoilt) || strips.dropped(params, place.image) > 0;
  }
  if (__syncthreads_or(correct)) {
    correct_outputs<Traits>(params, tiling);
  }
}

template <typename Traits>
cudaError_t launch_with(DepthwiseConvForwardParams const& params, cudaStream_t stream) {
  Tiling tiling;
  tiling.strips = Strips::of<Traits>(params.width);
  tiling.channel_blocks = ceil_div(params.channels, Traits::channels);
  tiling.rows = 2 * ceil_div(params.height, 2 * ceil_div(params.height, Traits::most_rows));
  tiling.row_blocks = ceil_div(params.height, tiling.rows);
  std::int64_t const positions = std::int64_t{tiling.channel_blocks} * tiling.strips.count;
  std::int64_t const image_groups = ceil_div(params.batch, std::int64_t{tiling.strips.images});
  constexpr std::int64_t most_blocks = 0x7fffffff;
  if (positions > most_blocks / tiling.row_blocks || image_groups > most_blocks / (positions * tiling.row_blocks)) {
    return cudaErrorInvalidConfiguration;
  }
  dim3 const grid(static_cast<unsigned>(positions * tiling.row_blocks * image_groups));
  return launch(depthwise_conv_forward<Traits>, grid, Traits::threads, Traits::shared_bytes, stream, params, tiling);
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
