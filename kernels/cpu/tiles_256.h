// The tile vocabulary in AVX2: sixteen lanes are two registers. See tiles_512.h.

constexpr int LANES = 16;
constexpr int QUAD = 4;
constexpr int TILE_BYTES = 64;

struct F32 {
  __m256 lo, hi;
};
struct I32 {
  __m256i lo, hi;
};
struct Quads {
  __m256i lo, hi;
};

// Lanes below count all ones, the others zero, for eight lanes that begin at `base`.
INLINE __m256i below(int count, int base) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count - base), lane);
}

// --- floats
INLINE F32 f32(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
INLINE F32 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
INLINE F32 load(const float* p, int count) {
  return {_mm256_maskload_ps(p, below(count, 0)), _mm256_maskload_ps(p + 8, below(count, 8))};
}
INLINE void store(float* p, F32 x) {
  _mm256_storeu_ps(p, x.lo);
  _mm256_storeu_ps(p + 8, x.hi);
}
INLINE void store(float* p, F32 x, int count) {
  _mm256_maskstore_ps(p, below(count, 0), x.lo);
  _mm256_maskstore_ps(p + 8, below(count, 8), x.hi);
}
INLINE F32 operator+(F32 a, F32 b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
INLINE F32 operator-(F32 a, F32 b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
INLINE F32 operator*(F32 a, F32 b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
INLINE F32 operator/(F32 a, F32 b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
INLINE F32 fma(F32 a, F32 b, F32 c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
INLINE F32 max(F32 a, F32 b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
INLINE F32 min(F32 a, F32 b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
INLINE F32 abs(F32 a) {
  const __m256 bit = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(bit, a.lo), _mm256_andnot_ps(bit, a.hi)};
}
INLINE F32 with_sign_of(F32 a, F32 sign) {
  const __m256 bit = _mm256_set1_ps(-0.0f);
  return {_mm256_or_ps(_mm256_andnot_ps(bit, a.lo), _mm256_and_ps(bit, sign.lo)),
          _mm256_or_ps(_mm256_andnot_ps(bit, a.hi), _mm256_and_ps(bit, sign.hi))};
}
// a's first lanes, zeros behind.
INLINE F32 first_lanes(F32 a, int count) {
  return {_mm256_and_ps(a.lo, _mm256_castsi256_ps(below(count, 0))),
          _mm256_and_ps(a.hi, _mm256_castsi256_ps(below(count, 8)))};
}
INLINE F32 nearest(F32 a) {
  return {_mm256_round_ps(a.lo, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
          _mm256_round_ps(a.hi, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
INLINE float sum(F32 a) {
  const __m256 eight = _mm256_add_ps(a.lo, a.hi);
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
INLINE __m256 power_of_two(__m256 n) {  // for whole n from -126 to 127: the exponent's bits
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
INLINE F32 times_power_of_two(F32 a, F32 n) {
  return {_mm256_mul_ps(a.lo, power_of_two(n.lo)), _mm256_mul_ps(a.hi, power_of_two(n.hi))};
}

// --- integers
INLINE I32 i32(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
INLINE I32 load(const int32_t* p) {
  return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)p + 1)};
}
INLINE void store(int32_t* p, I32 a) {
  _mm256_storeu_si256((__m256i*)p, a.lo);
  _mm256_storeu_si256((__m256i*)p + 1, a.hi);
}
INLINE I32 operator+(I32 a, I32 b) { return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)}; }
INLINE I32 operator-(I32 a, I32 b) { return {_mm256_sub_epi32(a.lo, b.lo), _mm256_sub_epi32(a.hi, b.hi)}; }
INLINE I32 operator&(I32 a, I32 b) { return {_mm256_and_si256(a.lo, b.lo), _mm256_and_si256(a.hi, b.hi)}; }
INLINE I32 operator>>(I32 a, I32 bits) {
  return {_mm256_srlv_epi32(a.lo, bits.lo), _mm256_srlv_epi32(a.hi, bits.hi)};
}
INLINE I32 max(I32 a, I32 b) { return {_mm256_max_epi32(a.lo, b.lo), _mm256_max_epi32(a.hi, b.hi)}; }
INLINE int32_t largest(I32 a) {
  const __m256i eight = _mm256_max_epi32(a.lo, a.hi);
  __m128i four = _mm_max_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}
INLINE F32 to_f32(I32 a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
INLINE I32 to_i32(F32 a) { return {_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)}; }
// The bits of |a|, which as integers are in the order of the magnitudes, with NaN above all.
INLINE I32 magnitude_bits(F32 a) {
  const F32 magnitude = abs(a);
  return {_mm256_castps_si256(magnitude.lo), _mm256_castps_si256(magnitude.hi)};
}
INLINE int32_t sum(I32 a) {
  const __m256i eight = _mm256_add_epi32(a.lo, a.hi);
  __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}
INLINE __m128i sixteen_bytes(I32 a) {
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a.lo, a.hi), 0xd8);
  return _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}
INLINE void store_bytes(int8_t* p, I32 a) { _mm_storeu_si128((__m128i*)p, sixteen_bytes(a)); }
INLINE void store_bytes(int8_t* p, I32 a, int count) {
  int8_t all[16];
  store_bytes(all, a);
  __builtin_memcpy(p, all, size_t(count));
}

// The entry of a table of sixteen that each lane's index names.
INLINE __m256 pick8(F32 table, __m256i index) {
  const __m256 low = _mm256_permutevar8x32_ps(table.lo, index), high = _mm256_permutevar8x32_ps(table.hi, index);
  return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
}
INLINE F32 pick(F32 table, I32 index) { return {pick8(table, index.lo), pick8(table, index.hi)}; }

// --- bytes
INLINE Quads load_quads(const void* p) {
  return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)p + 1)};
}
INLINE Quads every_byte(int8_t x) { return {_mm256_set1_epi8(x), _mm256_set1_epi8(x)}; }
INLINE Quads low_nibbles(Quads a) {
  const __m256i mask = _mm256_set1_epi8(0x0f);
  return {_mm256_and_si256(a.lo, mask), _mm256_and_si256(a.hi, mask)};
}
INLINE Quads high_nibbles(Quads a) {
  return low_nibbles({_mm256_srli_epi16(a.lo, 4), _mm256_srli_epi16(a.hi, 4)});
}
template <int PLACE>
INLINE Quads crumbs(Quads a) {
  const __m256i mask = _mm256_set1_epi8(0x03);
  return {_mm256_and_si256(_mm256_srli_epi16(a.lo, 2 * PLACE), mask),
          _mm256_and_si256(_mm256_srli_epi16(a.hi, 2 * PLACE), mask)};
}

INLINE void interleave_half(__m256i a, __m256i b, __m256i c, __m256i d, __m256i (&out)[4]) {
  const __m256i low_ab = _mm256_unpacklo_epi8(a, b), high_ab = _mm256_unpackhi_epi8(a, b);
  const __m256i low_cd = _mm256_unpacklo_epi8(c, d), high_cd = _mm256_unpackhi_epi8(c, d);
  out[0] = _mm256_unpacklo_epi16(low_ab, low_cd);
  out[1] = _mm256_unpackhi_epi16(low_ab, low_cd);
  out[2] = _mm256_unpacklo_epi16(high_ab, high_cd);
  out[3] = _mm256_unpackhi_epi16(high_ab, high_cd);
}
// Four tiles, byte by byte: a lane of what comes out has one byte of each. Within every 16 bytes g, whose four lanes are
// 4 g and behind, out[i] has bytes 4 i to 4 i + 3.
INLINE void interleave(const Quads (&in)[4], Quads (&out)[4]) {
  __m256i lo[4], hi[4];
  interleave_half(in[0].lo, in[1].lo, in[2].lo, in[3].lo, lo);
  interleave_half(in[0].hi, in[1].hi, in[2].hi, in[3].hi, hi);
  for (int i = 0; i < 4; ++i) out[i] = {lo[i], hi[i]};
}

// For each lane four of the sixteen bytes at p: those whose numbers are the lane's bytes in `places`.
INLINE I32 pick_bytes(const void* p, I32 places) {
  const __m256i bytes = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)p));
  return {_mm256_shuffle_epi8(bytes, places.lo), _mm256_shuffle_epi8(bytes, places.hi)};
}

#if RYZEN_VNNI
INLINE __m256i dot8(__m256i acc, __m256i a, __m256i b) { return _mm256_dpbusd_avx_epi32(acc, a, b); }
INLINE __m256i dot8_small(__m256i acc, __m256i a, __m256i b) { return dot8(acc, a, b); }
#else
// vpmaddubsw adds pairs of products in 16 bits, which two of 255 x 127 overflow. Half of the bytes at a time, as words.
INLINE __m256i dot8(__m256i acc, __m256i a, __m256i b) {
  const __m256i bytes = _mm256_set1_epi16(0x00ff);
  const __m256i even = _mm256_madd_epi16(_mm256_and_si256(a, bytes), _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8));
  const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(a, 8), _mm256_srai_epi16(b, 8));
  return _mm256_add_epi32(acc, _mm256_add_epi32(even, odd));
}
// Two products of at most 64 x 128 fit.
INLINE __m256i dot8_small(__m256i acc, __m256i a, __m256i b) {
  return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), _mm256_set1_epi16(1)));
}
#endif
INLINE I32 dot(I32 acc, Quads a, int32_t b) {
  const __m256i every = _mm256_set1_epi32(b);
  return {dot8(acc.lo, a.lo, every), dot8(acc.hi, a.hi, every)};
}
INLINE I32 dot_small(I32 acc, Quads a, int32_t b) {
  const __m256i every = _mm256_set1_epi32(b);
  return {dot8_small(acc.lo, a.lo, every), dot8_small(acc.hi, a.hi, every)};
}

INLINE int32_t four_at(const int8_t* p) {
  int32_t four;
  __builtin_memcpy(&four, p, sizeof four);
  return four;
}
INLINE I32 dot(I32 acc, Quads a, const int8_t* b) { return dot(acc, a, four_at(b)); }
INLINE I32 dot_small(I32 acc, Quads a, const int8_t* b) { return dot_small(acc, a, four_at(b)); }
INLINE I32 dot(I32 acc, Quads a, Quads b) { return {dot8(acc.lo, a.lo, b.lo), dot8(acc.hi, a.hi, b.hi)}; }

#include "tiles_math.h"
