// What happens behind a product, in vectors; matmul_nbits.h, which is to be included before, says what it may be.
// Defines UNROLLED, which whoever includes this file undefines.

#define UNROLLED _Pragma("GCC unroll 32")

INLINE F32 activate(F32 x, Activation activation) {
  switch (activation) {
    case Activation::NONE: return x;
    case Activation::RELU: return max(f32(0.0f), x);  // in this order, a NaN stays one
    case Activation::RELU2: return max(f32(0.0f), x) * max(f32(0.0f), x);
    case Activation::SILU: return x * sigmoid(x);
    case Activation::GELU: return x * f32(0.5f) * (f32(1.0f) + erf(x * f32(0.70710678118654752f)));
    case Activation::GELU_TANH: {
      const F32 inner = f32(0.79788456080286536f) * fma(f32(0.044715f) * x * x, x, x);
      return x * f32(0.5f) * (f32(1.0f) + tanh(inner));
    }
    case Activation::QUICK_GELU: return x * sigmoid(f32(1.702f) * x);
    case Activation::SIGMOID: return sigmoid(x);
    case Activation::TANH: return tanh(x);
  }
  return x;
}

INLINE void put(const Epilogue& e, int64_t row, int64_t column, F32 y) {
  const int64_t at = row * e.columns + column, left = e.columns - column;
  if (left >= LANES) {
    store(e.out + at, e.residual ? y + load(e.residual + at) : y);
  } else if (left > 0) {
    store(e.out + at, e.residual ? y + load(e.residual + at, int(left)) : y, int(left));
  }
}

// One row's products with a panel, to the output.
INLINE void finish(const Epilogue& e, int64_t row, int64_t panel, const F32 (&sums)[HALVES]) {
  F32 value[HALVES];
  UNROLLED for (int h = 0; h < HALVES; ++h) {
    value[h] = e.bias ? sums[h] + load(e.bias + panel * PANEL + h * LANES) : sums[h];
  }
  if (e.gated) {
    put(e, row, panel * LANES, activate(value[0], e.activation) * value[1]);
  } else {
    UNROLLED for (int h = 0; h < HALVES; ++h) {
      put(e, row, panel * PANEL + h * LANES, activate(value[h], e.activation));
    }
  }
}
