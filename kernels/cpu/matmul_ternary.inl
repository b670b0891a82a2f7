// MatMulTernary in vectors.
#include "epilogue.inl"
#include "round_activations.inl"

// Rows of A that share one read of a panel: as many sums as leave registers for the weights.
constexpr int MOST_ROWS = RYZEN_WIDE ? 8 : 2;

// Sums over one quad of every tile's four, which lie one behind the other in A.
template <int ROWS, int PLACE>
INLINE void add_quad(I32 (&sums)[ROWS][HALVES], const Quads (&pair)[HALVES], const int8_t* codes, int64_t width) {
  UNROLLED for (int h = 0; h < HALVES; ++h) {
    const Quads weights = crumbs<PLACE>(pair[h]);
    UNROLLED for (int r = 0; r < ROWS; ++r)
      sums[r][h] = dot_small(sums[r][h], weights, codes + r * width + PLACE * QUAD);
  }
}

template <int ROWS>
INLINE void panel_rows(const TernaryTask& task, int64_t row, int64_t panel) {
  // Few rows would wait for their few sums: they have several each, for different quads of a tile.
  constexpr int CHAINS = ROWS < 4 && RYZEN_WIDE ? 4 / ROWS : 1;
  I32 sums[CHAINS][ROWS][HALVES];
  UNROLLED for (int chain = 0; chain < CHAINS; ++chain) {
    UNROLLED for (int r = 0; r < ROWS; ++r) {
      UNROLLED for (int h = 0; h < HALVES; ++h) sums[chain][r][h] = i32(0);
    }
  }
  const int64_t width = task.a.width;
  const uint8_t* tile = task.weights->panel(panel);
  const uint8_t* end = tile + task.weights->bytes();
  const int8_t* codes = task.a.codes + row * width;
  for (; tile < end; tile += TernaryPanels::PAIR, codes += TernaryPanels::K_PER_TILE) {
    const Quads pair[HALVES] = {load_quads(tile), load_quads(tile + TILE_BYTES)};
    add_quad<ROWS, 0>(sums[0], pair, codes, width);
    add_quad<ROWS, 1>(sums[1 % CHAINS], pair, codes, width);
    add_quad<ROWS, 2>(sums[2 % CHAINS], pair, codes, width);
    add_quad<ROWS, 3>(sums[3 % CHAINS], pair, codes, width);
  }
  UNROLLED for (int r = 0; r < ROWS; ++r) {
    F32 products[HALVES];
    UNROLLED for (int h = 0; h < HALVES; ++h) {
      UNROLLED for (int chain = 1; chain < CHAINS; ++chain) sums[0][r][h] = sums[0][r][h] + sums[chain][r][h];
      // A code is its weight plus one, so that the sum of A's codes is in every product.
      const F32 exact = to_f32(sums[0][r][h] - i32(task.a.sums[row + r]));
      products[h] = exact * f32(task.a.steps[row + r]) * load(task.scales + panel * PANEL + h * LANES);
    }
    finish(task.epilogue, row + r, panel, products);
  }
}

static void ternary_task(const TernaryTask& task) {
  for (int64_t panel = task.begin; panel < task.end; ++panel) {
    int64_t row = task.first;
    for (; row + MOST_ROWS <= task.end_row; row += MOST_ROWS) panel_rows<MOST_ROWS>(task, row, panel);
#if RYZEN_WIDE  // or two are the most
    if (task.end_row - row >= 4) panel_rows<4>(task, row, panel), row += 4;
    if (task.end_row - row >= 2) panel_rows<2>(task, row, panel), row += 2;
#endif
    if (task.end_row - row >= 1) panel_rows<1>(task, row, panel);
  }
}

static void ternary_round(const float* x, int K, int width, int8_t* codes, float* step, int32_t* sums) {
  round_block(x, K, width, codes, step);
  I32 total = i32(0);
  for (int k = 0; k < width; k += TILE_BYTES) total = dot(total, every_byte(1), load_quads(codes + k));
  *sums = sum(total);
}
#undef UNROLLED
