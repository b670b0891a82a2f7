// Rows of CodebookEmbedding in vectors.

constexpr int CHANNELS_AT_ONCE = 512;  // decoded codes and a second stage's entries stay in the first-level cache

// Where the codes of LANES successive ones lie, which begin at a byte.
struct Unpacking {
  I32 places, shifts, mask;
};

INLINE Unpacking unpacking(int bits) {
  int32_t places[LANES], shifts[LANES];
  for (int lane = 0; lane < LANES; ++lane) {
    const int byte = lane * bits / 8;
    const int next = byte < 15 ? byte + 1 : byte;  // a code lies in two bytes at most; in the last one it is whole
    places[lane] = byte | next << 8 | int32_t(0x80800000u);  // two zero bytes above
    shifts[lane] = lane * bits % 8;
  }
  return {load(places), load(shifts), i32((1 << bits) - 1)};
}

// The codes [begin, begin + count), begin being a multiple of 8, and up to LANES - 1 more.
INLINE void unpack(const CodebookRow& row, const Unpacking& how, int begin, int count, int32_t* codes) {
  const uint8_t* from = row.codes + (long long)begin * row.bits / 8;
  for (int i = 0; i < count; i += LANES, from += LANES * row.bits / 8) {
    uint8_t last[16] = {};
    const uint8_t* source = from;
    if (row.end - from < 16) {
      __builtin_memcpy(last, from, size_t(row.end - from));
      source = last;
    }
    store(codes + i, (pick_bytes(source, how.places) >> how.shifts) & how.mask);
  }
}

template <int DIM>
INLINE void copy_entries(const float* codebook, const int32_t* codes, int count, float* out) {
  for (int i = 0; i < count; ++i) __builtin_memcpy(out + i * DIM, codebook + codes[i] * DIM, DIM * sizeof(float));
}

// One stage's entries for `channels` channels from `channel` on.
INLINE void decode(const CodebookRow& row, const Unpacking& how, int stage, int channel, int channels, float* out) {
  int32_t buffer[CHANNELS_AT_ONCE + 2 * LANES];
  const int first_code = (stage * row.C + channel) / row.dim, aligned = first_code / 8 * 8, count = channels / row.dim;
  unpack(row, how, aligned, first_code + count - aligned, buffer);
  const int32_t* codes = buffer + (first_code - aligned);
  const float* codebook = row.codebook + (stage << row.bits) * row.dim;
  if (row.dim == 1 && row.bits <= 4) {
    const F32 table = load(codebook, 1 << row.bits);
    int i = 0;
    for (; i + LANES <= count; i += LANES) store(out + i, pick(table, load(codes + i)));
    if (i < count) store(out + i, pick(table, load(codes + i)), count - i);
    return;
  }
  switch (row.dim) {
    case 1: return copy_entries<1>(codebook, codes, count, out);
    case 2: return copy_entries<2>(codebook, codes, count, out);
    case 4: return copy_entries<4>(codebook, codes, count, out);
    default: return copy_entries<8>(codebook, codes, count, out);
  }
}

// out = (out + second) * scale; no second is null.
INLINE void finish(float* out, const float* second, int count, float scale) {
  const F32 factor = f32(scale);
  int i = 0;
  for (; i + LANES <= count; i += LANES) {
    const F32 x = load(out + i);
    store(out + i, (second ? x + load(second + i) : x) * factor);
  }
  if (i < count) {
    const F32 x = load(out + i, count - i);
    store(out + i, (second ? x + load(second + i, count - i) : x) * factor, count - i);
  }
}

static void codebook_row(const CodebookRow& row) {
  const Unpacking how = unpacking(row.bits);
  for (int begin = 0; begin < row.C; begin += CHANNELS_AT_ONCE) {
    const int count = row.C - begin < CHANNELS_AT_ONCE ? row.C - begin : CHANNELS_AT_ONCE;
    float second[CHANNELS_AT_ONCE];
    decode(row, how, 0, begin, count, row.out + begin);
    if (row.stages == 2) decode(row, how, 1, begin, count, second);
    if (row.stages == 1 && !row.scales) continue;
    for (int i = 0; i < count;) {
      const int group = (begin + i) / row.scale_group, left = (group + 1) * row.scale_group - (begin + i);
      const int size = left < count - i ? left : count - i;
      finish(row.out + begin + i, row.stages == 2 ? second + i : nullptr, size, row.scales ? row.scales[group] : 1.0f);
      i += size;
    }
  }
}
