// A thread asks for its part of the next token before it works on this one.
#include "layer_norm/forward.h"

#include "common/launch.cuh"
#include "layer_norm/tokens.cuh"

namespace convnext_kernels {
namespace {

constexpr int threads = NormTraits::threads;

// The lane's items of the token less the mean; returns rstd. Idle places stay zero and count for nothing.
template <typename Share, int vector, int items>
__device__ __forceinline__ float center(float (&values)[items][vector], float& mean, Share const& share,
                                        LayerNormForwardParams const& params, SharedPointer<float> scratch) {
  float sum[1] = {0.0f};
#pragma unroll
  for (int item = 0; item < items; ++item) {
#pragma unroll
    for (float const value : values[item]) {
      sum[0] += value;
    }
  }
  sum_over_lanes(sum, share.lanes, round_scratch(scratch, 0));
  mean = sum[0] / params.channels;
  float squares[1] = {0.0f};
#pragma unroll
  for (int item = 0; item < items; ++item) {
    float const item_mean = share.has(item) ? mean : 0.0f;
#pragma unroll
    for (float& value : values[item]) {
      value -= item_mean;
      squares[0] += value * value;
    }
  }
  sum_over_lanes(squares, share.lanes, round_scratch(scratch, 1));
  return rsqrtf(squares[0] / params.channels + params.eps);
}

__device__ __forceinline__ void store_statistics(LayerNormForwardParams const& params, std::int64_t token, float mean,
                                                 float rstd) {
  if (params.mean) {
    params.mean[token] = mean;
  }
  if (params.rstd) {
    params.rstd[token] = rstd;
  }
}

template <typename Element, int vector, int items>
__global__ void __launch_bounds__(threads, items == NormTraits::most_items ? 3 : 4)
    layer_norm_forward(LayerNormForwardParams const params, TokenTiling const tiling) {
  TokenShare<Element, vector, items> const share(tiling);
  SharedPointer<float> const scratch = dynamic_shared<float>();
  ChannelFloats<vector> const weights(scratch + NormTraits::scratch, tiling);
  ChannelFloats<vector> const biases(weights.floats + tiling.padded_vectors() * vector, tiling);

  std::int64_t const step = std::int64_t{gridDim.x} * tiling.groups();
  std::int64_t first = std::int64_t{blockIdx.x} * tiling.groups();
  std::int64_t token = first + share.group, offset = token * params.channels;
  auto const input = static_cast<Element const*>(params.input);
  auto const output = static_cast<Element*>(params.output);
  typename decltype(share)::Vectors next;
  bool next_kept = is_kept(params, token);
  share.load(next, input + offset, next_kept);
  weights.template fill<Element>(params.weight, params.parameter_type, params.channels, 1.0f);
  biases.template fill<Element>(params.bias, params.parameter_type, params.channels, 0.0f);
  __syncthreads();

  for (; first < params.tokens; first += step) {
    float values[items][vector];
#pragma unroll
    for (int item = 0; item < items; ++item) {
      to_floats(next[item], values[item]);
    }
    std::int64_t const next_offset = offset + step * params.channels;
    bool const kept = next_kept;
    next_kept = is_kept(params, token + step);
    share.load(next, input + next_offset, next_kept);
    float mean;
    float const rstd = center(values, mean, share, params, scratch);
    if (token < params.tokens) {
#pragma unroll
      for (int item = 0; item < items; ++item) {
        if (share.has(item)) {
          float weight[vector], bias[vector];
          weights.load(weight, share.vector_of(item));
          biases.load(bias, share.vector_of(item));
#pragma unroll
          for (int i = 0; i < vector; ++i) {
            values[item][i] = kept ? values[item][i] * rstd * weight[i] + bias[i] : 0.0f;
          }
          store_vector(output + offset + share.vector_of(item) * vector, from_floats<Element>(values[item]));
        }
      }
      if (share.lane == 0) {
        store_statistics(params, token, mean, rstd);
      }
    }
    token += step;
    offset = next_offset;
  }
}

// Tokens of any length: a block for each, which reads it three times.
template <typename Element>
__global__ void __launch_bounds__(threads) layer_norm_forward_long(LayerNormForwardParams const params) {
  __shared__ SharedArray<float, NormTraits::scratch> scratch;
  for (std::int64_t token = blockIdx.x; token < params.tokens; token += gridDim.x) {
    auto const input = static_cast<Element const*>(params.input) + token * params.channels;
    auto const output = static_cast<Element*>(params.output) + token * params.channels;
    bool const kept = is_kept(params, token);
    float sum[1] = {0.0f};
    for (int c = threadIdx.x; kept && c < params.channels; c += threads) {
      sum[0] += to_float(input[c]);
    }
    sum_over_lanes(sum, threads, round_scratch(scratch, 0));
    float const mean = sum[0] / params.channels;
    float squares[1] = {0.0f};
    for (int c = threadIdx.x; kept && c < params.channels; c += threads) {
      float const value = to_float(input[c]) - mean;
      squares[0] += value * value;
    }
    sum_over_lanes(squares, threads, round_scratch(scratch, 1));
    float const rstd = rsqrtf(squares[0] / params.channels + params.eps);
    for (int c = threadIdx.x; c < params.channels; c += threads) {
      float const weight = params.weight ? parameter_at<Element>(params.weight, params.parameter_type, c) : 1.0f;
      float const bias = params.bias ? parameter_at<Element>(params.bias, params.parameter_type, c) : 0.0f;
      output[c] = from_float<Element>(kept ? (to_float(input[c]) - mean) * rstd * weight + bias : 0.0f);
    }
    if (threadIdx.x == 0) {
      store_statistics(params, token, mean, rstd);
    }
  }
}

constexpr std::int64_t most_blocks = 0x7fffffff;

// Blocks for so many groups of tokens: up to eight rounds of a block share its reading of the parameters, once there is
// a block for every place on a large GPU.
std::int64_t blocks_for(std::int64_t groups) {
  constexpr std::int64_t places = 4 * 132, most_rounds = 8;
  std::int64_t const rounds = std::clamp<std::int64_t>(groups / places, 1, most_rounds);
  return std::min(ceil_div(groups, rounds), most_blocks);
}

template <typename Element_>
struct ForwardKernels {
  using Element = Element_;

  template <int vector, int items>
  static cudaError_t launch(LayerNormForwardParams const& params, TokenTiling const& tiling, cudaStream_t stream) {
    dim3 const grid(static_cast<unsigned>(blocks_for(ceil_div(params.tokens, std::int64_t{tiling.groups()}))));
    std::size_t const floats = NormTraits::scratch + 2 * tiling.padded_vectors() * vector;
    return convnext_kernels::launch(layer_norm_forward<Element, vector, items>, grid, threads, floats * sizeof(float),
                                    stream, params, tiling);
  }

  static cudaError_t launch_long(LayerNormForwardParams const& params, cudaStream_t stream) {
    dim3 const grid(static_cast<unsigned>(std::min(params.tokens, most_blocks)));
    return convnext_kernels::launch(layer_norm_forward_long<Element>, grid, threads, 0, stream, params);
  }
};

}  // namespace

cudaError_t launch_layer_norm_forward(LayerNormForwardParams const& params, cudaStream_t stream) {
  if (params.tokens < 0 || params.channels < 1) {
    return cudaErrorInvalidValue;
  }
  if (params.tokens == 0) {
    return cudaSuccess;
  }
  bool const aligned = aligned_to_vectors(params.input) && aligned_to_vectors(params.output);
  return launch_typed<ForwardKernels>(params, aligned, stream);
}

}  // namespace convnext_kernels
