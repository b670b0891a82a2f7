// MatMulTernary in vectors.
#include "round_activations.inl"

// Rows of A that share one read of a panel: as many sums as leave registers for the weights.
constexpr int MOST_ROWS = RYZEN_WIDE ? 8 : 4;

INLINE int32_t quad_at(const int8_t* codes) {
  int32_t quad;
  __builtin_memcpy(&quad, codes, sizeof quad);
  return quad;
}

// Sums over one quad of every tile's four, which lie one behind the other in A.
template <int ROWS, int PLACE>
INLINE void add_quad(I32* sums, Quads tile, const int8_t* codes, int64_t width) {
  const Quads weights = crumbs<PLACE>(tile);
  for (int r = 0; r < ROWS; ++r) sums[r] = dot_small(sums[r], weights, quad_at(codes + r * width + PLACE * QUAD));
}

template <int ROWS>
INLINE void store_rows(const TernaryTask& task, int64_t row, int64_t panel, const I32* sums) {
  const int64_t n = panel * LANES, left = task.N - n;
  const int count = left < LANES ? int(left) : LANES;
  const F32 scale = task.scale_per_row ? load(task.scales + n, count) : f32(task.scales[0]);
  for (int r = 0; r < ROWS; ++r) {
    // A code is its weight plus one, so that the sum of A's codes is in every product.
    const F32 exact = to_f32(sums[r] - i32(task.a.sums[row + r]));
    store(task.out + (row + r) * task.N + n, exact * f32(task.a.steps[row + r]) * scale, count);
  }
}

template <int ROWS>
INLINE void panel_rows(const TernaryTask& task, int64_t row, int64_t panel) {
  // Few rows would wait for their few sums: they have several each, for different quads of a tile.
  constexpr int CHAINS = ROWS < 4 ? 4 / ROWS : 1;
  I32 sums[CHAINS][ROWS];
  for (int chain = 0; chain < CHAINS; ++chain) {
    for (int r = 0; r < ROWS; ++r) sums[chain][r] = i32(0);
  }
  const int64_t width = task.a.width;
  const uint8_t* tile = task.weights->panel(panel);
  const uint8_t* end = tile + task.weights->tiles * TILE_BYTES;
  const int8_t* codes = task.a.codes + row * width;
  for (; tile < end; tile += TILE_BYTES, codes += TernaryPanels::K_PER_TILE) {
    const Quads packed = load_quads(tile);
    add_quad<ROWS, 0>(sums[0], packed, codes, width);
    add_quad<ROWS, 1>(sums[1 % CHAINS], packed, codes, width);
    add_quad<ROWS, 2>(sums[2 % CHAINS], packed, codes, width);
    add_quad<ROWS, 3>(sums[3 % CHAINS], packed, codes, width);
  }
  for (int chain = 1; chain < CHAINS; ++chain) {
    for (int r = 0; r < ROWS; ++r) sums[0][r] = sums[0][r] + sums[chain][r];
  }
  store_rows<ROWS>(task, row, panel, sums[0]);
}

static void ternary_task(const TernaryTask& task) {
  for (int64_t panel = task.begin; panel < task.end; ++panel) {
    int64_t row = 0;
    for (; row + MOST_ROWS <= task.rows; row += MOST_ROWS) panel_rows<MOST_ROWS>(task, row, panel);
    if (task.rows - row >= 4) {
      panel_rows<4>(task, row, panel);
      row += 4;
    }
    if (task.rows - row >= 2) {
      panel_rows<2>(task, row, panel);
      row += 2;
    }
    if (task.rows - row >= 1) panel_rows<1>(task, row, panel);
  }
}

static void ternary_round(const float* x, int K, int width, int8_t* codes, float* step, int32_t* sum) {
  round_block(x, K, width, codes, step);
  int32_t total = 0;
  for (int k = 0; k < width; ++k) total += codes[k];
  *sum = total;
}
