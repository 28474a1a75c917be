// The type of a tensor's elements, as the launchers are told.
#pragma once

namespace convnext_kernels {

enum class ElementType { float32, float16, bfloat16 };

}  // namespace convnext_kernels
