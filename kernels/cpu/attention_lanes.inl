// Query rows as the lanes of a vector: eight (one register of AVX2) where so many share a KV head, else sixteen (F32).
// What attention needs of them, for both.

struct F8 {
  __m256 v;
};

template <typename V>
struct Lanes;

template <>
struct Lanes<F8> {
  static constexpr int COUNT = 8;
  INLINE F8 at(const float* p) { return {_mm256_loadu_ps(p)}; }
  INLINE F8 all(float x) { return {_mm256_set1_ps(x)}; }
};

template <>
struct Lanes<F32> {
  static constexpr int COUNT = 16;
  INLINE F32 at(const float* p) { return load(p); }
  INLINE F32 all(float x) { return f32(x); }
};

INLINE void store(float* p, F8 x) { _mm256_storeu_ps(p, x.v); }
INLINE F8 operator+(F8 a, F8 b) { return {_mm256_add_ps(a.v, b.v)}; }
INLINE F8 operator-(F8 a, F8 b) { return {_mm256_sub_ps(a.v, b.v)}; }
INLINE F8 operator*(F8 a, F8 b) { return {_mm256_mul_ps(a.v, b.v)}; }
INLINE F8 fma(F8 a, F8 b, F8 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
INLINE F8 max(F8 a, F8 b) { return {_mm256_max_ps(a.v, b.v)}; }

// 2^n times b for a whole n <= 0. AVX2 builds the power from its exponent's bits, so n is at least -127, which makes
// zero; a NaN stays one, for max gives its second operand.
#if RYZEN_WIDE
INLINE F8 nearest(F8 a) { return {_mm256_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
INLINE F8 scaled(F8 b, F8 n) { return {_mm256_scalef_ps(b.v, n.v)}; }
template <typename V>
INLINE V scalable(V t) {
  return t;
}
#else
INLINE F8 nearest(F8 a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
INLINE F8 scaled(F8 b, F8 n) { return {_mm256_mul_ps(b.v, power_of_two(n.v))}; }
template <typename V>
INLINE V scalable(V t) {
  return max(Lanes<V>::all(-127.0f), t);
}
#endif
INLINE F32 scaled(F32 b, F32 n) { return times_power_of_two(b, n); }

// 2^t for t <= 0, within 1.6e-7 of it; exactly 1 at 0, and exactly 0 far below. The polynomial is minimax on half an
// octave each way, with its constant held at 1.
template <typename V>
INLINE V exp2_below(V t) {
  t = scalable(t);
  const V n = nearest(t), f = t - n;
  V p = Lanes<V>::all(0.001326472725f);
  p = fma(p, f, Lanes<V>::all(0.009671512688f));
  p = fma(p, f, Lanes<V>::all(0.05550733744f));
  p = fma(p, f, Lanes<V>::all(0.2402224208f));
  p = fma(p, f, Lanes<V>::all(0.6931469776f));
  p = fma(p, f, Lanes<V>::all(1.0f));
  return scaled(p, n);
}

// x where lane i has first[i] <= key < end[i], else LOWEST.
#if RYZEN_WIDE
INLINE F8 seen(F8 x, int key, const int* first, const int* end) {
  const __m256i at = _mm256_set1_epi32(key);
  const __mmask8 after = _mm256_cmple_epi32_mask(_mm256_loadu_si256((const __m256i*)first), at);
  const __mmask8 in = _mm256_mask_cmpgt_epi32_mask(after, _mm256_loadu_si256((const __m256i*)end), at);
  return {_mm256_mask_blend_ps(in, _mm256_set1_ps(LOWEST), x.v)};
}
INLINE F32 seen(F32 x, int key, const int* first, const int* end) {
  const __m512i at = _mm512_set1_epi32(key);
  const __mmask16 after = _mm512_cmple_epi32_mask(_mm512_loadu_si512(first), at);
  const __mmask16 in = _mm512_mask_cmpgt_epi32_mask(after, _mm512_loadu_si512(end), at);
  return {_mm512_mask_blend_ps(in, _mm512_set1_ps(LOWEST), x.v)};
}
#else
INLINE __m256 seen8(__m256 x, int key, const int* first, const int* end) {
  const __m256i at = _mm256_set1_epi32(key);
  const __m256i before = _mm256_cmpgt_epi32(_mm256_loadu_si256((const __m256i*)first), at);
  const __m256i in = _mm256_cmpgt_epi32(_mm256_loadu_si256((const __m256i*)end), at);
  return _mm256_blendv_ps(_mm256_set1_ps(LOWEST), x, _mm256_castsi256_ps(_mm256_andnot_si256(before, in)));
}
INLINE F8 seen(F8 x, int key, const int* first, const int* end) { return {seen8(x.v, key, first, end)}; }
INLINE F32 seen(F32 x, int key, const int* first, const int* end) {
  return {seen8(x.lo, key, first, end), seen8(x.hi, key, first + 8, end + 8)};
}
#endif
