// float16 in plain C++.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace ryzen {

// As the processor's own instruction: a signalling NaN becomes a quiet one, which has the highest bit of its fraction.
inline float half_to_float(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000) << 16, exponent = (half >> 10) & 31, fraction = half & 1023;
  if (exponent == 0) {
    const float size = float(fraction) * 0x1p-24f;
    return sign ? -size : size;
  }
  const uint32_t quiet = exponent == 31 && fraction != 0 ? 1u << 22 : 0;
  const uint32_t bits = sign | (exponent == 31 ? 0x7f800000 : (exponent + 112) << 23) | fraction << 13 | quiet;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// To the nearest, ties to even.
inline uint16_t float_to_half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000);
  if (std::isnan(value)) return uint16_t(sign | 0x7e00 | ((bits >> 13) & 0x1ff));
  const float size = std::fabs(value);
  if (size >= 65520.0f) return uint16_t(sign | 0x7c00);
  if (size < 0x1p-14f) return uint16_t(sign | uint16_t(std::nearbyint(size * 0x1p24f)));
  const uint32_t kept = bits & 0x7fffffff;
  return uint16_t(sign | ((kept + 0xfff + ((kept >> 13) & 1) - (112u << 23)) >> 13));
}

}  // namespace ryzen
