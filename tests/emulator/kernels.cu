// Kernels that test the emulator. Each is right, unless `planted`, when it has the fault that its comment names.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "common/launch.cuh"
#include "common/ptx.cuh"
#include "common/shared.cuh"

namespace ck = convnext_kernels;

namespace {

constexpr int threads = 64;

using Tile = ck::SharedArray<float, threads>;

// Where a race is planted, so that what is read too early is not uninitialised.
__device__ void clear(Tile& tile) {
  tile[threadIdx.x] = 0;
  __syncthreads();
}

// output[t] = input[threads - 1 - t]. Planted: no barrier between writing and reading.
__global__ void reverse(bool planted, float const* input, float* output) {
  __shared__ Tile tile;
  int const t = threadIdx.x;
  clear(tile);
  tile[t] = input[t];
  if (!planted) {
    __syncthreads();
  }
  output[t] = tile[threads - 1 - t];
}

// output[t] = 2 input[t + 1], round the block. Planted: no barrier between reading and writing again.
__global__ void rotate(bool planted, float const* input, float* output) {
  __shared__ Tile tile;
  int const t = threadIdx.x;
  tile[t] = input[t];
  __syncthreads();
  float const neighbour = tile[(t + 1) % threads];
  if (!planted) {
    __syncthreads();
  }
  tile[t] = 2 * neighbour;
  output[t] = tile[t];
}

// output = input. Planted: two threads write the same element.
__global__ void scatter(bool planted, float const* input, float* output) {
  __shared__ Tile tile;
  int const t = threadIdx.x;
  tile[planted && t == 40 ? 3 : t] = input[t];
  __syncthreads();
  output[t] = tile[t];
}

// output[t] = input[t ^ 1] within warps. Planted: no barrier of the warp between writing and reading.
__global__ void swap_in_warp(bool planted, float const* input, float* output) {
  __shared__ Tile tile;
  int const t = threadIdx.x;
  clear(tile);
  tile[t] = input[t];
  if (!planted) {
    __syncwarp();
  }
  output[t] = tile[t ^ 1];
}

// As reverse. Planted: a barrier of the warp where one of the block is needed.
__global__ void reverse_warps(bool planted, float const* input, float* output) {
  __shared__ Tile tile;
  int const t = threadIdx.x;
  clear(tile);
  tile[t] = input[t];
  if (planted) {
    __syncwarp();
  } else {
    __syncthreads();
  }
  output[t] = tile[threads - 1 - t];
}

// output = input. Planted: the last thread writes behind the end of static shared memory.
__global__ void past_static(bool planted, float const* input, float* output) {
  __shared__ Tile tile;
  int const t = threadIdx.x;
  tile[t + planted] = input[t];
  output[t] = tile[t + planted];
}

// output = input. Planted: the first thread reads before the start of dynamic shared memory.
__global__ void before_dynamic(bool planted, float const* input, float* output) {
  ck::SharedPointer<float> const tile = ck::dynamic_shared<float>();
  int const t = threadIdx.x;
  tile[t] = input[t];
  output[t] = *(tile + t - planted);
}

// output = input. Planted: eight bytes at a multiple of four.
__global__ void misaligned(bool planted, float const* input, float* output) {
  ck::SharedPointer<float> const tile = ck::dynamic_shared<float>();
  int const t = threadIdx.x;
  tile[t] = input[t];
  __syncthreads();
  uint2 const pair = *ck::reinterpret_shared<uint2>(tile + t / 2 * 2 + (planted && t == 4));
  unsigned const bits = t % 2 ? pair.y : pair.x;
  memcpy(output + t, &bits, sizeof bits);
}

// output = input. Planted: the last thread reads behind the end of global memory.
__global__ void past_global(bool planted, float const* input, float* output) {
  int const t = threadIdx.x;
  output[t] = input[t + planted];
}

// output = input. Planted: an asynchronous copy reads behind the end of global memory.
__global__ void copy_past_global(bool planted, float const* input, float* output) {
  __shared__ Tile tile;
  int const t = threadIdx.x;
  ck::cp_async<float>(tile + t, input + t + planted, true);
  ck::cp_async_commit();
  ck::cp_async_wait<0>();
  output[t] = tile[t];
}

// output = input, zero where odd. Planted: no wait for the copy.
__global__ void copy(bool planted, float const* input, float* output) {
  __shared__ Tile tile;
  int const t = threadIdx.x;
  ck::cp_async<float>(tile + t, input + t, t % 2 == 0);
  ck::cp_async_commit();
  if (!planted) {
    ck::cp_async_wait<0>();
  }
  output[t] = tile[t];
}

// output = input. Planted: ends without a wait for a copy that nobody reads.
__global__ void copy_at_the_end(bool planted, float const* input, float* output) {
  __shared__ Tile tile;
  int const t = threadIdx.x;
  ck::cp_async<float>(tile + t, input + t, true);
  ck::cp_async_commit();
  if (!planted) {
    ck::cp_async_wait<0>();
  }
  output[t] = input[t];
}

// output = input, in two groups. Planted: waits for the first of them only.
__global__ void copy_groups(bool planted, float const* input, float* output) {
  __shared__ Tile tile;
  int const t = threadIdx.x;
  for (int half = 0; half < 2; ++half) {
    if (t < threads / 2) {
      ck::cp_async<float>(tile + t + half * threads / 2, input + t + half * threads / 2, true);
    }
    ck::cp_async_commit();
  }
  if (planted) {
    ck::cp_async_wait<1>();
  } else {
    ck::cp_async_wait<0>();
  }
  __syncthreads();
  output[t] = tile[t];
}

// output[t] = input[t ^ 1]. Planted: a wait, which is for the thread's own copies, without a barrier.
__global__ void copy_for_others(bool planted, float const* input, float* output) {
  __shared__ Tile tile;
  int const t = threadIdx.x;
  clear(tile);
  ck::cp_async<float>(tile + t, input + t, true);
  ck::cp_async_commit();
  ck::cp_async_wait<0>();
  if (!planted) {
    __syncthreads();
  }
  output[t] = tile[t ^ 1];
}

// output = input. Planted: half of the threads do not come to the barrier.
__global__ void early_exit(bool planted, float const* input, float* output) {
  output[threadIdx.x] = input[threadIdx.x];
  if (planted && threadIdx.x >= threads / 2) {
    return;
  }
  __syncthreads();
}

// output = input. Planted: the threads come to different barriers.
__global__ void two_barriers(bool planted, float const* input, float* output) {
  output[threadIdx.x] = input[threadIdx.x];
  if (planted && threadIdx.x == 5) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

// output = the sum of the warp's inputs. Planted: half of the warp does not come.
__global__ void warp_sum(bool planted, float const* input, float* output) {
  float sum = input[threadIdx.x];
  if (planted && threadIdx.x % 32 >= 16) {
    return;
  }
  for (int bits = 16; bits; bits /= 2) {
    sum += __shfl_xor_sync(0xffffffff, sum, bits);
  }
  output[threadIdx.x] = sum;
}

// Every block's output = its input. Planted: the second block reads what the first left in shared memory.
__global__ void left_behind(bool planted, float const* input, float* output) {
  __shared__ Tile tile;
  int const t = threadIdx.x, i = blockIdx.x * threads + t;
  if (!planted || blockIdx.x == 0) {
    tile[t] = input[i];
  }
  output[i] = tile[t];
}

// a [16, 16], b [16, 8] -> c + a b, c and the product [16, 8] of float; a and b of T, c = 1.
template <typename T>
__global__ void product(bool, std::uint16_t const* input, float* output) {
  std::uint16_t const *const a = input, *const b = input + 256;
  int const g = threadIdx.x / 4, q = threadIdx.x % 4;
  std::uint32_t fragment_a[4], fragment_b[2];
  for (int i = 0; i < 4; ++i) {
    std::uint16_t const* const pair = a + 16 * (g + i % 2 * 8) + 2 * q + i / 2 * 8;
    fragment_a[i] = pair[0] | static_cast<std::uint32_t>(pair[1]) << 16;
  }
  for (int i = 0; i < 2; ++i) {
    int const row = 2 * q + 8 * i;
    fragment_b[i] = b[8 * row + g] | static_cast<std::uint32_t>(b[8 * (row + 1) + g]) << 16;
  }
  float d[4] = {1, 1, 1, 1};
  ck::mma_m16n8k16<T>(d, fragment_a, fragment_b);
  for (int i = 0; i < 4; ++i) {
    output[8 * (g + i / 2 * 8) + 2 * q + i % 2] = d[i];
  }
}

// Two floats rounded to T and packed.
template <typename T>
__global__ void round_pairs(bool, float const* input, std::uint32_t* output) {
  output[threadIdx.x] = ck::pack<T>(input[2 * threadIdx.x], input[2 * threadIdx.x + 1]);
}

// T to float.
__global__ void widen_half(bool, __half const* input, float* output) {
  output[threadIdx.x] = __half2float(input[threadIdx.x]);
}

__global__ void widen_bfloat16(bool, __nv_bfloat16 const* input, float* output) {
  output[threadIdx.x] = __bfloat162float(input[threadIdx.x]);
}

template <typename In, typename Out>
int run(void (*kernel)(bool, In const*, Out*), bool planted, int blocks, int block_threads, std::size_t in_count,
        std::size_t out_count) {
  auto const input = std::make_unique<In[]>(in_count);
  auto const output = std::make_unique<Out[]>(out_count);
  memset(output.get(), 0xff, out_count * sizeof(Out));
  if (fread(input.get(), sizeof(In), in_count, stdin) != in_count) {
    return 2;
  }
  std::size_t const shared_bytes = threads * sizeof(float);
  if (ck::launch(kernel, blocks, block_threads, shared_bytes, nullptr, planted, input.get(), output.get())) {
    return 3;
  }
  return fwrite(output.get(), sizeof(Out), out_count, stdout) == out_count ? 0 : 4;
}

}  // namespace

int main(int, char** arguments) {
  char const* const name = arguments[1];
  bool const planted = atoi(arguments[2]);
  struct {
    char const* name;
    void (*kernel)(bool, float const*, float*);
    int blocks;
  } const faults[] = {
      {"reverse", reverse, 1},
      {"rotate", rotate, 1},
      {"scatter", scatter, 1},
      {"swap_in_warp", swap_in_warp, 1},
      {"reverse_warps", reverse_warps, 1},
      {"past_static", past_static, 1},
      {"before_dynamic", before_dynamic, 1},
      {"misaligned", misaligned, 1},
      {"past_global", past_global, 1},
      {"copy_past_global", copy_past_global, 1},
      {"copy", copy, 1},
      {"copy_at_the_end", copy_at_the_end, 1},
      {"copy_groups", copy_groups, 1},
      {"copy_for_others", copy_for_others, 1},
      {"early_exit", early_exit, 1},
      {"two_barriers", two_barriers, 1},
      {"warp_sum", warp_sum, 1},
      {"left_behind", left_behind, 2},
  };
  for (auto const& fault : faults) {
    if (strcmp(name, fault.name) == 0) {
      std::size_t const count = fault.blocks * threads;
      return run(fault.kernel, planted, fault.blocks, threads, count, count);
    }
  }
  if (strcmp(name, "product float16") == 0) return run(product<__half>, false, 1, 32, 384, 128);
  if (strcmp(name, "product bfloat16") == 0) return run(product<__nv_bfloat16>, false, 1, 32, 384, 128);
  if (strcmp(name, "round float16") == 0) return run(round_pairs<__half>, false, 1, 512, 1024, 512);
  if (strcmp(name, "round bfloat16") == 0) return run(round_pairs<__nv_bfloat16>, false, 1, 512, 1024, 512);
  if (strcmp(name, "widen float16") == 0) return run(widen_half, false, 1, 1024, 1024, 1024);
  if (strcmp(name, "widen bfloat16") == 0) return run(widen_bfloat16, false, 1, 1024, 1024, 1024);
  return 5;
}
