// A lane has one channel: a warp walks down the rows of a strip of output columns, the filter and the sums of all output
// rows that an input row takes part in held in registers, so that every input is loaded once for the strip.
#include "common/elements.cuh"
#include "common/integers.h"
#include "common/launch.cuh"
#include "depthwise_conv/paths.h"
#include "depthwise_conv/window.cuh"

namespace convnext_kernels {
namespace {

template <typename Element_, int kernel_size_>
struct Traits {
  using Element = Element_;
  static constexpr int kernel_size = kernel_size_;
  static constexpr int radius = kernel_size / 2;
  static constexpr int columns = 7;  // of a strip: the models' maps are 56, 28, 14 and 7 wide
  static constexpr int inputs = columns + 2 * radius;
  static constexpr int channels = 32;  // of a warp
  static constexpr int warps = 4;
  static constexpr int threads = 32 * warps;
  static constexpr int blocks = 3;      // on a multiprocessor: 168 registers a thread
  static constexpr int most_rows = 56;  // of a warp's strip; each split reads 2 radius input rows again
};

struct Tiling {
  int channel_blocks, strips, row_blocks;
  int rows;  // of output in a warp's strip
  std::int64_t items;
};

// One warp's work.
struct Place {
  std::int64_t image;
  int x, first_row, end_row;

  template <typename Traits>
  __device__ static Place of(DepthwiseConvForwardParams const& params, Tiling const& tiling, std::int64_t item) {
    Place place;
    place.x = static_cast<int>(item % tiling.strips) * Traits::columns;
    item /= tiling.strips;
    place.first_row = static_cast<int>(item % tiling.row_blocks) * tiling.rows;
    place.end_row = min(place.first_row + tiling.rows, params.height);
    place.image = item / tiling.row_blocks;
    return place;
  }
};

// Stores a row of the strip, with the residual.
template <typename Traits>
__device__ __forceinline__ void store_row(DepthwiseConvForwardParams const& params, float const (&sums)[Traits::columns],
                                          std::int64_t start, int columns_inside) {
  using Element = typename Traits::Element;
  std::int64_t const stride = params.output_strides.pixel;
  float residuals[Traits::columns] = {};
  if (params.residual) {
    Element const* const residual = static_cast<Element const*>(params.residual) + start;
#pragma unroll
    for (int column = 0; column < Traits::columns; ++column) {
      residuals[column] = column < columns_inside ? to_float(residual[column * stride]) : 0.0f;
    }
  }
  Element* const output = static_cast<Element*>(params.output) + start;
#pragma unroll
  for (int column = 0; column < Traits::columns; ++column) {
    if (column < columns_inside) {
      output[column * stride] = from_float<Element>(sums[column] + residuals[column]);
    }
  }
}

// Loads a row of inputs; zeros outside the image.
template <typename Traits>
__device__ __forceinline__ void load_row(float (&values)[Traits::inputs], typename Traits::Element const* first,
                                         std::int64_t pixel_stride, unsigned inside) {
#pragma unroll
  for (int i = 0; i < Traits::inputs; ++i) {
    values[i] = inside >> i & 1 ? to_float(first[i * pixel_stride]) : 0.0f;
  }
}

// A lane's filter and bias.
template <typename Traits>
struct Filter {
  static constexpr int size = Traits::kernel_size;

  float taps[size][size];
  float bias;

  template <typename Parameter>
  __device__ void load(DepthwiseConvForwardParams const& params, int channel) {
    Taps<Parameter, size> const source{static_cast<Parameter const*>(params.weight), params.flip_filter};
#pragma unroll
    for (int i = 0; i < size; ++i) {
#pragma unroll
      for (int j = 0; j < size; ++j) {
        taps[i][j] = source(channel, i, j);
      }
    }
    bias = params.bias ? to_float(static_cast<Parameter const*>(params.bias)[channel]) : 0.0f;
  }
};

template <typename Traits>
__device__ __forceinline__ void convolve_strip(DepthwiseConvForwardParams const& params, Place const& place,
                                               Filter<Traits> const& filter, int channel) {
  using Element = typename Traits::Element;
  constexpr int size = Traits::kernel_size;
  ImageStrides const& strides = params.input_strides;
  int const first_input_row = place.first_row - Traits::radius, first_column = place.x - Traits::radius;
  unsigned columns_inside = 0;
#pragma unroll
  for (int i = 0; i < Traits::inputs; ++i) {
    columns_inside |= static_cast<unsigned>(first_column + i >= 0 && first_column + i < params.width) << i;
  }
  Element const* input = static_cast<Element const*>(params.input) + place.image * strides.image +
                         first_input_row * strides.row + first_column * strides.pixel + channel;
  std::int64_t output = place.image * params.output_strides.image +
                        (first_input_row - Traits::radius) * params.output_strides.row +
                        place.x * params.output_strides.pixel + channel;

  // Output row r waits in sums[r % size] while input rows r - radius to r + radius pass.
  float sums[size][Traits::columns];
  float next[Traits::inputs];
  auto const inside = [&](int row) { return row >= 0 && row < params.height ? columns_inside : 0u; };
  load_row<Traits>(next, input, strides.pixel, inside(first_input_row));
  for (int ring_row = first_input_row;; ring_row += size) {
#pragma unroll
    for (int phase = 0; phase < size; ++phase) {
      int const row = ring_row + phase;
      float values[Traits::inputs];
#pragma unroll
      for (int i = 0; i < Traits::inputs; ++i) {
        values[i] = next[i];
      }
      input += strides.row;
      load_row<Traits>(next, input, strides.pixel, row + 1 < place.end_row + Traits::radius ? inside(row + 1) : 0u);
#pragma unroll
      for (int column = 0; column < Traits::columns; ++column) {
        sums[phase][column] = 0.0f;
      }
#pragma unroll
      for (int i = 0; i < size; ++i) {
        int const slot = (phase - i + size) % size;  // of output row row + radius - i
#pragma unroll
        for (int column = 0; column < Traits::columns; ++column) {
#pragma unroll
          for (int j = 0; j < size; ++j) {
            sums[slot][column] += filter.taps[i][j] * values[column + j];
          }
        }
      }
      if (row - Traits::radius >= place.first_row) {
        float(&done)[Traits::columns] = sums[(phase + 1) % size];
#pragma unroll
        for (int column = 0; column < Traits::columns; ++column) {
          done[column] += filter.bias;  // last, or every product's sum would be rounded at the bias's scale
        }
        store_row<Traits>(params, done, output, params.width - place.x);
      }
      output += params.output_strides.row;
      if (row + 1 >= place.end_row + Traits::radius) {
        return;
      }
    }
  }
}

// A dropped image has no convolution: the residual alone, or zeros.
template <typename Traits>
__device__ void store_dropped(DepthwiseConvForwardParams const& params, Place const& place, int channel) {
  float const zeros[Traits::columns] = {};
  for (int row = place.first_row; row < place.end_row; ++row) {
    ImageStrides const& strides = params.output_strides;
    store_row<Traits>(params, zeros, place.image * strides.image + row * strides.row + place.x * strides.pixel + channel,
                      params.width - place.x);
  }
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::threads, Traits::blocks)
    depthwise_conv_forward_on_cuda_cores(DepthwiseConvForwardParams const params, Tiling const tiling) {
  int const channel = static_cast<int>(blockIdx.x % tiling.channel_blocks) * Traits::channels + threadIdx.x % 32;
  std::int64_t const item = std::int64_t{blockIdx.x / tiling.channel_blocks} * Traits::warps + threadIdx.x / 32;
  if (item >= tiling.items || channel >= params.channels) {
    return;
  }
  Place const place = Place::of<Traits>(params, tiling, item);
  if (is_dropped(params, place.image)) {
    return store_dropped<Traits>(params, place, channel);
  }
  Filter<Traits> filter;
  if (params.parameter_type == ElementType::float32) {
    filter.template load<float>(params, channel);
  } else {
    filter.template load<typename Traits::Element>(params, channel);
  }
  convolve_strip<Traits>(params, place, filter, channel);
}

template <typename Traits>
cudaError_t launch_with(DepthwiseConvForwardParams const& params, cudaStream_t stream) {
  Tiling tiling;
  tiling.channel_blocks = ceil_div(params.channels, Traits::channels);
  tiling.strips = ceil_div(params.width, Traits::columns);
  tiling.rows = ceil_div(params.height, ceil_div(params.height, Traits::most_rows));
  tiling.row_blocks = ceil_div(params.height, tiling.rows);
  tiling.items = std::int64_t{tiling.strips} * tiling.row_blocks * params.batch;
  std::int64_t const blocks = ceil_div(tiling.items, std::int64_t{Traits::warps});
  constexpr std::int64_t most_blocks = 0x7fffffff;
  if (blocks > most_blocks / tiling.channel_blocks) {
    return cudaErrorInvalidConfiguration;
  }
  dim3 const grid(static_cast<unsigned>(blocks * tiling.channel_blocks));
  return launch(depthwise_conv_forward_on_cuda_cores<Traits>, grid, Traits::threads, 0, stream, params, tiling);
}

template <typename Element>
cudaError_t launch_size(DepthwiseConvForwardParams const& params, cudaStream_t stream) {
  switch (params.kernel_size) {
    case 3: return launch_with<Traits<Element, 3>>(params, stream);
    case 5: return launch_with<Traits<Element, 5>>(params, stream);
    default: return launch_with<Traits<Element, 7>>(params, stream);
  }
}

}  // namespace

cudaError_t launch_depthwise_conv_on_cuda_cores(DepthwiseConvForwardParams const& params, cudaStream_t stream) {
  switch (params.type) {
    case ElementType::float16: return launch_size<__half>(params, stream);
    case ElementType::bfloat16: return launch_size<__nv_bfloat16>(params, stream);
    default: return launch_size<float>(params, stream);
  }
}

}  // namespace convnext_kernels
