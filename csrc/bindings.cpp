// The one file that knows Python: it turns Python's numbers and addresses into the launchers' arguments.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

#include "common/build_info.h"
#include "common/partial_sums.h"
#include "depthwise_conv/filter_gradient.h"
#include "depthwise_conv/forward.h"
#include "depthwise_conv_layer_norm/forward.h"
#include "layer_norm/backward.h"
#include "layer_norm/forward.h"

namespace py = pybind11;
namespace ck = convnext_kernels;
using namespace pybind11::literals;

namespace {

// Of a tensor's first element, 0 for none; and of a stream.
using Address = std::uintptr_t;
using Strides = std::array<std::int64_t, 3>;
using Shape = std::array<std::int64_t, 4>;

template <typename T = void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

ck::ImageStrides image_strides(Strides const& strides) { return {strides[0], strides[1], strides[2]}; }

template <typename Params>
void set_shape(Params& params, Shape const& shape) {
  params.batch = shape[0];
  params.height = static_cast<int>(shape[1]);
  params.width = static_cast<int>(shape[2]);
  params.channels = static_cast<int>(shape[3]);
}

void check(cudaError_t status) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string(cudaGetErrorName(status)) + ": " + cudaGetErrorString(status));
  }
}

char const* name(ck::DeviceCode code) {
  switch (code) {
    case ck::DeviceCode::machine_code: return "machine code";
    case ck::DeviceCode::ptx: return "PTX";
    case ck::DeviceCode::none: return "none";
    case ck::DeviceCode::unavailable: return "unavailable";
  }
  throw std::logic_error("DeviceCode without a name");
}

std::pair<char const*, char const*> device_code(int device) {
  ck::DeviceSupport const support = ck::device_support(device);
  return {name(support.code), support.status == cudaSuccess ? "" : cudaGetErrorString(support.status)};
}

void depthwise_conv_forward(Address input, Address weight, Address bias, Address residual, Address drop_path_factor,
                            Address output, Strides const& input_strides, Strides const& output_strides,
                            ck::ElementType type, ck::ElementType parameter_type,
                            Shape const& shape, int kernel_size, bool flip_filter, Address stream) {
  ck::DepthwiseConvForwardParams params{};
  params.input = pointer(input);
  params.weight = pointer(weight);
  params.bias = pointer(bias);
  params.residual = pointer(residual);
  params.drop_path_factor = pointer<float>(drop_path_factor);
  params.output = pointer(output);
  params.input_strides = image_strides(input_strides);
  params.output_strides = image_strides(output_strides);
  params.type = type;
  params.parameter_type = parameter_type;
  set_shape(params, shape);
  params.kernel_size = kernel_size;
  params.flip_filter = flip_filter;
  check(ck::launch_depthwise_conv_forward(params, pointer<CUstream_st>(stream)));
}

// What the choice of a path looks at.
bool in_one_pass(Address input, Strides const& input_strides, ck::ElementType type, Shape const& shape,
                 int kernel_size) {
  ck::DepthwiseConvLayerNormForwardParams params{};
  params.input = pointer(input);
  params.input_strides = image_strides(input_strides);
  params.type = type;
  set_shape(params, shape);
  params.kernel_size = kernel_size;
  return ck::in_one_pass(params);
}

std::int64_t filter_gradient_splits(ck::ElementType type, Shape const& shape, int kernel_size) {
  ck::DepthwiseConvFilterGradientParams params{};
  params.type = type;
  set_shape(params, shape);
  params.kernel_size = kernel_size;
  return ck::filter_gradient_splits(params);
}

void depthwise_conv_filter_gradient(Address grad_output, Address input, Address drop_path_factor, Address partials,
                                    Strides const& grad_output_strides, Strides const& input_strides,
                                    ck::ElementType type, Shape const& shape, int kernel_size, Address stream) {
  ck::DepthwiseConvFilterGradientParams params{};
  params.grad_output = pointer(grad_output);
  params.input = pointer(input);
  params.drop_path_factor = pointer<float>(drop_path_factor);
  params.partials = pointer<float>(partials);
  params.grad_output_strides = image_strides(grad_output_strides);
  params.input_strides = image_strides(input_strides);
  params.type = type;
  set_shape(params, shape);
  params.kernel_size = kernel_size;
  check(ck::launch_depthwise_conv_filter_gradient(params, pointer<CUstream_st>(stream)));
}

void depthwise_conv_layer_norm_forward(Address input, Address weight, Address bias, Address norm_weight,
                                       Address norm_bias, Address drop_path_factor, Address output, Address convolved,
                                       Address mean, Address rstd, Strides const& input_strides, ck::ElementType type,
                                       ck::ElementType parameter_type, ck::ElementType norm_parameter_type,
                                       Shape const& shape, int kernel_size, float eps, Address stream) {
  ck::DepthwiseConvLayerNormForwardParams params{};
  params.input = pointer(input);
  params.weight = pointer(weight);
  params.bias = pointer(bias);
  params.norm_weight = pointer(norm_weight);
  params.norm_bias = pointer(norm_bias);
  params.drop_path_factor = pointer<float>(drop_path_factor);
  params.output = pointer(output);
  params.convolved = pointer(convolved);
  params.mean = pointer<float>(mean);
  params.rstd = pointer<float>(rstd);
  params.input_strides = image_strides(input_strides);
  params.type = type;
  params.parameter_type = parameter_type;
  params.norm_parameter_type = norm_parameter_type;
  set_shape(params, shape);
  params.kernel_size = kernel_size;
  params.eps = eps;
  check(ck::launch_depthwise_conv_layer_norm_forward(params, pointer<CUstream_st>(stream)));
}

void layer_norm_forward(Address input, Address weight, Address bias, Address drop_path_factor, Address output,
                        Address mean, Address rstd, ck::ElementType type, ck::ElementType parameter_type,
                        std::int64_t tokens, std::int64_t tokens_per_image, int channels, float eps, Address stream) {
  ck::LayerNormForwardParams params{};
  params.input = pointer(input);
  params.weight = pointer(weight);
  params.bias = pointer(bias);
  params.drop_path_factor = pointer<float>(drop_path_factor);
  params.output = pointer(output);
  params.mean = pointer<float>(mean);
  params.rstd = pointer<float>(rstd);
  params.type = type;
  params.parameter_type = parameter_type;
  params.tokens = tokens;
  params.tokens_per_image = tokens_per_image;
  params.channels = channels;
  params.eps = eps;
  check(ck::launch_layer_norm_forward(params, pointer<CUstream_st>(stream)));
}

std::int64_t layer_norm_backward_splits(ck::ElementType type, std::int64_t tokens, int channels) {
  ck::LayerNormBackwardParams params{};
  params.type = type;
  params.tokens = tokens;
  params.channels = channels;
  return ck::layer_norm_backward_splits(params);
}

void layer_norm_backward(Address grad_output, Address input, Address weight, Address mean, Address rstd,
                         Address drop_path_factor, Address grad_input, Address partials, ck::ElementType type,
                         ck::ElementType parameter_type, std::int64_t tokens, std::int64_t tokens_per_image,
                         int channels, Address stream) {
  ck::LayerNormBackwardParams params{};
  params.grad_output = pointer(grad_output);
  params.input = pointer(input);
  params.weight = pointer(weight);
  params.mean = pointer<float>(mean);
  params.rstd = pointer<float>(rstd);
  params.drop_path_factor = pointer<float>(drop_path_factor);
  params.grad_input = pointer(grad_input);
  params.partials = pointer<float>(partials);
  params.type = type;
  params.parameter_type = parameter_type;
  params.tokens = tokens;
  params.tokens_per_image = tokens_per_image;
  params.channels = channels;
  check(ck::launch_layer_norm_backward(params, pointer<CUstream_st>(stream)));
}

void partial_sums(Address partials, std::int64_t count, std::int64_t elements, Address sums, Address stream) {
  check(ck::launch_partial_sums(pointer<float>(partials), count, elements, pointer<float>(sums),
                                pointer<CUstream_st>(stream)));
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() =
      "Kernels of convnext_kernels: addresses, sizes, strides and a stream in; RuntimeError with CUDA's error. An"
      " address of 0 is a tensor that is not there. Each function is described in the header of its launcher.";

  ck::BuildInfo const info = ck::build_info();
  module.attr("version") = info.version;
  module.attr("nvcc") = info.nvcc;
  module.attr("architectures") = info.architectures;
  module.attr("ptx") = info.ptx;

  // A launch waits where a stream's queue is full, maybe for what another thread of Python has yet to launch.
  py::call_guard<py::gil_scoped_release> const without_gil;

  module.def("device_code", &device_code, py::arg("device"), without_gil,
             "(code, reason): code is 'machine code', 'PTX', 'none' or 'unavailable'; reason is empty for the first two.");

  py::enum_<ck::ElementType>(module, "ElementType")
      .value("float32", ck::ElementType::float32)
      .value("float16", ck::ElementType::float16)
      .value("bfloat16", ck::ElementType::bfloat16);

  module.def("depthwise_conv_forward", &depthwise_conv_forward, without_gil, py::kw_only(), "input"_a, "weight"_a,
             "bias"_a, "residual"_a, "drop_path_factor"_a, "output"_a, "input_strides"_a, "output_strides"_a, "type"_a,
             "parameter_type"_a, "shape"_a, "kernel_size"_a, "flip_filter"_a, "stream"_a);
  module.def("in_one_pass", &in_one_pass, py::kw_only(), "input"_a, "input_strides"_a, "type"_a, "shape"_a,
             "kernel_size"_a);
  module.def("filter_gradient_splits", &filter_gradient_splits, py::kw_only(), "type"_a, "shape"_a, "kernel_size"_a);
  module.def("depthwise_conv_filter_gradient", &depthwise_conv_filter_gradient, without_gil, py::kw_only(),
             "grad_output"_a, "input"_a, "drop_path_factor"_a, "partials"_a, "grad_output_strides"_a,
             "input_strides"_a, "type"_a, "shape"_a, "kernel_size"_a, "stream"_a);
  module.def("depthwise_conv_layer_norm_forward", &depthwise_conv_layer_norm_forward, without_gil, py::kw_only(),
             "input"_a, "weight"_a, "bias"_a, "norm_weight"_a, "norm_bias"_a, "drop_path_factor"_a, "output"_a,
             "convolved"_a, "mean"_a, "rstd"_a, "input_strides"_a, "type"_a, "parameter_type"_a,
             "norm_parameter_type"_a, "shape"_a, "kernel_size"_a, "eps"_a, "stream"_a);
  module.def("layer_norm_forward", &layer_norm_forward, without_gil, py::kw_only(), "input"_a, "weight"_a, "bias"_a,
             "drop_path_factor"_a, "output"_a, "mean"_a, "rstd"_a, "type"_a, "parameter_type"_a, "tokens"_a,
             "tokens_per_image"_a, "channels"_a, "eps"_a, "stream"_a);
  module.def("layer_norm_backward_splits", &layer_norm_backward_splits, py::kw_only(), "type"_a, "tokens"_a,
             "channels"_a);
  module.def("layer_norm_backward", &layer_norm_backward, without_gil, py::kw_only(), "grad_output"_a, "input"_a,
             "weight"_a, "mean"_a, "rstd"_a, "drop_path_factor"_a, "grad_input"_a, "partials"_a, "type"_a,
             "parameter_type"_a, "tokens"_a, "tokens_per_image"_a, "channels"_a, "stream"_a);
  module.def("partial_sums", &partial_sums, without_gil, py::kw_only(), "partials"_a, "count"_a, "elements"_a,
             "sums"_a, "stream"_a);
}
