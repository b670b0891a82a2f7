// Rows of SkipRMSNorm and SkipLayerNorm in vectors.
#include "round_activations.inl"

constexpr int SUMS = 4;  // running sums side by side: shorter chains of additions, smaller errors

template <bool WHOLE>
INLINE F32 get(const float* p, int count) {
  if constexpr (WHOLE) return load(p);
  return load(p, count);
}

template <bool WHOLE>
INLINE void put(float* p, F32 x, int count) {
  if constexpr (WHOLE) return store(p, x);
  store(p, x, count);
}

// x + skip + skip_bias from channel i on.
template <bool WHOLE>
INLINE F32 added(const NormRow& row, int i, int count) {
  F32 s = get<WHOLE>(row.x + i, count);
  if (row.skip) s = s + get<WHOLE>(row.skip + i, count);
  if (row.skip_bias) s = s + get<WHOLE>(row.skip_bias + i, count);
  return s;
}

// What a walk over the row adds up.
enum class Total { VALUES, SQUARES, CENTRED_SQUARES };

template <Total TOTAL, bool WHOLE>
INLINE F32 accumulate(const NormRow& row, int i, int count, F32 mean, F32 total) {
  F32 s = added<WHOLE>(row, i, count);
  if (row.sum) put<WHOLE>(row.sum + i, s, count);
  if constexpr (TOTAL == Total::VALUES) return total + s;
  if constexpr (TOTAL == Total::CENTRED_SQUARES) {
    s = s - mean;
    if constexpr (!WHOLE) s = first_lanes(s, count);
  }
  return fma(s, s, total);
}

// The sum over the row, which is stored in `sum` on the way where that is wanted.
template <Total TOTAL>
INLINE float total_of(const NormRow& row, float mean) {
  const F32 middle = f32(mean);
  F32 totals[SUMS] = {f32(0.0f), f32(0.0f), f32(0.0f), f32(0.0f)};
  int i = 0;
  for (; i + SUMS * LANES <= row.C; i += SUMS * LANES) {
    for (int at = 0; at < SUMS; ++at)
      totals[at] = accumulate<TOTAL, true>(row, i + at * LANES, LANES, middle, totals[at]);
  }
  for (; i + LANES <= row.C; i += LANES) totals[0] = accumulate<TOTAL, true>(row, i, LANES, middle, totals[0]);
  if (i < row.C) totals[1] = accumulate<TOTAL, false>(row, i, row.C - i, middle, totals[1]);
  return sum((totals[0] + totals[1]) + (totals[2] + totals[3]));
}

template <bool CENTRED, bool WHOLE>
INLINE F32 normalised(const NormRow& row, int i, int count, F32 mean, F32 factor) {
  F32 s = added<WHOLE>(row, i, count);
  if constexpr (CENTRED) s = s - mean;
  const F32 scaled = s * factor, weight = get<WHOLE>(row.weight + i, count);
  return row.beta ? fma(scaled, weight, get<WHOLE>(row.beta + i, count)) : scaled * weight;
}

template <bool CENTRED>
INLINE void norm_row(const NormRow& given) {
  NormRow row = given;
  float mean = 0.0f, mean_square;
  if constexpr (CENTRED) {
    mean = total_of<Total::VALUES>(row, 0.0f) / float(row.C);
  } else {
    mean_square = total_of<Total::SQUARES>(row, 0.0f) / float(row.C);
  }
  if (row.sum) {  // from here on what is added need not be added again
    row.x = row.sum;
    row.skip = row.skip_bias = nullptr;
    row.sum = nullptr;
  }
  if constexpr (CENTRED) mean_square = total_of<Total::CENTRED_SQUARES>(row, mean) / float(row.C);
  if (!row.y && !row.codes) return;

  const F32 middle = f32(mean), factor = f32(1.0f / __builtin_sqrtf(mean_square + row.epsilon));
  float held[LARGEST_BLOCK];  // a block of y that nobody but the rounding wants
  const int block = row.codes ? row.block : row.C;
  for (int begin = 0; begin < row.C; begin += block) {
    const int count = row.C - begin < block ? row.C - begin : block;
    float* y = row.y ? row.y + begin : held;
    int i = 0;
    for (; i + LANES <= count; i += LANES)
      store(y + i, normalised<CENTRED, true>(row, begin + i, LANES, middle, factor));
    if (i < count)
      store(y + i, normalised<CENTRED, false>(row, begin + i, count - i, middle, factor), count - i);
    if (row.codes) round_block(y, count, block, row.codes + begin, row.steps + begin / block);
  }
}

static void rms_norm_row(const NormRow& row) { norm_row<false>(row); }
static void layer_norm_row(const NormRow& row) { norm_row<true>(row); }
