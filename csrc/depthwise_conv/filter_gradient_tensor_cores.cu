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
  static constexpr int segments = 16;  // K of the product, four consecutive ones of them in a lane: its quad
  static constexpr int quad = 4;
  static constexpr int ones_row = 15;  // of the M = 16 rows of the product
  static constexpr int warps = 8;
  static constexpr int threads = 32 * warps;
  static constexpr int channels = 2 * warps;  // 32 bytes of each pixel, a whole sector
  static constexpr int words = warps;         // of 32 bits: a warp's two channels
  static constexpr int strip_pixels = segments * segment;
  static constexpr int grad_passes = quad;
  static constexpr int input_passes = quad + 1;  // the last for the end of a strip that has a neighbour

  // Shared memory, in bytes. Pixels lie an odd number of words apart, and the quads 0, 8, 16 and 24 words modulo 32 in
  // some order. So a warp meets every bank once, whether it loads a word of 8 pixels of each quad or copies 8 words of
  // one pixel of each.
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
  static constexpr int ring_bytes = stages * stage_bytes;

  static_assert(kernel_size % 2 == 1 && segment + 2 * radius <= ones_row, "a segment's inputs leave a row of ones");
  static_assert(segment_bytes / word_bytes * quad % 32 == 8, "a quad begins 8 banks behind the one before");
  static_assert(warps == segment && words * segments / quad == 32, "a pass of copies is a segment of each quad");
};

// A segment of a quad, from the quad's first: of a lane's fragments, and of a pass of a thread's copies.
struct Segment {
  int image, column;
  std::int64_t input, grad;  // in memory, in bytes
  int place;                 // in a row of input in shared memory, in bytes
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
  Segment segments[Traits::input_passes];
  std::int64_t input_stride, grad_stride;  // from row to row, in bytes

  // Of a quad's first segment.
  __device__ int image_of(int quad) const { return quad * Traits::quad / strip_segments; }
  __device__ int segment_of_strip(int quad) const { return quad * Traits::quad % strip_segments; }
  __device__ int place_of(int quad) const {
    return image_of(quad) * strip_bytes + segment_of_strip(quad) * Traits::segment_bytes;
  }
};

// What a step brings: nothing but itself between one strip and the next.
namespace step {
constexpr unsigned exists = 1, input = 2;
constexpr int bits = 2;
}  // namespace step

// What a thread copies: a word of one pixel of every segment of a quad.
struct CopyShare {
  int word = threadIdx.x % 8;
  int quad = threadIdx.x / 8 % 4;
  int pixel = threadIdx.x / 32;
};

// Rows of a strip, as a thread copies them.
struct alignas(32) Strip {
  char const *input, *grad;  // in the rows of the first step
  unsigned inside;           // bit i: pass i over input, bit 8 + i: over grad_output
  int row, end_grad, end;    // a step brings row `row` of grad_output and `row - radius` of input
};

// The strips of a block's part, one after the other. All but the first begin with row 0 and all but the last end with
// the image.
template <typename Traits>
struct alignas(32) Strips {
  using Params = DepthwiseConvFilterGradientParams;
  using Shape = Tiling<Traits>;

  std::int64_t image;  // the strip that comes next
  std::int64_t rows_left;  // of grad_output
  int x, row;
  int channel;  // that the thread copies

  __device__ static Strips of(Params const& params, Shape const& tiling, std::int64_t split, int channel) {
    std::int64_t const first = first_unit(tiling.rows, tiling.splits, split), strip = first / params.height;
    std::int64_t const rows = first_unit(tiling.rows, tiling.splits, split + 1) - first;
    return {strip / tiling.strips * tiling.images, rows,
            static_cast<int>(strip % tiling.strips) * Traits::strip_pixels,
            static_cast<int>(first - strip * params.height), channel};
  }

  // Finds the next strip with an image that counts.
  __device__ __forceinline__ bool next(Params const& params, Shape const& tiling, SharedPointer<Strip> found) {
    unsigned counting = 0;
    while (!counting && rows_left > 0) {
      int const rows = static_cast<int>(min(rows_left, std::int64_t{params.height - row}));
      counting = counting_images(params, tiling);
      if (counting) {
        *found = strip(params, tiling, row + rows, counting);
      }
      rows_left -= rows;
      row = 0;
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
    for (int i = 0; i < factors; ++i) {
      counting -= static_cast<unsigned>(params.drop_path_factor[image + i] == 0.0f) << i;
    }
    return counting;
  }

  __device__ __forceinline__ Strip strip(Params const& params, Shape const& tiling, int end_row,
                                         unsigned counting) const {
    CopyShare const share;
    int const first_image = tiling.image_of(share.quad);
    int const column = x + tiling.segment_of_strip(share.quad) * Traits::segment + share.pixel;
    unsigned inside = 0;
#pragma unroll 1
    for (int i = 0; i < Traits::input_passes; ++i) {
      Segment const& segment = tiling.segments[i];
      int const grad_column = column + segment.column, input_column = grad_column + tiling.input_column;
      // Behind the strip only the first quad's last pass is still of use.
      bool const in_strip = i < Traits::grad_passes || share.quad == 0;
      if (in_strip && channel < params.channels && counting >> (first_image + segment.image) & 1) {
        inside |= static_cast<unsigned>(grad_column < params.width) << (8 + i);
        inside |= static_cast<unsigned>(input_column >= 0 && input_column < params.width) << i;
      }
    }
    auto const source = [&](void const* tensor, ImageStrides const& strides, int y, int first_column) {
      std::int64_t const offset =
          (image + first_image) * strides.image + y * strides.row + first_column * strides.pixel + channel;
      return static_cast<char const*>(tensor) + offset * std::int64_t{sizeof(typename Traits::Element)};
    };
    char const* const input =
        source(params.input, params.input_strides, row - Traits::radius, column + tiling.input_column);
    // After these steps nothing is left that meets the last row of grad_output, nor the next strip.
    int const end = min(end_row + 2 * Traits::radius, params.height + Traits::radius);
    return {input, source(params.grad_output, params.grad_output_strides, row, column), inside, row, end_row, end};
  }
};

// What one thread copies, step by step. The strip after the current one waits in shared memory, as finding it takes
// hundreds of instructions, and registers.
template <typename Traits>
struct Copies {
  using Params = DepthwiseConvFilterGradientParams;
  using Shape = Tiling<Traits>;

  static constexpr int shared_bytes = Traits::threads * (sizeof(Strip) + sizeof(Strips<Traits>));

  Strip current = {};
  SharedPointer<Strip> next;
  bool has_next = false, has_more = true;  // behind the current strip, behind the next
  int input_place, grad_place;

  __device__ Copies(Params const& params, Shape const& tiling, SharedPointer<char> shared, std::int64_t split,
                    int first_channel)
      : next(reinterpret_shared<Strip>(shared) + threadIdx.x) {
    CopyShare const share;
    *after() = Strips<Traits>::of(params, tiling, split, first_channel + 2 * share.word);
    int const word = share.word * Traits::word_bytes;
    int const input_pixel = share.pixel + tiling.input_column + Traits::radius;  // may be of the next segment
    input_place = tiling.place_of(share.quad) + input_pixel / Traits::segment * Traits::segment_bytes +
                  input_pixel % Traits::segment * Traits::pixel_bytes + word;
    grad_place = Traits::input_row_bytes + share.quad * (Traits::quad * Traits::segment_bytes) +
                 share.pixel * Traits::pixel_bytes + word;
  }

  // The strips that follow the next one.
  __device__ __forceinline__ SharedPointer<Strips<Traits>> after() const {
    return reinterpret_shared<Strips<Traits>>(next + Traits::threads);
  }

  __device__ __forceinline__ void find_next(Params const& params, Shape const& tiling) {
    if (!has_next && has_more) {
      Strips<Traits> strips = *after();
      has_next = strips.next(params, tiling, next);
      has_more = strips.rows_left > 0;
      *after() = strips;
    }
  }

  // Starts the copies of a step; one between strips brings zeros for grad_output. 0 behind the last.
  __device__ __forceinline__ unsigned start(Shape const& tiling, SharedPointer<char> stage) {
    if (current.row == current.end && has_next) {
      current = *next;
      has_next = false;
    }
    bool const in_strip = current.row < current.end;
    unsigned const grads = current.row < current.end_grad ? current.inside : 0;
    copy_grad(tiling, stage + grad_place, grads);
    unsigned brings = in_strip || has_more ? step::exists : 0;
    if (in_strip) {
      if (current.row >= Traits::radius) {
        copy_input(tiling, stage + input_place);
        brings |= step::input;
      }
      current.input += tiling.input_stride;
      current.grad += tiling.grad_stride;
      ++current.row;
    }
    return brings;
  }

  __device__ __forceinline__ void copy_grad(Shape const& tiling, SharedPointer<char> place, unsigned inside) const {
#pragma unroll
    for (int i = 0; i < Traits::grad_passes; ++i) {
      copy(place + i * Traits::segment_bytes, current.grad + tiling.segments[i].grad, inside & 1u << (8 + i));
    }
  }

  __device__ __forceinline__ void copy_input(Shape const& tiling, SharedPointer<char> place) const {
#pragma unroll
    for (int i = 0; i < Traits::input_passes; ++i) {
      Segment const& segment = tiling.segments[i];
      if (i < Traits::grad_passes || tiling.strips > 1) {
        copy(place + segment.place, current.input + segment.input, current.inside & 1u << i);
      }
    }
  }

  __device__ __forceinline__ static void copy(SharedPointer<char> destination, char const* source, unsigned valid) {
    cp_async(reinterpret_shared<std::uint32_t>(destination), reinterpret_cast<std::uint32_t const*>(source), valid);
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

// Lane 4 g + q takes the segments of quad q as its four of the sum: pixel g of each, and of input pixel g + 8, which is
// pixel g of the segment after it, too. `tile` is pixel g of the first and the warp's word.
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
                                           Tiling<Traits> const& tiling, bool ones) {
  constexpr std::uint32_t one = std::is_same_v<typename Traits::Element, __half> ? 0x3c003c00 : 0x3f803f80;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    int const half = i / 2, after = i % 2 * Traits::segment_bytes;
    std::uint32_t const left = word_at(tile + (tiling.segments[2 * half].place + after));
    std::uint32_t const right = word_at(tile + (tiling.segments[2 * half + 1].place + after));
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
  int const g = lane / 4, q = lane % 4;
  int const pixel = g * Traits::pixel_bytes + warp * Traits::word_bytes;
  int const input_tile = tiling.place_of(q) + pixel;
  int const grad_tile = Traits::input_row_bytes + q * (Traits::quad * Traits::segment_bytes) + pixel;

  unsigned coming = 0;  // what the next steps bring: the first ones nothing
#pragma unroll
  for (int i = 0; i < Traits::stages - 1; ++i) {
    coming = coming << step::bits | step::exists;
  }
  std::uint32_t grads[size][2][2] = {};  // operands of the last rows of grad_output: row, channel, fragment
  int stage = 0, stage_before = last;
  while (coming) {
    copies.find_next(params, tiling);
#pragma unroll
    for (int newest = 0; newest < size; ++newest) {
      // Behind this barrier the step's rows are in shared memory, and nobody reads those of the step before any more.
      cp_async_wait<Traits::stages - 2>();
      __syncthreads();
      bool const brings_input = coming & step::input;
      coming = coming >> step::bits | copies.start(tiling, ring + stage_before) << (Traits::stages - 2) * step::bits;
      cp_async_commit();
      load_grad<Traits>(grads[newest], ring + (stage + grad_tile));
      if (brings_input) {
        std::uint32_t a[2][4];
        load_input<Traits>(a, ring + (stage + input_tile), tiling, g + 8 == Traits::ones_row);
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
  cp_async_wait<0>();
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
  // What lies beside a strip that is a whole row of an image is never copied, nor are the first steps.
  for (int i = threadIdx.x * Traits::word_bytes; i < Traits::ring_bytes; i += Traits::threads * Traits::word_bytes) {
    *reinterpret_shared<std::uint32_t>(ring + i) = 0;
  }
  __syncthreads();
  Copies<Traits> copies(params, tiling, ring + Traits::ring_bytes, split, channel);
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
  int const segments_of_row = ceil_div(params.width, Traits::segment);
  tiling.strip_segments = Traits::segments;
  while (tiling.strip_segments / 2 >= segments_of_row) {
    tiling.strip_segments /= 2;
  }
  tiling.strip_bytes = Traits::strip_bytes(tiling.strip_segments);
  tiling.images = Traits::segments / tiling.strip_segments;
  tiling.strips = ceil_div(segments_of_row, tiling.strip_segments);
  tiling.channel_blocks = ceil_div(params.channels, Traits::channels);
  tiling.rows = ceil_div(params.batch, std::int64_t{tiling.images}) * tiling.strips * params.height;
  tiling.splits = splits;
  tiling.input_column = tiling.strips > 1 ? -Traits::radius : 0;
  for (int i = 0; i < Traits::input_passes; ++i) {
    // The last is the segment behind a strip of several quads.
    int const segment = i < Traits::quad ? i : Traits::segments;
    int const image = i < Traits::quad ? segment / tiling.strip_segments : 0;
    int const segment_of_strip = segment - image * tiling.strip_segments, column = segment_of_strip * Traits::segment;
    auto const offset = [=](ImageStrides const& strides) {
      return (image * strides.image + column * strides.pixel) * element_bytes;
    };
    tiling.segments[i] = {image, column, offset(params.input_strides), offset(params.grad_output_strides),
                          image * tiling.strip_bytes + segment_of_strip * Traits::segment_bytes};
  }
  tiling.input_stride = params.input_strides.row * element_bytes;
  tiling.grad_stride = params.grad_output_strides.row * element_bytes;
  return tiling;
}

template <typename Element, int kernel_size>
cudaError_t launch_with(DepthwiseConvFilterGradientParams const& params, std::int64_t splits, cudaStream_t stream) {
  using Shape = Traits<Element, kernel_size>;
  Tiling<Shape> const tiling = tiling_of<Shape>(params, splits);
  dim3 const grid(static_cast<unsigned>(tiling.channel_blocks * splits));
  constexpr std::size_t shared_bytes = Shape::ring_bytes + Copies<Shape>::shared_bytes;
  return launch(filter_gradient_on_tensor_cores<Shape>, grid, Shape::threads, shared_bytes, stream, params, tiling);
}

}  // namespace

FilterGradientWork filter_gradient_work_on_tensor_cores(DepthwiseConvFilterGradientParams const& params) {
  using Shape = Traits<__half, 7>;
  Tiling<Shape> const tiling = tiling_of<Shape>(params, 1);
  // By its instructions, what comes before the first row and after the last takes about as long as ten rows.
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
