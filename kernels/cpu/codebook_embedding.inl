// Rows of CodebookEmbedding in vectors.

constexpr int CHANNELS_AT_ONCE = 512;  // both stages' entries for so many stay in the first-level cache
constexpr int64_t BYTES_AHEAD = 1024;  // of the next row, fetched while one is decoded; the processor guesses the rest

INLINE F32 get(const float* p, int count) { return count == LANES ? load(p) : load(p, count); }
INLINE void put(float* p, F32 x, int count) { return count == LANES ? store(p, x) : store(p, x, count); }

#if RYZEN_WIDE

constexpr int CODES_AT_ONCE = 64;

// Where the codes of 64 successive ones lie, which begin at a byte: every eight of them fill `bits` bytes, which go
// into a quadword of their own.
struct Unpacking {
  __m512i places, shifts, mask;
};

INLINE Unpacking unpacking(int bits) {
  uint8_t places[64], shifts[64];
  for (int i = 0; i < 64; ++i) {
    places[i] = uint8_t(i / 8 * bits + (i % 8 < bits ? i % 8 : 0));
    shifts[i] = uint8_t(i % 8 * bits);
  }
  return {_mm512_loadu_si512(places), _mm512_loadu_si512(shifts), _mm512_set1_epi8(char((1 << bits) - 1))};
}

INLINE void unpack_some(const uint8_t* from, const uint8_t* end, int bits, const Unpacking& how, uint8_t* codes) {
  const int64_t size = end - from < 8 * bits ? end - from : 8 * bits;
  const __m512i packed = _mm512_maskz_loadu_epi8(~__mmask64{0} >> (64 - size), from);
  const __m512i apart = _mm512_permutexvar_epi8(how.places, packed);
  _mm512_storeu_si512(codes, _mm512_and_si512(_mm512_multishift_epi64_epi8(how.shifts, apart), how.mask));
}

// Entries for look-ups by codes: of up to two channels the first bytes of up to 256 floats, then the second ones and so
// on. Each quarter of a float is looked up by itself.
struct Entries {
  __m512i quarters[2][4][4];
};

INLINE bool looked_up(const CodebookTable& table) { return table.dim <= 2; }

INLINE void split_entries(const float* codebook, int count, int dim, Entries& entries) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (int i = 0; i < count; i += LANES) {
    const int size = (count - i < LANES ? count - i : LANES) * dim;
    const F32 floats[2] = {load(codebook + i * dim, size < LANES ? size : LANES),
                           load(codebook + i * dim + LANES, size < LANES ? 0 : size - LANES)};
    for (int channel = 0; channel < dim; ++channel) {
      const __m512i strided = _mm512_mullo_epi32(lane, _mm512_set1_epi32(dim));
      const __m512i from = _mm512_add_epi32(strided, _mm512_set1_epi32(channel));
      const __m512i bits = _mm512_castps_si512(_mm512_permutex2var_ps(floats[0].v, from, floats[1].v));
      auto* bytes = (uint8_t(*)[256])entries.quarters[channel];
      for (int quarter = 0; quarter < 4; ++quarter)
        _mm_storeu_si128((__m128i*)(bytes[quarter] + i), _mm512_cvtepi32_epi8(_mm512_srli_epi32(bits, 8 * quarter)));
    }
  }
}

INLINE __m512i quarter_of(const __m512i bytes[4], __m512i codes) {
  const __m512i low = _mm512_permutex2var_epi8(bytes[0], codes, bytes[1]);
  const __m512i high = _mm512_permutex2var_epi8(bytes[2], codes, bytes[3]);
  return _mm512_mask_blend_epi8(_mm512_movepi8_mask(codes), low, high);
}

// Four vectors of floats. Bytes interleave within 128 bits: the floats of 16 successive codes go to all four vectors,
// four to each.
INLINE void look_up_channel(const __m512i quarters[4][4], __m512i codes, F32 floats[4]) {
  __m512i bytes[4];
  for (int quarter = 0; quarter < 4; ++quarter) bytes[quarter] = quarter_of(quarters[quarter], codes);
  const __m512i lower[2] = {_mm512_unpacklo_epi8(bytes[0], bytes[1]), _mm512_unpackhi_epi8(bytes[0], bytes[1])};
  const __m512i upper[2] = {_mm512_unpacklo_epi8(bytes[2], bytes[3]), _mm512_unpackhi_epi8(bytes[2], bytes[3])};
  for (int i = 0; i < 2; ++i) {
    floats[2 * i].v = _mm512_castsi512_ps(_mm512_unpacklo_epi16(lower[i], upper[i]));
    floats[2 * i + 1].v = _mm512_castsi512_ps(_mm512_unpackhi_epi16(lower[i], upper[i]));
  }
}

// Writes whole vectors, so `out` has room for the channels of CODES_AT_ONCE more codes.
INLINE void look_up(const Entries& entries, int dim, const uint8_t* codes, int count, float* out) {
  const __m512i spread = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  for (int i = 0; i < count; i += CODES_AT_ONCE, out += CODES_AT_ONCE * dim) {
    const __m512i some = _mm512_permutexvar_epi32(spread, _mm512_loadu_si512(codes + i));
    F32 one[4], other[4];
    look_up_channel(entries.quarters[0], some, one);
    if (dim == 2) look_up_channel(entries.quarters[1], some, other);
    for (int k = 0; k < 4; ++k) {
      if (dim == 1) {
        store(out + k * LANES, one[k]);
      } else {
        _mm512_storeu_ps(out + 2 * k * LANES, _mm512_permutex2var_ps(one[k].v, low, other[k].v));
        _mm512_storeu_ps(out + (2 * k + 1) * LANES, _mm512_permutex2var_ps(one[k].v, high, other[k].v));
      }
    }
  }
}

#else

constexpr int CODES_AT_ONCE = 16;

// Where the codes of 16 successive ones lie, which begin at a byte.
struct Unpacking {
  I32 places, shifts, mask;
};

INLINE Unpacking unpacking(int bits) {
  int32_t places[16], shifts[16];
  for (int i = 0; i < 16; ++i) {
    const int byte = i * bits / 8;
    const int next = byte < 15 ? byte + 1 : byte;  // a code lies in two bytes at most; in the last one it is whole
    places[i] = byte | next << 8 | int32_t(0x80800000u);  // two zero bytes above
    shifts[i] = i * bits % 8;
  }
  return {load(places), load(shifts), i32((1 << bits) - 1)};
}

INLINE void unpack_some(const uint8_t* from, const uint8_t* end, int, const Unpacking& how, uint8_t* codes) {
  uint8_t last[16] = {};
  if (end - from < 16) {
    __builtin_memcpy(last, from, size_t(end - from));
    from = last;
  }
  const I32 wide = (pick_bytes(from, how.places) >> how.shifts) & how.mask;
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(wide.lo, wide.hi), 0xd8);
  const __m128i low = _mm256_castsi256_si128(words), high = _mm256_extracti128_si256(words, 1);
  _mm_storeu_si128((__m128i*)codes, _mm_packus_epi16(low, high));
}

// Entries for look-ups by codes, where a register holds all of them.
struct Entries {
  F32 all;
};

INLINE bool looked_up(const CodebookTable& table) { return table.dim == 1 && table.bits <= 4; }

INLINE void split_entries(const float* codebook, int count, int, Entries& entries) {
  entries.all = load(codebook, count);
}

// Writes whole vectors, so `out` has room for CODES_AT_ONCE more floats.
INLINE void look_up(const Entries& entries, int, const uint8_t* codes, int count, float* out) {
  for (int i = 0; i < count; i += CODES_AT_ONCE) {
    const __m128i sixteen = _mm_loadu_si128((const __m128i*)(codes + i));
    const I32 index = {_mm256_cvtepu8_epi32(sixteen), _mm256_cvtepu8_epi32(_mm_srli_si128(sixteen, 8))};
    store(out + i, pick(entries.all, index));
  }
}

#endif

// What is the same for all rows of a call.
struct Decoding {
  Unpacking unpacking;
  Entries entries[2];  // of each stage, where they are looked up
};

template <int DIM>
INLINE void copy_entries(const float* codebook, const uint8_t* codes, int count, float* out) {
  for (int i = 0; i < count; ++i) __builtin_memcpy(out + i * DIM, codebook + codes[i] * DIM, DIM * sizeof(float));
}

// One stage's entries for `channels` channels from `channel` on, into `out`, which has room as look_up wants it.
INLINE void decode(const CodebookTable& table, const Decoding& how, const uint8_t* row, int stage, int channel,
                   int channels, float* out) {
  uint8_t buffer[CHANNELS_AT_ONCE + 2 * CODES_AT_ONCE];
  const int first = (stage * table.C + channel) / table.dim, count = channels / table.dim;
  const int aligned = first / 8 * 8;  // begins at a byte
  const uint8_t* from = row + int64_t{aligned} * table.bits / 8;
  for (int i = 0; i < first + count - aligned; i += CODES_AT_ONCE, from += CODES_AT_ONCE / 8 * table.bits)
    unpack_some(from, table.end, table.bits, how.unpacking, buffer + i);
  const uint8_t* codes = buffer + (first - aligned);
  const float* codebook = table.codebook + (stage << table.bits) * table.dim;
  if (looked_up(table)) return look_up(how.entries[stage], table.dim, codes, count, out);
  switch (table.dim) {
    case 1: return copy_entries<1>(codebook, codes, count, out);
    case 2: return copy_entries<2>(codebook, codes, count, out);
    case 4: return copy_entries<4>(codebook, codes, count, out);
    default: return copy_entries<8>(codebook, codes, count, out);
  }
}

INLINE void fetch(const void* from, int64_t size) {
  for (int64_t i = 0; i < size; i += 64) __builtin_prefetch((const uint8_t*)from + i);
}

// Channels of one scale, on their way from entries to `out`; what is null is left out.
struct Finish {
  const float *first, *second, *gain, *offset;
  float scale;
  float* out;
};

// `count` channels from i on, at most a vector.
INLINE void finish_some(const Finish& f, int i, int count) {
  F32 x = load(f.first + i);
  if (f.second) x = x + load(f.second + i);
  x = x * f32(f.scale);
  if (f.gain) x = x * get(f.gain + i, count);
  if (f.offset) x = x + get(f.offset + i, count);
  put(f.out + i, x, count);
}

INLINE void finish(const Finish& f, int count) {
  int i = 0;
  for (; i + LANES <= count; i += LANES) finish_some(f, i, LANES);
  if (i < count) finish_some(f, i, count - i);
}

INLINE void decode_row(const CodebookTable& table, const Decoding& how, int64_t id, float* out) {
  const uint8_t* row = table.codes + id * table.row_bytes;
  for (int begin = 0; begin < table.C; begin += CHANNELS_AT_ONCE) {
    const int count = table.C - begin < CHANNELS_AT_ONCE ? table.C - begin : CHANNELS_AT_ONCE;
    float first[CHANNELS_AT_ONCE + 2 * CODES_AT_ONCE], second[CHANNELS_AT_ONCE + 2 * CODES_AT_ONCE];
    fetch(out + begin, count * 4);  // what stores wait for would hold up all that comes after them
    decode(table, how, row, 0, begin, count, first);
    if (table.stages == 2) decode(table, how, row, 1, begin, count, second);
    for (int i = 0, group = begin / table.group; i < count; ++group) {
      const int end = (group + 1) * table.group - begin, size = (end < count ? end : count) - i;
      Finish f{};
      f.first = first + i;
      if (table.stages == 2) f.second = second + i;
      if (table.gain) f.gain = table.gain + begin + i;
      if (table.offset) f.offset = table.offset + begin + i;
      f.scale = table.scales ? _cvtsh_ss(table.scales[id * table.groups() + group]) : 1.0f;
      f.out = out + begin + i;
      finish(f, size);
      i += size;
    }
  }
}

INLINE void widen(const uint16_t* from, int count, float* out) {
  int i = 0;
  for (; i + 8 <= count; i += 8)
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(from + i))));
  for (; i < count; ++i) out[i] = _cvtsh_ss(from[i]);
}

INLINE int64_t slot_of(const CodebookTable& table, int64_t id) { return table.slots ? table.slots[id] : -1; }

INLINE void copy_kept(const CodebookTable& table, int64_t slot, float* out) {
  const uint8_t* row = table.kept + slot * table.kept_row_bytes();
  if (table.kept_halves) return widen((const uint16_t*)row, table.C, out);
  __builtin_memcpy(out, row, size_t(table.kept_row_bytes()));
}

INLINE void fetch_row(const CodebookTable& table, int64_t id) {
  const int64_t slot = slot_of(table, id), size = slot < 0 ? table.row_bytes : table.kept_row_bytes();
  const uint8_t* row = slot < 0 ? table.codes + id * size : table.kept + slot * size;
  fetch(row, size < BYTES_AHEAD ? size : BYTES_AHEAD);
  if (table.scales) fetch(table.scales + id * table.groups(), table.groups() * 2);
}

static void codebook_rows(const CodebookTable& table, const int64_t* ids, int64_t count, float* out) {
  Decoding how;
  how.unpacking = unpacking(table.bits);
  const int entries = 1 << table.bits;
  for (int stage = 0; looked_up(table) && stage < table.stages; ++stage)
    split_entries(table.codebook + stage * entries * table.dim, entries, table.dim, how.entries[stage]);
  for (int64_t i = 0; i < count; ++i, out += table.C) {
    if (i + 1 < count) fetch_row(table, ids[i + 1]);
    const int64_t slot = slot_of(table, ids[i]);
    if (slot >= 0) {
      copy_kept(table, slot, out);
    } else {
      decode_row(table, how, ids[i], out);
    }
  }
}
