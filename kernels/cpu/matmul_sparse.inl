#include "epilogue.inl"

// A tile's codes as the codes of its parts, lowest bits first.
template <int BITS>
INLINE void split(Quads tile, Quads (&parts)[8 / BITS]) {
  if constexpr (BITS == 8) {
    parts[0] = tile;
  } else if constexpr (BITS == 4) {
    parts[0] = low_nibbles(tile);
    parts[1] = high_nibbles(tile);
  } else {
    parts[0] = crumbs<0>(tile);
    parts[1] = crumbs<1>(tile);
    parts[2] = crumbs<2>(tile);
    parts[3] = crumbs<3>(tile);
  }
}

// Adds a group of channels to the sums (rows, outputs) of a strip, whose codes begin at `strip`. `now` are the group's
// channels, `next` those that come after it, `codes` (rows, STREAMS) what they are multiplied by.
template <int BITS>
INLINE void add_group(const StripedWeights& w, const uint8_t* strip, const int32_t* now, const int32_t* next,
                      const int8_t* codes, int64_t rows, int32_t* sums) {
  constexpr int SPLIT = 8 / BITS, QUADS = STREAMS / QUAD;
  constexpr int64_t FAR = 1024;  // bytes of each run: less is too late, and more is dropped; measured
  const int64_t bytes = w.channel_bytes(), outputs = w.outputs(), reach = bytes < FAR ? bytes : FAR;
  const uint8_t* from[STREAMS];
  const uint8_t* then[STREAMS];  // where the run goes on, as seen from `from`
  for (int c = 0; c < STREAMS; ++c) {
    from[c] = strip + now[c] * bytes;
    then[c] = strip + next[c] * bytes - bytes;
  }
  for (int64_t at = 0; at < bytes; at += TILE_BYTES) {
    const int64_t ahead = at + reach;
    for (int c = 0; c < STREAMS; ++c) __builtin_prefetch((ahead < bytes ? from[c] : then[c]) + ahead, 0, 2);
    Quads woven[QUADS][4];
    UNROLLED for (int q = 0; q < QUADS; ++q) {
      Quads tile[4];
      UNROLLED for (int c = 0; c < 4; ++c) tile[c] = load_quads(from[q * 4 + c] + at);
      interleave(tile, woven[q]);
    }
    int32_t* place = sums + at * SPLIT;
    UNROLLED for (int i = 0; i < 4; ++i) {
      Quads parts[QUADS][SPLIT];
      UNROLLED for (int q = 0; q < QUADS; ++q) split<BITS>(woven[q][i], parts[q]);
      UNROLLED for (int s = 0; s < SPLIT; ++s) {
        for (int64_t row = 0; row < rows; ++row) {
          int32_t* to = place + row * outputs + (s * 4 + i) * LANES;
          I32 sum = load(to);
          UNROLLED for (int q = 0; q < QUADS; ++q) {
            const int8_t* four = codes + row * STREAMS + q * QUAD;
            sum = BITS == 8 ? dot(sum, parts[q][s], four) : dot_small(sum, parts[q][s], four);
          }
          store(to, sum);
        }
      }
    }
  }
}

// The sums of integers of some blocks of a strip: (blocks, rows, outputs).
template <int BITS>
static void add_blocks(const StripedWeights& w, const ActiveChannels& x, int64_t strip, int64_t begin, int64_t end,
                       int32_t* sums) {
  constexpr int32_t MIDDLE = 1 << (BITS - 1);  // the zero point where none is stored
  const int64_t outputs = w.outputs();
  const uint8_t* codes = w.strip(strip) + w.codes_at();
  int32_t group = begin > 0 ? x.ends[begin - 1] : 0;
  const int32_t last = x.ends[end - 1] - 1;
  for (int64_t b = begin; b < end; ++b, sums += x.rows * outputs) {
    for (int64_t row = 0; row < x.rows; ++row) {
      const I32 offset = i32(w.zeros ? 0 : -MIDDLE * x.sums[row * w.blocks + b]);
      for (int64_t i = 0; i < outputs; i += LANES) store(sums + row * outputs + i, offset);
    }
    for (; group < x.ends[b]; ++group) {
      const int32_t* channels = x.channels + group * STREAMS;
      add_group<BITS>(w, codes, channels, group < last ? channels + STREAMS : channels,
                      x.codes + group * x.rows * STREAMS, x.rows, sums);
    }
  }
}

// Scales the sums of a tile's outputs for one row, and hands them to the epilogue. `sums` are those of the first block.
template <int BITS>
INLINE void finish_tile(const StripedWeights& w, const ActiveChannels& x, int64_t strip, int64_t tile, int64_t row,
                        const int32_t* sums, const Epilogue& e) {
  constexpr int VECTORS = 4 * 8 / BITS;
  const auto* scales = (const float*)w.strip(strip) + w.scales_at(tile, 0);
  F32 totals[VECTORS];
  UNROLLED for (int i = 0; i < VECTORS; ++i) totals[i] = f32(0.0f);
  for (int64_t b = 0; b < w.blocks; ++b, sums += x.rows * w.outputs()) {
    const float step = x.steps[row * w.blocks + b];
    UNROLLED for (int i = 0; i < VECTORS; ++i) {
      totals[i] = fma(to_f32(load(sums + i * LANES)), load(scales + i * LANES) * f32(step), totals[i]);
    }
    scales += VECTORS * LANES;
    if (!w.zeros) continue;
    const F32 sum = f32(-step * float(x.sums[row * w.blocks + b]));
    UNROLLED for (int i = 0; i < VECTORS; ++i) totals[i] = fma(sum, load(scales + i * LANES), totals[i]);
    scales += VECTORS * LANES;
  }
  float values[VECTORS * LANES];
  UNROLLED for (int i = 0; i < VECTORS; ++i) store(values + i * LANES, totals[i]);
  for (int64_t panel = 0; panel < w.tile_panels(); ++panel) {
    F32 halves[HALVES];
    for (int h = 0; h < HALVES; ++h) {
      float lanes[LANES];
      for (int lane = 0; lane < LANES; lane += 4)
        __builtin_memcpy(lanes + lane, values + w.place(panel * PANEL + h * LANES + lane), 4 * sizeof(float));
      halves[h] = load(lanes);
    }
    finish(e, row, strip * w.panels() + tile * w.tile_panels() + panel, halves);
  }
}

// Tiles of a strip whose sums (blocks, rows, outputs) are complete, to the output.
template <int BITS>
static void finish_tiles(const StripedWeights& w, const ActiveChannels& x, int64_t strip, int64_t begin, int64_t end,
                         const int32_t* sums, const Epilogue& e) {
  for (int64_t tile = begin; tile < end; ++tile) {
    for (int64_t row = 0; row < x.rows; ++row)
      finish_tile<BITS>(w, x, strip, tile, row, sums + row * w.outputs() + tile * w.tile_outputs(), e);
  }
}

static SparsePath sparse_path(int bits) {
  switch (bits) {
    case 2: return {add_blocks<2>, finish_tiles<2>};
    case 4: return {add_blocks<4>, finish_tiles<4>};
    default: return {add_blocks<8>, finish_tiles<8>};
  }
}

#undef UNROLLED
