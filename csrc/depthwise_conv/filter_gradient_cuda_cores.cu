// A lane is a channel, so that a warp reads neighbours. It holds the gradients of all taps of its channel and walks
// along two rows of grad_output (of an odd number the last alone), the window of input that they meet in registers. A
// step exchanges one column of the window: for 7 x 7 taps 10 loads to 98 products. Products are of pixels inside the
// image only, so that a NaN reaches no tap that does not depend on it.
#include "common/elements.cuh"
#include "common/launch.cuh"
#include "common/ptx.cuh"
#include "common/shared.cuh"
#include "depthwise_conv/filter_gradient_paths.cuh"

namespace convnext_kernels {
namespace {

template <typename Element_, int kernel_size_>
struct Traits {
  using Element = Element_;
  static constexpr int kernel_size = kernel_size_;
  static constexpr int radius = kernel_size / 2;
  static constexpr int rows = 2;   // of grad_output in a walk
  static constexpr int warps = 4;  // on walks next to each other, which share input in the cache
  static constexpr int channels = 32;
  static constexpr int threads = channels * warps;
  static constexpr int blocks = 3;  // on a multiprocessor: 168 registers for a thread

  static constexpr int taps = kernel_size * kernel_size, bias = taps;
  static constexpr int stride = channels + 1;  // in shared memory from tap to tap: odd, as they are read by channel
  static constexpr int warp_sums = (taps + 1) * stride;
  static constexpr int most_columns = 28;  // between two flushes, each of which takes as long as one of them
};

// How a launch's blocks share the work.
struct Walks {
  std::int64_t count;
  int of_image;
  int channel_blocks;
  std::int64_t splits;
};

// The sums of a lane over a few columns, in registers, and of all before these, in shared memory: the error of a sum grows
// with the number of its terms, so that it is made in two levels.
template <typename Traits>
struct Sums {
  float taps[Traits::kernel_size][Traits::kernel_size] = {};
  float bias = 0.0f;
  int columns = 0;  // since the last flush
  SharedPointer<float> totals;

  __device__ explicit Sums(SharedPointer<float> totals) : totals(totals) {
    for (int tap = 0; tap <= Traits::taps; ++tap) {
      totals[tap * Traits::stride] = 0.0f;
    }
  }

  __device__ __forceinline__ void flush() {
    constexpr int size = Traits::kernel_size;
#pragma unroll
    for (int tap = 0; tap < Traits::taps; ++tap) {
      totals[tap * Traits::stride] += taps[tap / size][tap % size];
      taps[tap / size][tap % size] = 0.0f;
      keep_in_order();
    }
    totals[Traits::bias * Traits::stride] += bias;
    bias = 0.0f;
    columns = 0;
  }
};

// A walk along `rows` rows of grad_output; with all_inside, all rows of the window lie in the image. Column x of the
// image stays in place x % kernel_size of the window, zeros are in the places of columns outside.
template <typename Traits, int rows, bool all_inside>
struct Walk {
  using Element = typename Traits::Element;
  static constexpr int size = Traits::kernel_size;
  static constexpr int radius = Traits::radius;
  static constexpr int window_rows = size + rows - 1;

  float window[window_rows][size] = {};
  Element const *input, *grad;  // the first row of the window and of grad_output, at the next column to load
  std::int64_t input_row, input_pixel, grad_row, grad_pixel;  // strides
  int width;
  unsigned inside = 0;  // bit i: row i of the window lies in the image

  __device__ Walk(DepthwiseConvFilterGradientParams const& params, std::int64_t image, int row, int channel)
      : input_row(params.input_strides.row),
        input_pixel(params.input_strides.pixel),
        grad_row(params.grad_output_strides.row),
        grad_pixel(params.grad_output_strides.pixel),
        width(params.width) {
    input = static_cast<Element const*>(params.input) + image * params.input_strides.image +
            (row - radius) * input_row + channel;
    grad = static_cast<Element const*>(params.grad_output) + image * params.grad_output_strides.image +
           row * grad_row + channel;
#pragma unroll
    for (int i = 0; i < window_rows; ++i) {
      int const y = row - radius + i;
      inside |= static_cast<unsigned>(y >= 0 && y < params.height) << i;
    }
  }

  __device__ __forceinline__ bool row_inside(int i) const { return all_inside || (inside >> i & 1) != 0; }

  __device__ __forceinline__ void add_to(Sums<Traits>& sums) {
#pragma unroll
    for (int column = 0; column <= radius; ++column) {
#pragma unroll
      for (int i = 0; i < window_rows; ++i) {
        if (column < width && row_inside(i)) {
          window[i][column] = to_float(input[i * input_row]);
        }
      }
      input += input_pixel;
    }
    for (int first = 0; first < width; first += size) {
#pragma unroll
      for (int place = 0; place < size; ++place) {
        if (first + place < width) {
          add_column(sums, first + place, place);
        }
      }
      sums.columns += size;
      if (sums.columns >= Traits::most_columns) {
        sums.flush();
      }
    }
  }

  // Adds what column x of grad_output meets, x = place modulo kernel_size.
  __device__ __forceinline__ void add_column(Sums<Traits>& sums, int x, int place) {
    float grads[rows][size];  // zeros where input's column is outside
#pragma unroll
    for (int row = 0; row < rows; ++row) {
      float const value = to_float(grad[row * grad_row]);
      sums.bias += value;
#pragma unroll
      for (int j = 0; j < size; ++j) {
        bool const column_inside = x + j - radius >= 0 && x + j - radius < width;
        grads[row][j] = column_inside ? value : 0.0f;
      }
    }
    grad += grad_pixel;
    bool const next_inside = x + radius + 1 < width;
#pragma unroll
    for (int i = 0; i < window_rows; ++i) {
      if (row_inside(i)) {
        add_row(sums, grads, place, i);
        // In the place of the column that nothing meets any more.
        window[i][(place + radius + 1) % size] = next_inside ? to_float(input[i * input_row]) : 0.0f;
      }
    }
    input += input_pixel;
  }

  __device__ __forceinline__ void add_row(Sums<Traits>& sums, float const (&grads)[rows][size], int place, int i) {
#pragma unroll
    for (int row = 0; row < rows; ++row) {
      int const tap = i - row;
#pragma unroll
      for (int j = 0; j < size; ++j) {
        if (tap >= 0 && tap < size) {
          sums.taps[tap][j] += window[i][(place + j - radius + size) % size] * grads[row][j];
        }
      }
    }
  }
};

// Adds up the sums of a block's warps, in order, and writes them.
template <typename Traits>
__device__ __forceinline__ void write_partial(DepthwiseConvFilterGradientParams const& params,
                                              SharedPointer<float> of_warps, std::int64_t split, int first_channel) {
  constexpr int size = Traits::kernel_size, taps = Traits::taps, bias = Traits::bias;
  __syncthreads();
  auto const sum = [&](int tap, int channel) {
    float total = 0.0f;
    for (int warp = 0; warp < Traits::warps; ++warp) {
      float const part = of_warps[warp * Traits::warp_sums + tap * Traits::stride + channel];
      total += part;
    }
    return total;
  };
  int const channels = min(Traits::channels, params.channels - first_channel);
  float* const weights = weight_partial<size>(params, split, first_channel);
  for (int i = threadIdx.x; i < channels * taps; i += Traits::threads) {
    weights[i] = sum(i % taps, i / taps);
  }
  float* const biases = bias_partial<size>(params, split, first_channel);
  for (int i = threadIdx.x; i < channels; i += Traits::threads) {
    biases[i] = sum(bias, i);
  }
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::threads, Traits::blocks)
    filter_gradient_on_cuda_cores(DepthwiseConvFilterGradientParams const params, Walks const walks) {
  int const warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int const first_channel = blockIdx.x % walks.channel_blocks * Traits::channels;
  int const channel = min(first_channel + lane, params.channels - 1);  // behind the last any, as nothing is written
  std::int64_t const split = blockIdx.x / walks.channel_blocks;
  std::int64_t const end = first_unit(walks.count, walks.splits, split + 1);
  __shared__ SharedArray<float, Traits::warps * Traits::warp_sums> of_warps;
  Sums<Traits> sums(of_warps + (warp * Traits::warp_sums + lane));
  for (std::int64_t walk = first_unit(walks.count, walks.splits, split) + warp; walk < end; walk += Traits::warps) {
    std::int64_t const image = walk / walks.of_image;
    int const row = static_cast<int>(walk - image * walks.of_image) * Traits::rows;
    if (params.drop_path_factor && params.drop_path_factor[image] == 0.0f) {
      continue;
    }
    if (row >= Traits::radius && row + 1 + Traits::radius < params.height) {
      Walk<Traits, 2, true>(params, image, row, channel).add_to(sums);
    } else if (row + 1 < params.height) {
      Walk<Traits, 2, false>(params, image, row, channel).add_to(sums);
    } else {
      Walk<Traits, 1, false>(params, image, row, channel).add_to(sums);
    }
  }
  sums.flush();
  write_partial<Traits>(params, of_warps, split, first_channel);
}

Walks walks_of(DepthwiseConvFilterGradientParams const& params, std::int64_t splits) {
  using Any = Traits<float, 7>;
  Walks walks;
  walks.of_image = ceil_div(params.height, Any::rows);
  walks.count = params.batch * walks.of_image;
  walks.channel_blocks = ceil_div(params.channels, Any::channels);
  walks.splits = splits;
  return walks;
}

template <typename Element, int kernel_size>
cudaError_t launch_with(DepthwiseConvFilterGradientParams const& params, std::int64_t splits, cudaStream_t stream) {
  using Shape = Traits<Element, kernel_size>;
  Walks const walks = walks_of(params, splits);
  dim3 const grid(static_cast<unsigned>(walks.channel_blocks * splits));
  return launch(filter_gradient_on_cuda_cores<Shape>, grid, Shape::threads, 0, stream, params, walks);
}

}  // namespace

FilterGradientWork filter_gradient_work_on_cuda_cores(DepthwiseConvFilterGradientParams const& params) {
  using Any = Traits<float, 7>;
  Walks const walks = walks_of(params, 1);
  constexpr std::int64_t overhead = 1;  // adding up the warps' sums takes no longer than a walk
  return {ceil_div(walks.count, std::int64_t{Any::warps}), overhead, walks.channel_blocks, Any::blocks};
}

cudaError_t launch_filter_gradient_on_cuda_cores(DepthwiseConvFilterGradientParams const& params, std::int64_t splits,
                                                 cudaStream_t stream) {
  return with_kernel_size(params.kernel_size, [&](auto size) {
    switch (params.type) {
      case ElementType::float16: return launch_with<__half, size()>(params, splits, stream);
      case ElementType::bfloat16: return launch_with<__nv_bfloat16, size()>(params, splits, stream);
      default: return launch_with<float, size()>(params, splits, stream);
    }
  });
}

}  // namespace convnext_kernels
