// The tile vocabulary in AVX-512: sixteen lanes are one register. tiles_256.h has the same words in AVX2; kernels are
// written in these and compiled for both. Included by each_isa.h, inside a namespace, so it has no include guard.

constexpr int LANES = 16;       // of F32 and I32
constexpr int QUAD = 4;         // bytes that one lane of `dot` multiplies and adds
constexpr int TILE_BYTES = 64;  // LANES x QUAD

struct F32 {
  __m512 v;
};
struct I32 {
  __m512i v;
};
// LANES x QUAD bytes: four of each lane.
struct Quads {
  __m512i v;
};

INLINE __mmask16 first(int count) { return __mmask16((1u << count) - 1); }

// --- floats
INLINE F32 f32(float x) { return {_mm512_set1_ps(x)}; }
INLINE F32 load(const float* p) { return {_mm512_loadu_ps(p)}; }
INLINE F32 load(const float* p, int count) { return {_mm512_maskz_loadu_ps(first(count), p)}; }  // zeros behind count
INLINE void store(float* p, F32 x) { _mm512_storeu_ps(p, x.v); }
INLINE void store(float* p, F32 x, int count) { _mm512_mask_storeu_ps(p, first(count), x.v); }
INLINE F32 operator+(F32 a, F32 b) { return {_mm512_add_ps(a.v, b.v)}; }
INLINE F32 operator-(F32 a, F32 b) { return {_mm512_sub_ps(a.v, b.v)}; }
INLINE F32 operator*(F32 a, F32 b) { return {_mm512_mul_ps(a.v, b.v)}; }
INLINE F32 operator/(F32 a, F32 b) { return {_mm512_div_ps(a.v, b.v)}; }
INLINE F32 fma(F32 a, F32 b, F32 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
INLINE F32 max(F32 a, F32 b) { return {_mm512_max_ps(a.v, b.v)}; }
INLINE F32 min(F32 a, F32 b) { return {_mm512_min_ps(a.v, b.v)}; }
INLINE F32 abs(F32 a) { return {_mm512_abs_ps(a.v)}; }
INLINE F32 with_sign_of(F32 a, F32 sign) {
  const __m512 bit = _mm512_set1_ps(-0.0f);
  return {_mm512_or_ps(_mm512_andnot_ps(bit, a.v), _mm512_and_ps(bit, sign.v))};
}
// a's first lanes, zeros behind.
INLINE F32 first_lanes(F32 a, int count) { return {_mm512_maskz_mov_ps(first(count), a.v)}; }
INLINE F32 nearest(F32 a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
INLINE float sum(F32 a) { return _mm512_reduce_add_ps(a.v); }
INLINE F32 times_power_of_two(F32 a, F32 n) { return {_mm512_scalef_ps(a.v, n.v)}; }

// --- integers
INLINE I32 i32(int32_t x) { return {_mm512_set1_epi32(x)}; }
INLINE I32 load(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
INLINE void store(int32_t* p, I32 a) { _mm512_storeu_si512(p, a.v); }
INLINE I32 operator+(I32 a, I32 b) { return {_mm512_add_epi32(a.v, b.v)}; }
INLINE I32 operator-(I32 a, I32 b) { return {_mm512_sub_epi32(a.v, b.v)}; }
INLINE I32 operator&(I32 a, I32 b) { return {_mm512_and_si512(a.v, b.v)}; }
INLINE I32 operator>>(I32 a, I32 bits) { return {_mm512_srlv_epi32(a.v, bits.v)}; }
INLINE I32 max(I32 a, I32 b) { return {_mm512_max_epi32(a.v, b.v)}; }
INLINE int32_t largest(I32 a) { return _mm512_reduce_max_epi32(a.v); }
INLINE F32 to_f32(I32 a) { return {_mm512_cvtepi32_ps(a.v)}; }
INLINE I32 to_i32(F32 a) { return {_mm512_cvtps_epi32(a.v)}; }  // to nearest, ties to even
// The bits of |a|, which as integers are in the order of the magnitudes, with NaN above all.
INLINE I32 magnitude_bits(F32 a) { return {_mm512_castps_si512(_mm512_abs_ps(a.v))}; }
INLINE int32_t sum(I32 a) { return _mm512_reduce_add_epi32(a.v); }
INLINE void store_bytes(int8_t* p, I32 a) { _mm_storeu_si128((__m128i*)p, _mm512_cvtsepi32_epi8(a.v)); }
INLINE void store_bytes(int8_t* p, I32 a, int count) { _mm512_mask_cvtsepi32_storeu_epi8(p, first(count), a.v); }

// The entry of a table of sixteen that each lane's index names.
INLINE F32 pick(F32 table, I32 index) { return {_mm512_permutexvar_ps(index.v, table.v)}; }

// --- bytes
INLINE Quads load_quads(const void* p) { return {_mm512_loadu_si512(p)}; }
INLINE Quads every_byte(int8_t x) { return {_mm512_set1_epi8(x)}; }
INLINE Quads low_nibbles(Quads a) { return {_mm512_and_si512(a.v, _mm512_set1_epi8(0x0f))}; }
INLINE Quads high_nibbles(Quads a) { return low_nibbles({_mm512_srli_epi16(a.v, 4)}); }
// Two bits of every byte, from bit 2 * PLACE on.
template <int PLACE>
INLINE Quads crumbs(Quads a) {
  return {_mm512_and_si512(_mm512_srli_epi16(a.v, 2 * PLACE), _mm512_set1_epi8(0x03))};
}

// Four tiles, byte by byte: a lane of what comes out has one byte of each. Within every 16 bytes g, whose four lanes are
// 4 g and behind, out[i] has bytes 4 i to 4 i + 3.
INLINE void interleave(const Quads (&in)[4], Quads (&out)[4]) {
  const __m512i low01 = _mm512_unpacklo_epi8(in[0].v, in[1].v), high01 = _mm512_unpackhi_epi8(in[0].v, in[1].v);
  const __m512i low23 = _mm512_unpacklo_epi8(in[2].v, in[3].v), high23 = _mm512_unpackhi_epi8(in[2].v, in[3].v);
  out[0].v = _mm512_unpacklo_epi16(low01, low23);
  out[1].v = _mm512_unpackhi_epi16(low01, low23);
  out[2].v = _mm512_unpacklo_epi16(high01, high23);
  out[3].v = _mm512_unpackhi_epi16(high01, high23);
}

// For each lane four of the sixteen bytes at p: those whose numbers are the lane's bytes in `places`.
INLINE I32 pick_bytes(const void* p, I32 places) {
  return {_mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)p)), places.v)};
}

// acc + the sum over each lane's four of a (unsigned) times b's four (signed, the same in every lane).
INLINE I32 dot(I32 acc, Quads a, int32_t b) { return {_mm512_dpbusd_epi32(acc.v, a.v, _mm512_set1_epi32(b))}; }
// The same with b's four in memory. In assembly, because compilers broadcast them into registers ahead of time and then
// have none left for the sums; as an operand the broadcast is free.
INLINE I32 dot(I32 acc, Quads a, const int8_t* b) {
  __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(acc.v) : "v"(a.v), "m"(*(const int32_t(*)[1])b));
  return acc;
}
// Both where a's bytes are at most 64, which AVX2 does in fewer instructions; here there is nothing to gain.
INLINE I32 dot_small(I32 acc, Quads a, int32_t b) { return dot(acc, a, b); }
INLINE I32 dot_small(I32 acc, Quads a, const int8_t* b) { return dot(acc, a, b); }
// acc + the sum of each lane's four products of a's bytes (unsigned) with b's (signed).
INLINE I32 dot(I32 acc, Quads a, Quads b) { return {_mm512_dpbusd_epi32(acc.v, a.v, b.v)}; }

#include "tiles_math.h"
