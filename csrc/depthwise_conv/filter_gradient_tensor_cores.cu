// Per channel and filter row i, sums over images, rows h and segments s of 8 pixels,
//   S_i[a, b] = sum of input[h + i - K / 2, 8 s + a - K / 2] grad_output[h, 8 s + b],   a = 0..15, b = 0..7
//   grad_weight[i, j] = sum over b of S_i[b + j, b]
// are products [16, segments] x [segments, 8]. Row 15 of the input's operand, which no tap needs, holds ones instead:
// there S_(K / 2) sums grad_output, the gradient of the bias.
//
// A block walks down the rows of 16 segments (of one image, or of several where these are narrow), each warp with two
// channels. The operands of the last K rows of grad_output stay in registers, so that every pixel is loaded once. Only
// at its end a block adds up the diagonals.
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
  static constexpr int segment = 8;    // N of the product
  static constexpr int segments = 16;  // K of the product
  static constexpr int ones_row = 15;  // of the M = 16 rows of the product
  static constexpr int warps = 8;
  static constexpr int threads = 32 * warps;
  static constexpr int channels = 2 * warps;  // 32 bytes of each pixel, a whole sector
  static constexpr int words = warps;         // of 32 bits: a warp's two channels
  static constexpr int strip_pixels = segments * segment;
  static constexpr int pixels_per_pass = threads / words;
  static constexpr int grad_passes = strip_pixels / pixels_per_pass;
  static constexpr int input_passes = grad_passes + 1;  // the last for the end of a strip that has a neighbour

  // Shared memory, in bytes. Pixels lie an odd number of words apart, and the segments 4 q of a lane 8 q or 24 q words
  // modulo 32, so that a warp's fragment loads meet every bank once.
  static constexpr int word_bytes = 4;
  static constexpr int pixel_bytes = word_bytes * (words + 1);
  static constexpr int segment_bytes = segment * pixel_bytes + 2 * word_bytes;
  // From strip to strip of input, each with one segment more than of grad_output.
  static constexpr int strip_bytes(int strip_segments) {
    int const unit = 2 * strip_segments * word_bytes, least = (strip_segments + 1) * segment_bytes;
    return ((least + unit - 1) / unit | 1) * unit;
  }
  static constexpr int input_row_bytes = segments * strip_bytes(1);
  static constexpr int stage_bytes = input_row_bytes + segments * segment_bytes;
  static constexpr int stages = 4;
  static constexpr int shared_bytes = stages * stage_bytes;

  static_assert(kernel_size % 2 == 1 && segment + 2 * radius <= ones_row, "a segment's inputs leave a row of ones");
  static_assert(segment_bytes / word_bytes * 4 % 32 == 8, "four segments on, a fragment load meets other banks");
  static_assert(pixels_per_pass == 4 * segment, "a pass is four segments, of one strip, or two or four whole strips");
};

// Where a thread's share of a pass of copies lies, from its share of the first pass.
struct Pass {
  int image, column;
  std::int64_t input, grad;  // in memory, in bytes
  int input_place;           // in shared memory, in bytes
};

// How a launch's blocks share the work. A strip is what a block sees of a row of one image.
template <typename Traits>
struct Tiling {
  int strip_segments;  // 16, 8, 4, 2 or 1
  int strip_bytes;
  int images;  // in a row of a block: 16 / strip_segments
  int strips;  // in a row of an image
  int channel_blocks;
  std::int64_t rows;  // of all strips, those of the images of a block counted once
  std::int64_t splits;

  int input_column;  // the first to copy, counted from the strip's first of grad_output
  Pass passes[Traits::input_passes];
  std::int64_t input_stride, grad_stride;  // from row to row, in bytes
  int segment_places[4];                   // in a row of input: of a lane's segments, from the first
};

// What the copies of a step bring.
namespace step {
constexpr unsigned exists = 1, input = 2, grad = 4;
constexpr int bits = 3;
}  // namespace step

// What one thread copies: one word of some pixels of every row. A step brings row `row` of grad_output and row
// `row - radius` of input, so that with this row of input there are all rows of grad_output that it meets.
template <typename Traits>
struct Copies {
  using Params = DepthwiseConvFilterGradientParams;
  using Shape = Tiling<Traits>;

  char const *input, *grad;  // in the next step's rows
  unsigned inside;           // bit i: pass i over input, bit 8 + i: over grad_output
  int row = 0, end_grad_row = 0, end_row = 0;
  std::int64_t image;  // the strip that comes next
  int x, first_row;
  std::int64_t rows_left;  // of grad_output
  int channel;
  int input_place, grad_place;

  __device__ Copies(Params const& params, Shape const& tiling, std::int64_t split, int first_channel)
      : channel(first_channel + 2 * word()) {
    std::int64_t const first = first_unit(tiling.rows, tiling.splits, split);
    rows_left = first_unit(tiling.rows, tiling.splits, split + 1) - first;
    std::int64_t const strip = first / params.height;
    first_row = static_cast<int>(first - strip * params.height);
    image = strip / tiling.strips * tiling.images;
    x = static_cast<int>(strip % tiling.strips) * Traits::strip_pixels;
    int const column_of_strip = column(tiling) + tiling.input_column + Traits::radius;
    input_place = image_of_row(tiling) * tiling.strip_bytes + place(column_of_strip);
    grad_place = Traits::input_row_bytes + place(pixel());
  }

  __device__ static int word() { return threadIdx.x % Traits::words; }
  __device__ static int pixel() { return threadIdx.x / Traits::words; }
  __device__ static int place(int column) {
    return column / Traits::segment * Traits::segment_bytes + column % Traits::segment * Traits::pixel_bytes +
           word() * Traits::word_bytes;
  }
  __device__ static int image_of_row(Shape const& tiling) {
    return pixel() / Traits::segment / tiling.strip_segments;
  }
  __device__ static int column(Shape const& tiling) {
    return pixel() - image_of_row(tiling) * tiling.strip_segments * Traits::segment;
  }

  // Starts the copies of a step.
  __device__ __forceinline__ unsigned start(Params const& params, Shape const& tiling, SharedPointer<char> stage) {
    if (row == end_row && !next_strip(params, tiling)) {
      return 0;
    }
    unsigned brings = step::exists;
    if (row >= Traits::radius) {
      brings |= step::input;
#pragma unroll
      for (int i = 0; i < Traits::input_passes; ++i) {
        if (i < Traits::grad_passes || (tiling.strips > 1 && pixel() < Traits::segment)) {
          Pass const& pass = tiling.passes[i];
          copy(stage + (input_place + pass.input_place), input + pass.input, 1u << i);
        }
      }
    }
    if (row < end_grad_row) {
      brings |= step::grad;
#pragma unroll
      for (int i = 0; i < Traits::grad_passes; ++i) {
        copy(stage + (grad_place + i * 4 * Traits::segment_bytes), grad + tiling.passes[i].grad, 1u << (8 + i));
      }
    }
    input += tiling.input_stride;
    grad += tiling.grad_stride;
    ++row;
    return brings;
  }

  __device__ __forceinline__ void copy(SharedPointer<char> destination, char const* source, unsigned bit) const {
    cp_async(reinterpret_shared<std::uint32_t>(destination), reinterpret_cast<std::uint32_t const*>(source),
             (inside & bit) != 0);
  }

  // Goes on to the next strip with an image that counts. All but a block's first begin with row 0 and all but its last
  // end with the image, and then the steps without a row of grad_output keep it away from the next strip's input.
  __device__ __forceinline__ bool next_strip(Params const& params, Shape const& tiling) {
    unsigned counting = 0;
    while (!counting && rows_left > 0) {
      counting = counting_images(params, tiling);
      row = first_row;
      end_grad_row = static_cast<int>(min(std::int64_t{params.height}, first_row + rows_left));
      end_row = min(end_grad_row + 2 * Traits::radius, params.height + Traits::radius);
      if (counting) {
        enter_strip(params, tiling, counting);
      }
      rows_left -= end_grad_row - first_row;
      first_row = 0;
      x += Traits::strip_pixels;
      if (x >= params.width) {
        x = 0;
        image += tiling.images;
      }
    }
    return counting;
  }

  // A bit for each image of the strip's that is there and not dropped.
  __device__ __forceinline__ unsigned counting_images(Params const& params, Shape const& tiling) const {
    int const images = static_cast<int>(min(std::int64_t{tiling.images}, params.batch - image));
    int const factors = params.drop_path_factor ? images : 0;
    unsigned counting = (1u << images) - 1;
#pragma unroll 1
    for (int i = 0; i < factors; ++i) {
      counting -= static_cast<unsigned>(params.drop_path_factor[image + i] == 0.0f) << i;
    }
    return counting;
  }

  __device__ __forceinline__ void enter_strip(Params const& params, Shape const& tiling, unsigned counting) {
    int const first_image = image_of_row(tiling), first_column = x + column(tiling);
    inside = 0;
#pragma unroll 1
    for (int i = 0; i < Traits::input_passes; ++i) {
      Pass const& pass = tiling.passes[i];
      int const grad_column = first_column + pass.column, input_column = grad_column + tiling.input_column;
      if (channel < params.channels && counting >> (first_image + pass.image) & 1) {
        inside |= static_cast<unsigned>(grad_column < params.width) << (8 + i);
        inside |= static_cast<unsigned>(input_column >= 0 && input_column < params.width) << i;
      }
    }
    std::int64_t const n = image + first_image;
    input = source(params.input, params.input_strides, n, row - Traits::radius, first_column + tiling.input_column);
    grad = source(params.grad_output, params.grad_output_strides, n, row, first_column);
  }

  __device__ char const* source(void const* tensor, ImageStrides const& strides, std::int64_t n, int row,
                                int column) const {
    std::int64_t const start = n * strides.image + row * strides.row + column * strides.pixel + channel;
    return static_cast<char const*>(tensor) + start * std::int64_t{sizeof(typename Traits::Element)};
  }
};

__device__ __forceinline__ std::uint32_t word_at(SharedPointer<char> address) {
  return *reinterpret_shared<std::uint32_t>(address);
}

// Two pixels to a register, for each of a word's two channels.
__device__ __forceinline__ void pair_pixels(std::uint32_t& first, std::uint32_t& second, std::uint32_t left,
                                            std::uint32_t right) {
  first = __byte_perm(left, right, 0x5410);
  second = __byte_perm(left, right, 0x7632);
}

// Lane 4 g + q takes segments 4 q to 4 q + 3 as its four of the sum: pixel g of each, and of input g + 8 too, which is
// pixel g of the segment after it. `tile` is pixel g of the first and the warp's word.
template <typename Traits>
__device__ __forceinline__ void load_grad(std::uint32_t (&b)[2][2], SharedPointer<char> tile) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    std::uint32_t const left = word_at(tile + 2 * half * Traits::segment_bytes);
    std::uint32_t const right = word_at(tile + (2 * half + 1) * Traits::segment_bytes);
    pair_pixels(b[0][half], b[1][half], left, right);
  }
}

template <typename Traits>
__device__ __forceinline__ void load_input(std::uint32_t (&a)[2][4], SharedPointer<char> tile,
                                           int const (&segment_places)[4], bool ones) {
  constexpr std::uint32_t one = std::is_same_v<typename Traits::Element, __half> ? 0x3c003c00 : 0x3f803f80;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    int const half = i / 2, after = i % 2 * Traits::segment_bytes;
    std::uint32_t const left = word_at(tile + segment_places[2 * half] + after);
    std::uint32_t const right = word_at(tile + segment_places[2 * half + 1] + after);
    pair_pixels(a[0][i], a[1][i], left, right);
    if (i % 2 == 1) {
      a[0][i] = ones ? one : a[0][i];
      a[1][i] = ones ? one : a[1][i];
    }
  }
}

template <typename Traits>
using Sums = float[Traits::kernel_size][2][4];  // S_i: filter row, channel, fragment

// Adds up all rows of the block's part.
template <typename Traits>
__device__ __forceinline__ void accumulate(Sums<Traits>& sums, DepthwiseConvFilterGradientParams const& params,
                                           Tiling<Traits> const& tiling, Copies<Traits>& copies,
                                           SharedPointer<char> ring, int warp, int lane) {
  constexpr int size = Traits::kernel_size, last = (Traits::stages - 1) * Traits::stage_bytes;
  unsigned coming = 0;  // what the next steps bring
#pragma unroll 1
  for (int i = 0; i < Traits::stages - 1; ++i) {
    coming |= copies.start(params, tiling, ring + i * Traits::stage_bytes) << i * step::bits;
    cp_async_commit();
  }
  int const g = lane / 4, segment = lane % 4 * 4;
  int const strip = segment / tiling.strip_segments, segment_of_strip = segment % tiling.strip_segments;
  int const pixel = g * Traits::pixel_bytes + warp * Traits::word_bytes;
  int const input_tile = strip * tiling.strip_bytes + segment_of_strip * Traits::segment_bytes + pixel;
  int const grad_tile = Traits::input_row_bytes + segment * Traits::segment_bytes + pixel;

  std::uint32_t grads[size][2][2] = {};  // operands of the last rows of grad_output: row, channel, fragment
  int stage = 0, stage_before = last;
  while (coming) {
#pragma unroll
    for (int newest = 0; newest < size; ++newest) {
      // Behind this barrier the step's rows are in shared memory, and nobody reads those of the step before any more.
      cp_async_wait<Traits::stages - 2>();
      __syncthreads();
      unsigned const brings = coming;
      coming = brings >> step::bits |
               copies.start(params, tiling, ring + stage_before) << (Traits::stages - 2) * step::bits;
      cp_async_commit();
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        grads[newest][i / 2][i % 2] = 0;
      }
      if (brings & step::grad) {
        load_grad<Traits>(grads[newest], ring + (stage + grad_tile));
      }
      if (brings & step::input) {
        std::uint32_t a[2][4];
        load_input<Traits>(a, ring + (stage + input_tile), tiling.segment_places, g + 8 == Traits::ones_row);
#pragma unroll
        for (int i = 0; i < size; ++i) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            mma_m16n8k16<typename Traits::Element>(sums[i][c], a[c], grads[(newest - i + size) % size][c]);
          }
        }
      }
      stage_before = stage;
      stage = stage == last ? 0 : stage + Traits::stage_bytes;
    }
  }
}

// Adds up the diagonals of a warp's S_i, and of S_radius the row of ones, through [2, 16, 8] of shared memory.
template <typename Traits>
__device__ __forceinline__ void write_partial(DepthwiseConvFilterGradientParams const& params,
                                              Sums<Traits> const& sums, std::int64_t split, int channel, int lane,
                                              SharedPointer<float> matrices) {
  constexpr int size = Traits::kernel_size, row = Traits::segment + 1, matrix = 16 * row;
  int const j = lane % 16;
  channel += lane / 16;
  bool const is_tap = j < size && channel < params.channels;
  bool const is_bias = j == Traits::ones_row && channel < params.channels;
  int const first = lane / 16 * matrix + j * row, next = is_tap ? row + 1 : 1;
#pragma unroll
  for (int i = 0; i < size; ++i) {
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      int const a = lane / 4 + e % 4 / 2 * 8, b = lane % 4 * 2 + e % 2;
      matrices[e / 4 * matrix + a * row + b] = sums[i][e / 4][e % 4];
    }
    __syncwarp();
    if (is_tap || (i == Traits::radius && is_bias)) {
      float sum = 0.0f;
      for (int b = 0; b < Traits::segment; ++b) {
        float const element = matrices[first + b * next];
        sum += element;
      }
      *(is_tap ? weight_partial<size>(params, split, channel) + i * size + j
               : bias_partial<size>(params, split, channel)) = sum;
    }
    __syncwarp();
  }
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::threads, 2)
    filter_gradient_on_tensor_cores(DepthwiseConvFilterGradientParams const params, Tiling<Traits> const tiling) {
  int const warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int const channel = blockIdx.x % tiling.channel_blocks * Traits::channels;
  std::int64_t const split = blockIdx.x / tiling.channel_blocks;
  SharedPointer<char> const ring = dynamic_shared<char>();
  // What lies beside a strip that is a whole row of an image is never copied.
  for (int i = threadIdx.x * Traits::word_bytes; i < Traits::shared_bytes; i += Traits::threads * Traits::word_bytes) {
    *reinterpret_shared<std::uint32_t>(ring + i) = 0;
  }
  __syncthreads();
  Copies<Traits> copies(params, tiling, split, channel);
  Sums<Traits> sums = {};
  accumulate<Traits>(sums, params, tiling, copies, ring, warp, lane);
  __syncthreads();
  write_partial<Traits>(params, sums, split, channel + 2 * warp, lane,
                        reinterpret_shared<float>(ring + warp * (Traits::stage_bytes / 2)));
}

template <typename Traits>
Tiling<Traits> tiling_of(DepthwiseConvFilterGradientParams const& params, std::int64_t splits) {
  constexpr std::int64_t element_bytes = sizeof(typename Traits::Element);
  Tiling<Traits> tiling;
  int const segments = ceil_div(params.width, Traits::segment);
  tiling.strip_segments = Traits::segments;
  while (tiling.strip_segments / 2 >= segments) {
    tiling.strip_segments /= 2;
  }
  tiling.strip_bytes = Traits::strip_bytes(tiling.strip_segments);
  tiling.images = Traits::segments / tiling.strip_segments;
  tiling.strips = ceil_div(segments, tiling.strip_segments);
  tiling.channel_blocks = ceil_div(params.channels, Traits::channels);
  tiling.rows = ceil_div(params.batch, std::int64_t{tiling.images}) * tiling.strips * params.height;
  tiling.splits = splits;
  tiling.input_column = tiling.strips > 1 ? -Traits::radius : 0;
  for (int i = 0; i < Traits::input_passes; ++i) {
    int const segment = i * Traits::pixels_per_pass / Traits::segment;
    int const image = tiling.strips > 1 ? 0 : segment / tiling.strip_segments;
    int const first_segment = segment - image * tiling.strip_segments, column = first_segment * Traits::segment;
    auto const offset = [=](ImageStrides const& strides) {
      return (image * strides.image + column * strides.pixel) * element_bytes;
    };
    tiling.passes[i] = {image, column, offset(params.input_strides), offset(params.grad_output_strides),
                        image * tiling.strip_bytes + first_segment * Traits::segment_bytes};
  }
  tiling.input_stride = params.input_strides.row * element_bytes;
  tiling.grad_stride = params.grad_output_strides.row * element_bytes;
  for (int i = 0; i < 4; ++i) {
    tiling.segment_places[i] =
        i / tiling.strip_segments * tiling.strip_bytes + i % tiling.strip_segments * Traits::segment_bytes;
  }
  return tiling;
}

template <typename Element, int kernel_size>
cudaError_t launch_with(DepthwiseConvFilterGradientParams const& params, std::int64_t splits, cudaStream_t stream) {
  using Shape = Traits<Element, kernel_size>;
  Tiling<Shape> const tiling = tiling_of<Shape>(params, splits);
  dim3 const grid(static_cast<unsigned>(tiling.channel_blocks * splits));
  return launch(filter_gradient_on_tensor_cores<Shape>, grid, Shape::threads, Shape::shared_bytes, stream, params,
                tiling);
}

}  // namespace

FilterGradientWork filter_gradient_work_on_tensor_cores(DepthwiseConvFilterGradientParams const& params) {
  using Shape = Traits<__half, 7>;
  Tiling<Shape> const tiling = tiling_of<Shape>(params, 1);
  // Filling the ring and adding up the diagonals take about as long as ten rows.
  std::int64_t const overhead = 10 + 2 * Shape::radius;
  return {tiling.rows, overhead, tiling.channel_blocks, 2};
}

cudaError_t launch_filter_gradient_on_tensor_cores(DepthwiseConvFilterGradientParams const& params, std::int64_t splits,
                                               cudaStream_t stream) {
  return with_kernel_size(params.kernel_size, [&](auto size) {
    return params.type == ElementType::float16 ? launch_with<__half, size()>(params, splits, stream)
                                               : launch_with<__nv_bfloat16, size()>(params, splits, stream);
  });
}

}  // namespace convnext_kernels
