// IEEE binary16 as a storage type; conversions round to nearest, ties to even.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

struct __half {
  std::uint16_t bits;
};

inline float __half2float(__half value) {
  int const exponent = value.bits >> 10 & 31, mantissa = value.bits & 1023;
  float magnitude = exponent == 31  ? (mantissa ? NAN : INFINITY)
                    : exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                                    : std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25);
  return value.bits & 0x8000 ? -magnitude : magnitude;
}

inline __half __float2half_rn(float value) {
  std::uint16_t const sign = std::signbit(value) ? 0x8000 : 0;
  float const magnitude = std::fabs(value);
  if (std::isnan(value)) {
    return {0x7fff};
  }
  if (magnitude >= 65520.0f) {
    return {static_cast<std::uint16_t>(sign | 0x7c00)};
  }
  if (magnitude < 0x1p-14f) {  // in units of the smallest subnormal
    return {static_cast<std::uint16_t>(sign | static_cast<int>(std::nearbyint(magnitude * 0x1p24f)))};
  }
  std::uint32_t bits;
  std::memcpy(&bits, &magnitude, sizeof bits);
  bits += 0xfff + (bits >> 13 & 1);
  return {static_cast<std::uint16_t>(sign | (bits - (112u << 23)) >> 13)};
}
