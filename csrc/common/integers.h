// Integer arithmetic of launchers.
#pragma once

namespace convnext_kernels {

template <typename Integer>
constexpr Integer ceil_div(Integer a, Integer b) {
  return (a + b - 1) / b;
}

}  // namespace convnext_kernels
