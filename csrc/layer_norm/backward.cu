// A thread keeps the sums of grad_weight and grad_bias of its channels in registers while its block walks over tokens.
// It copies its part of the next token into shared memory while it works on this one, and reads it there twice: in
// registers both would not fit beside the sums. At the end the block adds up its groups of threads.
#include "layer_norm/backward.h"

#include "common/launch.cuh"
#include "layer_norm/tokens.cuh"

namespace convnext_kernels {
namespace {

constexpr int threads = NormTraits::threads;

struct Statistics {
  float mean = 0.0f, rstd = 0.0f, scale = 1.0f;  // x = (input - mean) scale
  bool kept;

  __device__ __forceinline__ Statistics(LayerNormBackwardParams const& params, std::int64_t token)
      : kept(is_kept(params, token)) {
    if (kept) {
      rstd = params.rstd[token];
      if (params.mean) {
        mean = params.mean[token];
        scale = rstd;
      }
    }
  }
};

// Shared memory for a thread's part of one token: zeros where it is not kept. No other thread comes here.
template <typename Element, int vector, int items>
struct Staged {
  using Share = TokenShare<Element, vector, items>;
  using Item = Vector<Element, vector>;
  static constexpr int vectors = 2 * items * threads;  // of the block

  SharedPointer<Item> grads, inputs;  // of item 0

  __device__ explicit Staged(SharedPointer<Item> stage)
      : grads(stage + threadIdx.x), inputs(stage + items * threads + threadIdx.x) {}

  __device__ __forceinline__ void start(Share const& share, LayerNormBackwardParams const& params, std::int64_t offset,
                                        bool kept) const {
    start(grads, share, static_cast<Element const*>(params.grad_output) + offset, kept);
    start(inputs, share, static_cast<Element const*>(params.input) + offset, kept);
    cp_async_commit();
  }

  __device__ __forceinline__ static void start(SharedPointer<Item> staged, Share const& share, Element const* token,
                                               bool kept) {
#pragma unroll
    for (int item = 0; item < items; ++item) {
      auto const source = reinterpret_cast<Item const*>(token + share.vector_of(item) * vector);
      bool const valid = kept && share.has(item);
      if constexpr (vector > 1) {
        cp_async(staged + item * threads, source, valid);
      } else {
        staged[item * threads] = valid ? *source : Item{};
      }
    }
  }

  __device__ __forceinline__ void load(float (&grad)[vector], float (&input)[vector], int item) const {
    Item const staged_grad = grads[item * threads], staged_input = inputs[item * threads];
    to_floats(staged_grad, grad);
    to_floats(staged_input, input);
  }
};

// Adds the token to the parameters' gradients; sums[0] and [1] become the lane's part of the sums of g and g x.
template <typename Element, int vector, int items>
__device__ __forceinline__ void accumulate(float (&grad_weight)[items][vector], float (&grad_bias)[items][vector],
                                           float (&sums)[2], Staged<Element, vector, items> const& staged,
                                           Statistics const& statistics,
                                           TokenShare<Element, vector, items> const& share,
                                           ChannelFloats<vector> const& weights) {
  sums[0] = sums[1] = 0.0f;
#pragma unroll
  for (int item = 0; item < items; ++item) {
    float grad[vector], input[vector], weight[vector];
    staged.load(grad, input, item);
    weights.load(weight, share.vector_of(item));
#pragma unroll
    for (int i = 0; i < vector; ++i) {
      float const x = (input[i] - statistics.mean) * statistics.scale, g = grad[i] * weight[i];
      grad_weight[item][i] += grad[i] * x;
      grad_bias[item][i] += grad[i];
      sums[0] += g;
      sums[1] += g * x;
    }
  }
}

template <typename Element, int vector, int items>
__device__ __forceinline__ void store_grad_input(Element* grad_input, Staged<Element, vector, items> const& staged,
                                                 Statistics const& statistics, float const (&means)[2],
                                                 TokenShare<Element, vector, items> const& share,
                                                 ChannelFloats<vector> const& weights) {
  float const offset = -statistics.rstd * means[0], slope = -statistics.rstd * statistics.scale * means[1];
#pragma unroll
  for (int item = 0; item < items; ++item) {
    if (share.has(item)) {
      float grad[vector], values[vector], weight[vector];
      staged.load(grad, values, item);
      weights.load(weight, share.vector_of(item));
#pragma unroll
      for (int i = 0; i < vector; ++i) {
        float const terms_of_means = (values[i] - statistics.mean) * slope + offset;
        values[i] = statistics.kept ? grad[i] * weight[i] * statistics.rstd + terms_of_means : 0.0f;
      }
      store_vector(grad_input + share.vector_of(item) * vector, from_floats<Element>(values));
    }
  }
}

// The sums over the block's groups, in their order, through the shared memory of its stages.
template <typename Element, int vector, int items>
__device__ void store_partials(float const (&grad_weight)[items][vector], float const (&grad_bias)[items][vector],
                               LayerNormBackwardParams const& params, TokenTiling const& tiling,
                               TokenShare<Element, vector, items> const& share) {
  int const padded = tiling.padded_vectors() * vector;
  static_assert(2 * sizeof(float) <= 2 * 2 * sizeof(Element), "two sums take no more than two stages of two elements");
  SharedPointer<float> const floats = dynamic_shared<float>();
  SharedPointer<float> const of_group = floats + share.group * 2 * padded;
  ChannelFloats<vector> const weight_sums(of_group, tiling), bias_sums(of_group + padded, tiling);
  __syncthreads();
#pragma unroll
  for (int item = 0; item < items; ++item) {
    weight_sums.store(grad_weight[item], share.vector_of(item));
    bias_sums.store(grad_bias[item], share.vector_of(item));
  }
  __syncthreads();
  float* const partials = params.partials + std::int64_t{blockIdx.x} * 2 * params.channels;
#pragma unroll 1
  for (int i = threadIdx.x; i < 2 * params.channels; i += threads) {
    int const channel = i < params.channels ? i : i - params.channels;
    SharedPointer<float> source = floats + (i - channel ? padded : 0) + weight_sums.place(channel);
    float sum = 0.0f;
#pragma unroll 8
    for (int group = 0; group < tiling.groups(); ++group) {
      sum += source[group * 2 * padded];
    }
    partials[i] = sum;
  }
}

template <typename Element, int vector, int items>
__global__ void __launch_bounds__(threads, items == NormTraits::most_items ? 2 : 3)
    layer_norm_backward(LayerNormBackwardParams const params, TokenTiling const tiling) {
  using Stage = Staged<Element, vector, items>;
  TokenShare<Element, vector, items> const share(tiling);
  auto const stages = dynamic_shared<typename Stage::Item>();
  SharedPointer<float> const scratch = reinterpret_shared<float>(stages + 2 * Stage::vectors);
  ChannelFloats<vector> const weights(scratch + NormTraits::scratch, tiling);

  std::int64_t const step = std::int64_t{gridDim.x} * tiling.groups();
  std::int64_t first = std::int64_t{blockIdx.x} * tiling.groups();
  std::int64_t token = first + share.group, offset = token * params.channels;
  Statistics next(params, token);
  Stage(stages).start(share, params, offset, next.kept);
  weights.template fill<Element>(params.weight, params.parameter_type, params.channels, 1.0f);
  __syncthreads();

  float grad_weight[items][vector] = {}, grad_bias[items][vector] = {};
  float const inverse_channels = 1.0f / params.channels;
  for (int round = 0; first < params.tokens; ++round, first += step) {
    cp_async_wait<0>();
    Statistics const statistics = next;
    std::int64_t const next_offset = offset + step * params.channels;
    next = Statistics(params, token + step);
    Stage const staged(stages + round % 2 * Stage::vectors);
    Stage(stages + (round + 1) % 2 * Stage::vectors).start(share, params, next_offset, next.kept);
    float sums[2];
    accumulate(grad_weight, grad_bias, sums, staged, statistics, share, weights);
    if (params.grad_input) {
      sum_over_lanes(sums, share.lanes, round_scratch(scratch, round));
      float const means[2] = {sums[0] * inverse_channels, sums[1] * inverse_channels};
      if (token < params.tokens) {
        store_grad_input(static_cast<Element*>(params.grad_input) + offset, staged, statistics, means, share, weights);
      }
    }
    token += step;
    offset = next_offset;
  }
  cp_async_wait<0>();  // the zeros behind the last token, which must not land in the next block's shared memory
  if (params.partials) {
    store_partials(grad_weight, grad_bias, params, tiling, share);
  }
}

// Tokens of any length, a block for each, which reads them twice.
template <typename Element>
__device__ void store_grad_inputs_long(LayerNormBackwardParams const& params) {
  __shared__ SharedArray<float, NormTraits::scratch> scratch;
  int round = 0;
  for (std::int64_t token = blockIdx.x; token < params.tokens; token += gridDim.x) {
    std::int64_t const offset = token * params.channels;
    auto const grad_output = static_cast<Element const*>(params.grad_output) + offset;
    auto const input = static_cast<Element const*>(params.input) + offset;
    auto const grad_input = static_cast<Element*>(params.grad_input) + offset;
    Statistics const statistics(params, token);
    auto const g_and_x = [&](int c) -> float2 {
      float const weight = params.weight ? parameter_at<Element>(params.weight, params.parameter_type, c) : 1.0f;
      return {to_float(grad_output[c]) * weight, (to_float(input[c]) - statistics.mean) * statistics.scale};
    };
    float sums[2] = {0.0f, 0.0f};
    for (int c = threadIdx.x; statistics.kept && c < params.channels; c += threads) {
      float2 const values = g_and_x(c);
      sums[0] += values.x;
      sums[1] += values.x * values.y;
    }
    sum_over_lanes(sums, threads, round_scratch(scratch, round++));
    float const means[2] = {sums[0] / params.channels, sums[1] / params.channels};
    for (int c = threadIdx.x; c < params.channels; c += threads) {
      float value = 0.0f;
      if (statistics.kept) {
        float2 const values = g_and_x(c);
        value = statistics.rstd * (values.x - means[0] - values.y * means[1]);
      }
      grad_input[c] = from_float<Element>(value);
    }
  }
}

// Another walk over the same tokens, a thread for each channel.
template <typename Element>
__device__ void store_partials_long(LayerNormBackwardParams const& params) {
  float* const partials = params.partials + std::int64_t{blockIdx.x} * 2 * params.channels;
  for (int c = threadIdx.x; c < params.channels; c += threads) {
    float grad_weight = 0.0f, grad_bias = 0.0f;
    for (std::int64_t token = blockIdx.x; token < params.tokens; token += gridDim.x) {
      Statistics const statistics(params, token);
      if (statistics.kept) {
        std::int64_t const offset = token * params.channels + c;
        float const grad = to_float(static_cast<Element const*>(params.grad_output)[offset]);
        float const input = to_float(static_cast<Element const*>(params.input)[offset]);
        grad_weight += grad * ((input - statistics.mean) * statistics.scale);
        grad_bias += grad;
      }
    }
    partials[c] = grad_weight;
    partials[params.channels + c] = grad_bias;
  }
}

template <typename Element>
__global__ void __launch_bounds__(threads) layer_norm_backward_long(LayerNormBackwardParams const params) {
  if (params.grad_input) {
    store_grad_inputs_long<Element>(params);
  }
  if (params.partials) {
    store_partials_long<Element>(params);
  }
}

template <typename Element_>
struct BackwardKernels {
  using Element = Element_;

  static dim3 grid(LayerNormBackwardParams const& params) {
    return static_cast<unsigned>(layer_norm_backward_splits(params));
  }

  template <int vector, int items>
  static cudaError_t launch(LayerNormBackwardParams const& params, TokenTiling const& tiling, cudaStream_t stream) {
    using Stage = Staged<Element, vector, items>;
    std::size_t const floats = NormTraits::scratch + tiling.padded_vectors() * vector;
    std::size_t const bytes = 2 * Stage::vectors * sizeof(typename Stage::Item) + floats * sizeof(float);
    return convnext_kernels::launch(layer_norm_backward<Element, vector, items>, grid(params), threads,
                                    bytes, stream, params, tiling);
  }

  static cudaError_t launch_long(LayerNormBackwardParams const& params, cudaStream_t stream) {
    return convnext_kernels::launch(layer_norm_backward_long<Element>, grid(params), threads, 0, stream, params);
  }
};

}  // namespace

std::int64_t layer_norm_backward_splits(LayerNormBackwardParams const& params) {
  constexpr std::int64_t most_splits = 4 * 132;  // two blocks for each of two places of an H200's multiprocessors
  // At least two rounds of a block of 256 threads with 24 channels each, and so many tokens that partials, written and
  // read, are no more than a sixth of the traffic.
  constexpr std::int64_t fewest_elements = 2 * 256 * 24, fewest_tokens = 16;
  std::int64_t const tokens = std::max(fewest_tokens, fewest_elements / std::max(params.channels, 1));
  return std::clamp<std::int64_t>(params.tokens / tokens, 1, most_splits);
}

cudaError_t launch_layer_norm_backward(LayerNormBackwardParams const& params, cudaStream_t stream) {
  if (params.tokens < 0 || params.channels < 1) {
    return cudaErrorInvalidValue;
  }
  bool const aligned = aligned_to_vectors(params.grad_output) && aligned_to_vectors(params.input) &&
                       aligned_to_vectors(params.grad_input);
  return launch_typed<BackwardKernels>(params, aligned, stream);
}

}  // namespace convnext_kernels
