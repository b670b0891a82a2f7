// Rounding of activations to 8 bits, a block at a time, for the integer products. round_activations.inl is the same in
// vectors, with bitwise equal results.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

namespace ryzen {

constexpr int LARGEST_BLOCK = 256;  // of values under one step
constexpr float LARGEST_CODE = 127.0f;
// A block with nothing above this counts as zeros: LARGEST_CODE over a smaller maximum would leave float's range.
constexpr float SMALLEST_MAXIMUM = 0x1p-119f;

// How a block whose largest magnitude is `maximum` is rounded: codes = nearest(x * inverse), x ~= codes * step.
struct Rounding {
  float step, inverse;
};

// A block with an infinity or a NaN has codes of 0 and a step of NaN: what is computed from it is NaN as well.
inline Rounding rounding_for(float maximum) {
  if (maximum < SMALLEST_MAXIMUM) return {0.0f, 0.0f};
  if (!(maximum <= std::numeric_limits<float>::max())) return {std::numeric_limits<float>::quiet_NaN(), 0.0f};
  return {maximum / LARGEST_CODE, LARGEST_CODE / maximum};
}

// Rounds x[0, count) to codes[0, count), to nearest with ties to even, and zeroes codes[count, block).
inline void round_block_reference(const float* x, int count, int block, int8_t* codes, float* step) {
  float maximum = 0.0f;
  for (int i = 0; i < count; ++i) {
    const float magnitude = std::fabs(x[i]);
    if (!(magnitude <= maximum)) maximum = magnitude;
    if (magnitude != magnitude) break;  // or a later number would hide the NaN
  }
  const Rounding rounding = rounding_for(maximum);
  for (int i = 0; i < block; ++i) {
    codes[i] = i < count && rounding.inverse != 0.0f ? int8_t(std::lrint(x[i] * rounding.inverse)) : int8_t{0};
  }
  *step = rounding.step;
}

}  // namespace ryzen
