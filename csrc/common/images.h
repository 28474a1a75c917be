// Images as the launchers are told of them: [batch, height, width, channels], channels next to each other.
#pragma once

#include <cstdint>

namespace convnext_kernels {

// In elements.
struct ImageStrides {
  std::int64_t image, row, pixel;
};

}  // namespace convnext_kernels
