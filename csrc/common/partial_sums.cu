// A block owns 16 elements, 64 bytes of each row, and gives every 32nd row to the same threads: enough rows at once to
// be fast where there are few elements. A warp then adds up an element's 32 sums.
#include "common/partial_sums.h"

#include "common/integers.h"
#include "common/launch.cuh"
#include "common/shared.cuh"

namespace convnext_kernels {
namespace {

struct Traits {
  static constexpr int elements = 16;  // of a block, and its warps
  static constexpr int rows = 32;      // at once
  static constexpr int threads = elements * rows;
  static constexpr int loads = 8;              // of a thread under way at once
  static constexpr int stride = elements + 1;  // odd: a warp reads a column from 32 banks
  static_assert(threads == 32 * elements && rows == 32, "a warp adds up one element, a lane for each row");
};

__global__ void __launch_bounds__(Traits::threads)
    partial_sums(float const* partials, std::int64_t count, std::int64_t elements, float* sums) {
  int const column = threadIdx.x % Traits::elements, row = threadIdx.x / Traits::elements;
  std::int64_t const first = std::int64_t{blockIdx.x} * Traits::elements;
  float sum = 0.0f;
  if (first + column < elements) {
    std::int64_t const step = Traits::rows * elements;
    float const* source = partials + row * elements + first + column;
    for (std::int64_t i = row; i < count; i += Traits::rows * Traits::loads) {
      float values[Traits::loads];
#pragma unroll
      for (int load = 0; load < Traits::loads; ++load) {
        values[load] = i + load * Traits::rows < count ? *source : 0.0f;
        source += step;
      }
#pragma unroll
      for (float const value : values) {
        sum += value;
      }
    }
  }
  __shared__ SharedArray<float, Traits::rows * Traits::stride> columns;
  columns[row * Traits::stride + column] = sum;
  __syncthreads();
  int const warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  sum = columns[lane * Traits::stride + warp];
#pragma unroll
  for (int bits = 1; bits < 32; bits *= 2) {
    sum += __shfl_xor_sync(0xffffffff, sum, bits);
  }
  if (lane == 0 && first + warp < elements) {
    sums[first + warp] = sum;
  }
}

}  // namespace

cudaError_t launch_partial_sums(float const* partials, std::int64_t count, std::int64_t elements, float* sums,
                                cudaStream_t stream) {
  constexpr std::int64_t most_blocks = 0x7fffffff;
  std::int64_t const blocks = ceil_div(elements, std::int64_t{Traits::elements});
  if (count < 0 || elements < 0) {
    return cudaErrorInvalidValue;
  }
  if (blocks > most_blocks) {
    return cudaErrorInvalidConfiguration;
  }
  if (blocks == 0) {
    return cudaSuccess;
  }
  return launch(partial_sums, dim3(static_cast<unsigned>(blocks)), Traits::threads, 0, stream, partials, count,
                elements, sums);
}

}  // namespace convnext_kernels
