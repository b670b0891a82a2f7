// Functions of tiles, in the vocabulary alone. Included by tiles_256.h and tiles_512.h.

// e to the x, within 2 units in the last place for x from -87.3 to 87.9; what lies outside is taken for the nearer end,
// and a NaN stays one: min and max give their second operand where either is a NaN.
// Cody-Waite reduction by ln 2 in two parts, then the polynomial that is minimax on half an octave each way.
INLINE F32 exp(F32 x) {
  x = max(f32(-87.3365478515625f), min(f32(87.9f), x));
  const F32 n = nearest(x * f32(1.44269504088896341f));
  F32 r = fma(n, f32(-0.693359375f), x);
  r = fma(n, f32(2.12194440e-4f), r);
  F32 p = f32(1.9875691500e-4f);
  p = fma(p, r, f32(1.3981999507e-3f));
  p = fma(p, r, f32(8.3334519073e-3f));
  p = fma(p, r, f32(4.1665795894e-2f));
  p = fma(p, r, f32(1.6666665459e-1f));
  p = fma(p, r, f32(5.0000001201e-1f));
  p = fma(p, r * r, r + f32(1.0f));
  return times_power_of_two(p, n);
}

INLINE F32 sigmoid(F32 x) { return f32(1.0f) / (f32(1.0f) + exp(f32(0.0f) - x)); }
INLINE F32 tanh(F32 x) { return f32(1.0f) - f32(2.0f) / (exp(x + x) + f32(1.0f)); }

// Abramowitz and Stegun 7.1.26: within 1.5e-7 everywhere.
INLINE F32 erf(F32 x) {
  const F32 a = abs(x), t = f32(1.0f) / fma(f32(0.3275911f), a, f32(1.0f));
  F32 p = f32(1.061405429f);
  p = fma(p, t, f32(-1.453152027f));
  p = fma(p, t, f32(1.421413741f));
  p = fma(p, t, f32(-0.284496736f));
  p = fma(p, t, f32(0.254829592f));
  return with_sign_of(f32(1.0f) - p * t * exp(f32(0.0f) - a * a), x);
}
