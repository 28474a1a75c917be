// Calls launch_depthwise_conv_forward. Arguments: the numbers of its parameters, in order, and whether there is a bias.
// Input: input, weight and bias. Output: the error code as four bytes, then the output's memory, which held 0xff bytes.
#include "depthwise_conv/forward.h"

#include <cstdlib>
#include <iostream>
#include <vector>

namespace ck = convnext_kernels;

namespace {

std::size_t bytes_of(ck::ElementType type) { return type == ck::ElementType::float32 ? 4 : 2; }

// From the first element to the last; none where a size is one that the launcher refuses.
std::size_t extent(ck::DepthwiseConvForwardParams const& params, ck::ImageStrides const& strides) {
  if (params.batch < 1 || params.height < 1 || params.width < 1) {
    return 0;
  }
  return (params.batch - 1) * strides.image + (params.height - 1) * strides.row + (params.width - 1) * strides.pixel +
         params.channels;
}

std::vector<char> read(std::size_t bytes) {
  std::vector<char> values(bytes);
  if (!std::cin.read(values.data(), bytes)) {
    std::exit(2);
  }
  return values;
}

}  // namespace

int main(int, char** arguments) {
  auto const number = [&] { return std::atoll(*++arguments); };
  ck::DepthwiseConvForwardParams params{};
  params.input_strides = {number(), number(), number()};
  params.output_strides = {number(), number(), number()};
  params.type = static_cast<ck::ElementType>(number());
  params.parameter_type = static_cast<ck::ElementType>(number());
  params.batch = number();
  params.height = static_cast<int>(number());
  params.width = static_cast<int>(number());
  params.channels = static_cast<int>(number());
  params.kernel_size = static_cast<int>(number());
  bool const has_bias = number();

  std::size_t const taps = std::size_t(params.channels) * params.kernel_size * params.kernel_size;
  std::vector<char> const input = read(extent(params, params.input_strides) * bytes_of(params.type));
  std::vector<char> const weight = read(taps * bytes_of(params.parameter_type));
  std::vector<char> const bias = read(has_bias * params.channels * bytes_of(params.parameter_type));
  std::vector<char> output(extent(params, params.output_strides) * bytes_of(params.type), '\xff');
  params.input = input.data();
  params.weight = weight.data();
  params.bias = has_bias ? bias.data() : nullptr;
  params.output = output.data();

  int const status = ck::launch_depthwise_conv_forward(params, nullptr);
  std::cout.write(reinterpret_cast<char const*>(&status), sizeof status);
  std::cout.write(output.data(), output.size());
}
