#include "epilogue.inl"
#include "round_activations.inl"

// The product in tiles. R rows of activations times a panel are R x HALVES integer sums; every loop over them is
// UNROLLED, or they would not stay in registers.

// The tiles of both halves as quads of codes, the earlier in k first.
template <int BITS>
INLINE void unpack(const uint8_t* tiles, Quads (&quads)[8 / BITS][HALVES]) {
  UNROLLED for (int h = 0; h < HALVES; ++h) {
    const Quads tile = load_quads(tiles + h * TILE_BYTES);
    if constexpr (BITS == 8) {
      quads[0][h] = tile;
    } else if constexpr (BITS == 4) {
      quads[0][h] = low_nibbles(tile);
      quads[1][h] = high_nibbles(tile);
    } else {
      quads[0][h] = crumbs<0>(tile);
      quads[1][h] = crumbs<1>(tile);
      quads[2][h] = crumbs<2>(tile);
      quads[3][h] = crumbs<3>(tile);
    }
  }
}

// Products of R rows, which are `row` and those behind it, with a panel. `codes` is where the first row's are, `group`
// how many rows lie interleaved there. Nothing is fetched ahead of time: the panels lie in the order in which they are
// read, and the processor's own fetching does that best.
template <int BITS, int R>
INLINE void multiply(const PackedWeights& w, const RoundedRows& x, const int8_t* codes, int64_t group, int64_t row,
                     const uint8_t* panel, F32 (&sums)[R][HALVES]) {
  constexpr int SPLIT = 8 / BITS;
  constexpr int32_t MIDDLE = 1 << (BITS - 1);  // the zero point where none is stored
  const int64_t tiles = w.block / (QUAD * SPLIT);
  UNROLLED for (int r = 0; r < R; ++r) {
    UNROLLED for (int h = 0; h < HALVES; ++h) sums[r][h] = f32(0.0f);
  }
  for (int64_t b = 0; b < w.blocks; ++b) {
    const auto* scales = (const float*)panel;
    I32 whole[R][HALVES];
    UNROLLED for (int r = 0; r < R; ++r) {
      const int32_t offset = w.zeros ? 0 : -MIDDLE * x.sums[(row + r) * x.blocks + b];
      UNROLLED for (int h = 0; h < HALVES; ++h) whole[r][h] = i32(offset);
    }
    panel += w.tiles_at();
    for (int64_t t = 0; t < tiles; ++t) {
      Quads quads[SPLIT][HALVES];
      unpack<BITS>(panel, quads);
      UNROLLED for (int s = 0; s < SPLIT; ++s) {
        UNROLLED for (int r = 0; r < R; ++r) {
          UNROLLED for (int h = 0; h < HALVES; ++h) {
            whole[r][h] = BITS == 8 ? dot(whole[r][h], quads[s][h], codes + r * QUAD)
                                    : dot_small(whole[r][h], quads[s][h], codes + r * QUAD);
          }
        }
        codes += group * QUAD;
      }
      panel += HALVES * TILE_BYTES;
    }
    UNROLLED for (int h = 0; h < HALVES; ++h) {
      const F32 scale = load(scales + h * LANES);
      UNROLLED for (int r = 0; r < R; ++r) {
        const float step = x.steps[(row + r) * x.blocks + b];
        sums[r][h] = fma(to_f32(whole[r][h]), scale * f32(step), sums[r][h]);
        if (w.zeros) {
          const F32 scaled_zero = load(scales + PANEL + h * LANES);
          sums[r][h] = fma(f32(-step * float(x.sums[(row + r) * x.blocks + b])), scaled_zero, sums[r][h]);
        }
      }
    }
  }
}

template <int BITS, int R>
static void rows_by_panel(const PackedWeights& w, const RoundedRows& x, const int8_t* codes, int64_t group,
                          int64_t row, int64_t panel, const Epilogue& e) {
  F32 sums[R][HALVES];
  multiply<BITS, R>(w, x, codes, group, row, w.panel(panel), sums);
  for (int r = 0; r < R; ++r) finish(e, row + r, panel, sums[r]);
}

// All rows with one panel after the other, so that each comes from memory once.
template <int BITS>
static void panels_by_rows(const PackedWeights& w, const RoundedRows& x, int64_t rows, int64_t begin, int64_t end,
                           const Epilogue& e) {
  for (int64_t panel = begin; panel < end; ++panel) {
    for (int64_t row = 0, group; row < rows; row += group) {
      group = group_at(row, rows);
      const int8_t* codes = x.codes + row * x.width();
      int64_t r = 0;
#if RYZEN_WIDE  // has the registers
      if (group == 8) rows_by_panel<BITS, 8>(w, x, codes, group, row, panel, e), r = 8;
      if (group == 4) rows_by_panel<BITS, 4>(w, x, codes, group, row, panel, e), r = 4;
      if (group == 3) rows_by_panel<BITS, 3>(w, x, codes, group, row, panel, e), r = 3;
#endif
      for (; r + 2 <= group; r += 2) rows_by_panel<BITS, 2>(w, x, codes + r * QUAD, group, row + r, panel, e);
      if (r < group) rows_by_panel<BITS, 1>(w, x, codes + r * QUAD, group, row + r, panel, e);
    }
  }
}

static void multiply_panels(const PackedWeights& w, const RoundedRows& x, int64_t rows, int64_t begin, int64_t end,
                            const Epilogue& e) {
  switch (w.bits) {
    case 2: return panels_by_rows<2>(w, x, rows, begin, end, e);
    case 4: return panels_by_rows<4>(w, x, rows, begin, end, e);
    default: return panels_by_rows<8>(w, x, rows, begin, end, e);
  }
}

// `block` codes, followed by zeros up to a whole tile, to their places in a group's row; returns their sum.
INLINE int32_t place_block(const int8_t* block_codes, int64_t block, int64_t group, int8_t* codes) {
  I32 total = i32(0);
  for (int64_t i = 0; i < block; i += TILE_BYTES) {
    total = dot(total, every_byte(1), load_quads(block_codes + i));
  }
  if (group == 1) {
    __builtin_memcpy(codes, block_codes, size_t(block));
  } else {
    for (int64_t i = 0; i < block; i += QUAD) __builtin_memcpy(codes + i * group, block_codes + i, QUAD);
  }
  return sum(total);
}

// One row of `depth` floats, rounded; `codes` is where the row's first four belong.
static void round_row(const float* x, int64_t depth, int64_t blocks, int64_t block, int64_t group, int8_t* codes,
                      float* steps, int32_t* sums) {
  int8_t rounded[LARGEST_BLOCK] = {};
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t left = depth - b * block;
    round_block(x + b * block, int(left < block ? left : block), int(block), rounded, steps + b);
    sums[b] = place_block(rounded, block, group, codes + b * block * group);
  }
}

// The same for a row that a norm has rounded.
static void take_row(const int8_t* x, int64_t blocks, int64_t block, int64_t group, int8_t* codes, int32_t* sums) {
  int8_t taken[LARGEST_BLOCK] = {};
  for (int64_t b = 0; b < blocks; ++b) {
    __builtin_memcpy(taken, x + b * block, size_t(block));
    sums[b] = place_block(taken, block, group, codes + b * block * group);
  }
}
#undef UNROLLED
