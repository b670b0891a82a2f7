// Scores and sums over int8 and int4 caches as integer dot products, which are exact: AVX-512 VNNI only.
//
// A register's lanes are query rows as before, each row twice: the high and the low byte of its 15-bit queries, or of
// its 16-bit weights. Eight rows share one register (high bytes in the lower half), sixteen have two, thirty-two four.

// Rows from their two halves: high * 256 + low. Of eight rows both are in `parts`, of sixteen `low` has the others.
INLINE __m256i joined(__m512i parts) {
  const __m256i high = _mm512_castsi512_si256(parts), low = _mm512_extracti64x4_epi64(parts, 1);
  return _mm256_add_epi32(_mm256_slli_epi32(high, 8), low);
}
INLINE __m512i joined(__m512i high, __m512i low) { return _mm512_add_epi32(_mm512_slli_epi32(high, 8), low); }
INLINE F8 score_of(__m256i sum, const int32_t* correction) {
  return {_mm256_cvtepi32_ps(_mm256_sub_epi32(sum, _mm256_loadu_si256((const __m256i*)correction)))};
}
INLINE F32 score_of(__m512i sum, const int32_t* correction) {
  return {_mm512_cvtepi32_ps(_mm512_sub_epi32(sum, _mm512_loadu_si512(correction)))};
}
INLINE F8 as_floats(__m256i sum) { return {_mm256_cvtepi32_ps(sum)}; }
INLINE F32 as_floats(__m512i sum) { return {_mm512_cvtepi32_ps(sum)}; }

INLINE __m512i broadcast_quad(const void* quad) {
  int value;
  __builtin_memcpy(&value, quad, sizeof value);
  return _mm512_set1_epi32(value);
}

// sums + the sum over each lane's four of a (unsigned) times b's four (signed). In assembler because GCC 12 copies its
// accumulators around the intrinsic, two moves for every product.
INLINE void add_dot(__m512i& sums, __m512i a, __m512i b) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(a), "v"(b));
}
// The same where b is one quad for all lanes.
INLINE void add_dot(__m512i& sums, __m512i a, const uint8_t* quad) {
  __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sums) : "v"(a), "m"(*(const int32_t(*)[1])quad));
}

// A stored key as unsigned codes in the queries' order of channels, raised by 128, or by 8 at four bits.
INLINE void raise_key(const AttentionJob& job, const uint8_t* row, uint8_t* to) {
  const int dim = job.dim;
  if (job.format == CacheFormat::I8) {
    const __m512i sign = _mm512_set1_epi8(int8_t(0x80));
    int i = 0;
    for (; i + 64 <= dim; i += 64) {
      _mm512_storeu_si512(to + i, _mm512_xor_si512(_mm512_loadu_si512(row + i), sign));
    }
    if (i < dim) {
      const __mmask64 in = (__mmask64(1) << (dim - i)) - 1;
      _mm512_mask_storeu_epi8(to + i, in, _mm512_xor_si512(_mm512_maskz_loadu_epi8(in, row + i), sign));
    }
    return;
  }
  const __m256i nibble = _mm256_set1_epi8(0x0f);
  for (int i = 0; i < dim / 2; i += 32) {
    const __mmask32 in = dim / 2 - i < 32 ? (__mmask32(1) << (dim / 2 - i)) - 1 : ~__mmask32(0);
    const __m256i both = _mm256_maskz_loadu_epi8(in, row + i);
    _mm256_mask_storeu_epi8(to + i, in, _mm256_and_si256(both, nibble));
    _mm256_mask_storeu_epi8(to + dim / 2 + i, in, _mm256_and_si256(_mm256_srli_epi16(both, 4), nibble));
  }
}

// scores[key][lane] of KEYS keys.
template <typename V, int VECTORS, int KEYS>
INLINE void score_keys_in_integers(const uint8_t* keys, int dim, const uint8_t* queries, Ahead& ahead, float* scores) {
  constexpr int COUNT = Lanes<V>::COUNT, LANE_COUNT = COUNT * VECTORS, PARTS = LANE_COUNT / 8;
  __m512i sums[KEYS][PARTS];
#pragma GCC unroll 16
  for (int k = 0; k < KEYS; ++k) {
#pragma GCC unroll 4
    for (int p = 0; p < PARTS; ++p) sums[k][p] = _mm512_setzero_si512();
  }
  for (int c = 0; c < dim; c += QUAD) {
    ahead.turn();
    __m512i q[PARTS];
#pragma GCC unroll 4
    for (int p = 0; p < PARTS; ++p) q[p] = _mm512_loadu_si512(queries + c * PARTS * LANES + p * TILE_BYTES);
#pragma GCC unroll 16
    for (int k = 0; k < KEYS; ++k) {
      const __m512i key = broadcast_quad(keys + k * MOST_INTEGER_DIM + c);
#pragma GCC unroll 4
      for (int p = 0; p < PARTS; ++p) add_dot(sums[k][p], key, q[p]);
    }
  }
  const float* scales = (const float*)(queries + 2 * dim * LANE_COUNT);
  const int32_t* corrections = (const int32_t*)(scales + LANE_COUNT);
#pragma GCC unroll 16
  for (int k = 0; k < KEYS; ++k) {
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) {
      V score;
      if constexpr (PARTS == 1) {
        score = score_of(joined(sums[k][0]), corrections);
      } else {
        score = score_of(joined(sums[k][2 * v], sums[k][2 * v + 1]), corrections + v * COUNT);
      }
      store(scores + (k * VECTORS + v) * COUNT, score * Lanes<V>::at(scales + v * COUNT));
    }
  }
}

// --- weights

constexpr float ONE = 65535.0f;  // the weight 1

INLINE __m256i rounded_weight(F8 x) { return _mm256_cvtps_epi32(_mm256_mul_ps(x.v, _mm256_set1_ps(ONE))); }
INLINE __m512i rounded_weight(F32 x) { return _mm512_cvtps_epi32(_mm512_mul_ps(x.v, _mm512_set1_ps(ONE))); }

// Four keys' weights of below 2^16, as quads: for each lane the four high bytes, then the four low ones.
INLINE void store_quads(const __m256i* w, uint8_t* to) {
  const __m256i a = _mm256_or_si256(w[0], _mm256_slli_epi32(w[1], 16));
  const __m256i b = _mm256_or_si256(w[2], _mm256_slli_epi32(w[3], 16));
  // Lane i takes bytes 1 and 3 of a's lane i and of b's, lane 8 + i bytes 0 and 2.
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7);
  const __m512i bytes = _mm512_mask_blend_epi32(0xff00, _mm512_set1_epi32(0x43410301), _mm512_set1_epi32(0x42400200));
  const __m512i place = _mm512_add_epi32(bytes, _mm512_mullo_epi32(lane, _mm512_set1_epi32(0x04040404)));
  _mm512_storeu_si512(to, _mm512_permutex2var_epi8(_mm512_castsi256_si512(a), place, _mm512_castsi256_si512(b)));
}
INLINE void store_quads(const __m512i* w, uint8_t* to) {
  const __m512i a = _mm512_or_si512(w[0], _mm512_slli_epi32(w[1], 16));
  const __m512i b = _mm512_or_si512(w[2], _mm512_slli_epi32(w[3], 16));
  const __m512i low = _mm512_set1_epi32(0x00ff00ff);
  // Bytes 0 and 2 of both, in the order 0, 2 of a, 0, 2 of b.
  const __m512i order = _mm512_set4_epi32(0x0f0d0e0c, 0x0b090a08, 0x07050604, 0x03010200);
  const __m512i lows = _mm512_or_si512(_mm512_and_si512(a, low), _mm512_slli_epi32(_mm512_and_si512(b, low), 8));
  const __m512i highs =
      _mm512_or_si512(_mm512_and_si512(_mm512_srli_epi32(a, 8), low), _mm512_andnot_si512(low, b));
  _mm512_storeu_si512(to, _mm512_shuffle_epi8(highs, order));
  _mm512_storeu_si512(to + TILE_BYTES, _mm512_shuffle_epi8(lows, order));
}
INLINE F8 sum_of(F8, const __m256i* w) {
  return as_floats(_mm256_add_epi32(_mm256_add_epi32(w[0], w[1]), _mm256_add_epi32(w[2], w[3])));
}
INLINE F32 sum_of(F32, const __m512i* w) {
  return as_floats(_mm512_add_epi32(_mm512_add_epi32(w[0], w[1]), _mm512_add_epi32(w[2], w[3])));
}

// As `weigh`, with weights and their sum in units of 1 / ONE, and weights as quads: (keys / QUAD, VECTORS).
template <typename V, int VECTORS>
INLINE void weigh_in_integers(const float* scores, int keys, const Partial& part, float* shrink, uint8_t* weights) {
  constexpr int COUNT = Lanes<V>::COUNT, STRIDE = COUNT * VECTORS, QUAD_BYTES = 2 * COUNT * QUAD;
  for (int v = 0; v < VECTORS; ++v) {
    const float* of = scores + v * COUNT;
    const V reference = raise_largest<V>(of, keys, STRIDE, part.largest + v * COUNT, shrink + v * COUNT);
    V sum = Lanes<V>::at(part.sum + v * COUNT) * Lanes<V>::at(shrink + v * COUNT);
    for (int k = 0; k < keys; k += QUAD) {
      decltype(rounded_weight(V{})) w[QUAD];
#pragma GCC unroll 4
      for (int i = 0; i < QUAD; ++i) {
        w[i] = rounded_weight(exp2_below(Lanes<V>::at(of + (k + i) * STRIDE) - reference));
      }
      sum = sum + sum_of(V{}, w);
      store_quads(w, weights + (k / QUAD * VECTORS + v) * QUAD_BYTES);
    }
    store(part.sum + v * COUNT, sum);
  }
}

// --- values

// Four rows of bytes, 4 x 16, as sixteen quads of one column each: columns 0-3, 4-7, 8-11, 12-15.
struct Interleaved {
  __m512i columns[4];
};
INLINE Interleaved interleaved(__m512i a, __m512i b, __m512i c, __m512i d) {
  const __m512i ab_low = _mm512_unpacklo_epi8(a, b), ab_high = _mm512_unpackhi_epi8(a, b);
  const __m512i cd_low = _mm512_unpacklo_epi8(c, d), cd_high = _mm512_unpackhi_epi8(c, d);
  return {{_mm512_unpacklo_epi16(ab_low, cd_low), _mm512_unpackhi_epi16(ab_low, cd_low),
           _mm512_unpacklo_epi16(ab_high, cd_high), _mm512_unpackhi_epi16(ab_high, cd_high)}};
}

// Quads of the signed codes of a row's low or high nibbles.
INLINE __m512i signed_nibbles(__m512i codes) {
  return _mm512_sub_epi8(_mm512_and_si512(codes, _mm512_set1_epi8(0x0f)), _mm512_set1_epi8(8));
}

// Stored bytes are interleaved 64 at a time within the four parts of a register, so places follow this order. The same
// walk tells which channel is at which place (`value_order`).
template <typename Place>
INLINE void walk_places(int row_bytes, const Place& place) {
  for (int begin = 0; begin < row_bytes; begin += 64) {
    const int bytes = row_bytes - begin < 64 ? row_bytes - begin : 64;
    for (int column = 0; column < 4; ++column) {
      for (int part = 0; part < 4; ++part) {
        const int at = part * 16 + column * 4;
        if (at < bytes) place(begin + at);
      }
    }
  }
}

static void value_order(CacheFormat format, int dim, int* order) {
  int place = 0;
  walk_places(format == CacheFormat::I4 ? dim / 2 : dim, [&](int byte) {
    const bool packed = format == CacheFormat::I4;
    for (int half = 0; half < (packed ? 2 : 1); ++half) {
      for (int i = 0; i < QUAD; ++i) order[place++] = packed ? 2 * (byte + i) + half : byte + i;
    }
  });
}

// Four stored rows of values as quads, dim of them, in `value_order`.
INLINE void interleave_rows(const AttentionJob& job, const uint8_t* const* rows, uint8_t* to) {
  const int row_bytes = int(job.row_bytes);
  for (int begin = 0; begin < row_bytes; begin += 64) {
    const int bytes = row_bytes - begin < 64 ? row_bytes - begin : 64;
    const __mmask64 in = bytes < 64 ? (__mmask64(1) << bytes) - 1 : ~__mmask64(0);
    const Interleaved all = interleaved(
        _mm512_maskz_loadu_epi8(in, rows[0] + begin), _mm512_maskz_loadu_epi8(in, rows[1] + begin),
        _mm512_maskz_loadu_epi8(in, rows[2] + begin), _mm512_maskz_loadu_epi8(in, rows[3] + begin));
#pragma GCC unroll 4
    for (int column = 0; column < 4; ++column) {
      // Of each part of 16 bytes those four columns that lie within the row: a prefix of the register's four lanes.
      const int parts = (bytes - column * 4 + 15) / 16;
      if (parts <= 0) continue;
      const __mmask16 lanes = __mmask16((1u << (4 * parts)) - 1);
      const __m512i quads = all.columns[column];
      if (job.format == CacheFormat::I8) {
        _mm512_mask_storeu_epi32(to, lanes, quads);
        to += parts * 16;
        continue;
      }
      // Each 128-bit lane of packed codes becomes two: its low nibbles, then its high ones.
      const __m512i low = signed_nibbles(quads), high = signed_nibbles(_mm512_srli_epi16(quads, 4));
      const __m512i front = _mm512_permutex2var_epi64(low, _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), high);
      const __m512i back = _mm512_permutex2var_epi64(low, _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15), high);
      _mm512_mask_storeu_epi32(to, __mmask16(parts > 1 ? 0xffff : 0x00ff), front);
      if (parts > 2) _mm512_mask_storeu_epi32(to + TILE_BYTES, __mmask16(parts > 3 ? 0xffff : 0x00ff), back);
      to += parts * 32;
    }
  }
}

// sums[place][lane] = sums * shrink + sum over keys of weight * value, for PLACES places.
template <typename V, int VECTORS, int PLACES>
INLINE void add_places(const uint8_t* weights, const uint8_t* values, int dim, int quads, const float* shrink,
                       Ahead& ahead, float* sums) {
  constexpr int COUNT = Lanes<V>::COUNT, PARTS = COUNT * VECTORS / 8;
  __m512i added[PLACES][PARTS];
#pragma GCC unroll 16
  for (int i = 0; i < PLACES; ++i) {
#pragma GCC unroll 4
    for (int p = 0; p < PARTS; ++p) added[i][p] = _mm512_setzero_si512();
  }
  for (int quad = 0; quad < quads; ++quad) {
    ahead.turn();
    __m512i w[PARTS];
#pragma GCC unroll 4
    for (int p = 0; p < PARTS; ++p) w[p] = _mm512_loadu_si512(weights + (quad * PARTS + p) * TILE_BYTES);
#pragma GCC unroll 16
    for (int i = 0; i < PLACES; ++i) {
      const uint8_t* quad_of_values = values + (quad * dim + i) * QUAD;
      if constexpr (PARTS == 1) {
        add_dot(added[i][0], w[0], quad_of_values);
      } else {
        const __m512i value = broadcast_quad(quad_of_values);
#pragma GCC unroll 4
        for (int p = 0; p < PARTS; ++p) add_dot(added[i][p], w[p], value);
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < PLACES; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) {
      float* at = sums + (i * VECTORS + v) * COUNT;
      V sum;
      if constexpr (PARTS == 1) {
        sum = as_floats(joined(added[i][0]));
      } else {
        sum = as_floats(joined(added[i][2 * v], added[i][2 * v + 1]));
      }
      store(at, fma(Lanes<V>::at(at), Lanes<V>::at(shrink + v * COUNT), sum));
    }
  }
}

template <typename V, int VECTORS>
INLINE void attend_integers(const AttentionJob& job, const Stored& keys, const Stored& values, const uint8_t* queries,
                            const Sight& sight, int begin, int end, int64_t rows, const AttendScratch& scratch,
                            const Partial& part) {
  constexpr int LANE_COUNT = Lanes<V>::COUNT * VECTORS;
  constexpr int KEYS = 128 / LANE_COUNT, PLACES = KEYS;  // sixteen registers
  alignas(64) float shrink[LANE_COUNT];
  const int dim = job.dim, scored = (end - begin + GROUP_KEYS - 1) / GROUP_KEYS * GROUP_KEYS;
  auto row_at = [&](const Stored& stored, int64_t at) {  // no key behind the last is seen, so any row will do
    return stored.data + (at < rows ? at : rows - 1) * job.row_bytes;
  };
  for (int k = 0; k < scored; k += GROUP_KEYS) {
    Ahead ahead = Ahead::of(job, values, begin + k, GROUP_KEYS, GROUP_KEYS / KEYS * (dim / QUAD));
    for (int i = 0; i < GROUP_KEYS; ++i) {
      raise_key(job, row_at(keys, begin + k + i), scratch.keys + i * MOST_INTEGER_DIM);
    }
    for (int i = 0; i < GROUP_KEYS; i += KEYS) {
      score_keys_in_integers<V, VECTORS, KEYS>(scratch.keys + i * MOST_INTEGER_DIM, dim, queries,
                                               ahead, scratch.scores + (k + i) * LANE_COUNT);
    }
  }
  cap_and_mask<V, VECTORS>(job, sight, begin, begin + scored, scratch.scores);
  weigh_in_integers<V, VECTORS>(scratch.scores, scored, part, shrink, scratch.weights);
  const int quads = (end - begin + QUAD - 1) / QUAD;
  for (int quad = 0; quad < quads; ++quad) {
    const uint8_t* four[QUAD];
    for (int i = 0; i < QUAD; ++i) four[i] = row_at(values, begin + quad * QUAD + i);
    interleave_rows(job, four, scratch.values + quad * dim * QUAD);
  }
  Ahead ahead = Ahead::of(job, keys, end, BLOCK_KEYS, int64_t{quads} * ((dim + PLACES - 1) / PLACES));
  int place = 0;
  for (; place + PLACES <= dim; place += PLACES) {
    add_places<V, VECTORS, PLACES>(scratch.weights, scratch.values + place * QUAD, dim, quads, shrink, ahead,
                                   scratch.sums + place * LANE_COUNT);
  }
  if (place < dim) {  // a multiple of eight
    constexpr int REST = PLACES < 8 ? PLACES : 8;
    add_places<V, VECTORS, REST>(scratch.weights, scratch.values + place * QUAD, dim, quads, shrink, ahead,
                                 scratch.sums + place * LANE_COUNT);
  }
}

// sums[place][lane] -> out[lane][channel], in the values' own units, and the sum of the weights likewise. Integer
// weights cannot be NaN: a query row that is has it in its scale, and hands it on here.
INLINE void take_sums(const AttentionJob& job, const uint8_t* queries, const float* scale, int lanes, const float* sums,
                      const Partial& part) {
  const float* query_scales = (const float*)(queries + 2 * job.dim * lanes);
  for (int lane = 0; lane < lanes; ++lane) {
    part.sum[lane] *= query_scales[lane] == query_scales[lane] ? 1.0f / ONE : query_scales[lane];
  }
  for (int place = 0; place < job.dim; ++place) {
    const int channel = job.value_order[place];
    const float unit = scale[channel] * (1.0f / ONE);
    for (int lane = 0; lane < lanes; ++lane) part.out[lane * job.dim + channel] = sums[place * lanes + lane] * unit;
  }
}
