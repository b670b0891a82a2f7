// One block of query rows against one split of one KV head's cache, as a Partial: block by block of BLOCK_KEYS, each
// scored, weighed against the largest score so far, and its values added. Query rows are lanes: a key's channel is
// broadcast from where it lies in the cache, so nothing is ever transposed or summed across lanes.

constexpr int GROUP_KEYS = 16;  // keys that are scored together

// What a thread needs for a block.
struct AttendScratch {
  float* scores;     // (BLOCK_KEYS, lanes)
  uint8_t* weights;  // integers: (BLOCK_KEYS / QUAD, lanes * 2) quads
  uint8_t* keys;     // (GROUP_KEYS, key_stride(dim)) floats, or codes, MOST_INTEGER_DIM from one to the next
  uint8_t* values;   // (BLOCK_KEYS, dim) floats, or (BLOCK_KEYS / QUAD, dim) quads
  float* sums;       // integers: (dim, lanes)

  static int64_t bytes(int dim) {
    return MOST_LANES * BLOCK_KEYS * 6 + int64_t{4} * (MOST_DIM * GROUP_KEYS + dim * (BLOCK_KEYS + MOST_LANES));
  }
  static AttendScratch at(uint8_t* data, int dim) {
    AttendScratch made;
    made.scores = (float*)data;
    made.weights = data + MOST_LANES * BLOCK_KEYS * 4;
    made.keys = made.weights + MOST_LANES * BLOCK_KEYS * 2;
    made.values = made.keys + 4 * GROUP_KEYS * MOST_DIM;
    made.sums = (float*)(made.values + 4 * BLOCK_KEYS * dim);
    return made;
  }
};

// Which stored rows each lane sees.
struct Sight {
  alignas(64) int first[MOST_LANES], end[MOST_LANES];
  int least, most, latest_first, earliest_end;  // over all lanes: the union, and the intersection

  Sight(const AttentionJob& job, const Sequence& sequence, int64_t block, int lanes) {
    const int64_t rows = job.rows_of(block);
    for (int lane = 0; lane < lanes; ++lane) {
      // Lanes without a query row see what the last one does.
      const int64_t query_row = block * MOST_LANES + (lane < rows ? lane : rows - 1);
      const int64_t position = sequence.past + query_row / job.group;
      const int64_t begin = job.window && position >= job.window ? position - job.window + 1 : 0;
      end[lane] = int(position + 1 - sequence.first);
      first[lane] = int(begin > sequence.first ? begin - sequence.first : 0);
    }
    least = first[0], latest_first = first[lanes - 1];
    earliest_end = end[0], most = end[lanes - 1];
  }
};

// --- rows of the cache, widened

INLINE void widen_row(const AttentionJob& job, const uint8_t* row, const float* scale, const float* steps, float* to) {
  const int dim = job.dim;
  if (job.format == CacheFormat::F32) {
    __builtin_memcpy(to, row, size_t(dim) * sizeof(float));
    return;
  }
  if (job.format == CacheFormat::F16) {
    for (int i = 0; i < dim; i += 8) {
      _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(row + 2 * i))));
    }
    return;
  }
  if (job.format == CacheFormat::I8) {
    for (int i = 0; i < dim; ++i) to[i] = float(((const int8_t*)row)[i]);
  } else {
    for (int i = 0; i < dim / 2; ++i) {
      to[2 * i] = float((row[i] & 15) - 8);
      to[2 * i + 1] = float((row[i] >> 4) - 8);
    }
  }
  if (job.scale_group) {
    for (int i = 0; i < dim; ++i) to[i] *= steps[i / job.scale_group];
  } else {
    for (int i = 0; i < dim; ++i) to[i] *= scale[i];
  }
}

// One KV head's keys or values.
struct Stored {
  const uint8_t* data;
  const float *scale, *steps;
  int64_t step_count;

  void widen(const AttentionJob& job, int64_t row, float* to) const {
    widen_row(job, data + row * job.row_bytes, scale, steps + row * step_count, to);
  }
};

// Stored rows that will be wanted soon, asked for in as many steps as a loop has turns: the processor's own prefetcher
// stops at every page, and requests in one burst would hold up the loop. Into the second level: a block of floats would
// push everything else out of the first. Behind the last row nothing is ever read.
struct Ahead {
  const uint8_t* at;
  int64_t step;

  // [begin, begin + count) of `stored`, in `turns` steps.
  static Ahead of(const AttentionJob& job, const Stored& stored, int64_t begin, int64_t count, int64_t turns) {
    return {stored.data + begin * job.row_bytes, count * job.row_bytes / turns};
  }
  inline __attribute__((always_inline)) void turn() {
    for (int64_t line = 0; line < step; line += 64) _mm_prefetch((const char*)(at + line), _MM_HINT_T1);
    at += step;
  }
};

// --- floats: scores

// scores[key][lane] of KEYS keys, V x VECTORS lanes. Keys stand STRIDE apart: a constant, for there are more keys than
// registers for their addresses.
template <typename V, int VECTORS, int KEYS, int STRIDE>
INLINE void score_keys(const float* keys, const float* queries, int dim, Ahead& ahead, float* scores) {
  constexpr int COUNT = Lanes<V>::COUNT;
  V sums[KEYS][VECTORS];
#pragma GCC unroll 16
  for (int k = 0; k < KEYS; ++k) {
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) sums[k][v] = Lanes<V>::all(0.0f);
  }
  for (int c = 0; c < dim; ++c) {
    ahead.turn();
    V q[VECTORS];
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) q[v] = Lanes<V>::at(queries + (c * VECTORS + v) * COUNT);
#pragma GCC unroll 16
    for (int k = 0; k < KEYS; ++k) {
      const V key = Lanes<V>::all(keys[k * STRIDE + c]);
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; ++v) sums[k][v] = fma(q[v], key, sums[k][v]);
    }
  }
#pragma GCC unroll 16
  for (int k = 0; k < KEYS; ++k) {
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) store(scores + (k * VECTORS + v) * COUNT, sums[k][v]);
  }
}

// The distance between keys that are scored: that of the cache for the usual head sizes, else that of a copy.
INLINE int key_stride(int dim) { return dim == 64 || dim == 128 ? dim : dim <= 256 ? 256 : MOST_DIM; }

// How many keys the registers hold.
constexpr int scored_keys(int lanes) { return RYZEN_WIDE ? (lanes == 32 ? 8 : 16) : 64 / lanes; }

template <typename V, int VECTORS, int STRIDE>
INLINE void score_strided(const float* keys, const float* queries, int dim, Ahead ahead, float* scores) {
  constexpr int LANE_COUNT = Lanes<V>::COUNT * VECTORS;
  constexpr int KEYS = scored_keys(LANE_COUNT);
  for (int k = 0; k < GROUP_KEYS; k += KEYS) {
    score_keys<V, VECTORS, KEYS, STRIDE>(keys + k * STRIDE, queries, dim, ahead, scores + k * LANE_COUNT);
  }
}

// Scores of stored rows [begin, begin + GROUP_KEYS); those from `rows` on are not read and score like the last one.
// Asks for the same rows of the values.
template <typename V, int VECTORS>
INLINE void score_group(const AttentionJob& job, const Stored& stored, int64_t begin, int64_t rows,
                        const float* queries, const Stored& values, const AttendScratch& scratch, float* scores) {
  const int dim = job.dim, stride = key_stride(dim);
  const float* keys = (const float*)(stored.data + begin * job.row_bytes);
  if (job.format != CacheFormat::F32 || begin + GROUP_KEYS > rows || stride != dim) {
    float* copy = (float*)scratch.keys;
    for (int i = 0; i < GROUP_KEYS; ++i) {
      stored.widen(job, begin + i < rows ? begin + i : rows - 1, copy + int64_t{i} * stride);
    }
    keys = copy;
  }
  const int turns = GROUP_KEYS / scored_keys(Lanes<V>::COUNT * VECTORS) * dim;
  const Ahead ahead = Ahead::of(job, values, begin, GROUP_KEYS, turns);
  switch (stride) {
    case 64: score_strided<V, VECTORS, 64>(keys, queries, dim, ahead, scores); break;
    case 128: score_strided<V, VECTORS, 128>(keys, queries, dim, ahead, scores); break;
    case 256: score_strided<V, VECTORS, 256>(keys, queries, dim, ahead, scores); break;
    default: score_strided<V, VECTORS, MOST_DIM>(keys, queries, dim, ahead, scores);
  }
}

// --- both: from scores to weights

// Scores of a block as the attention wants them: capped, and LOWEST where a lane does not see the key. [begin, end) are
// stored rows, `scores` those of `begin`.
template <typename V, int VECTORS>
INLINE void cap_and_mask(const AttentionJob& job, const Sight& sight, int begin, int end, float* scores) {
  constexpr int COUNT = Lanes<V>::COUNT, LANE_COUNT = COUNT * VECTORS;
  if (job.softcap > 0.0f) {
    for (int i = 0; i < (end - begin) * LANE_COUNT; i += LANES) {
      store(scores + i, tanh(load(scores + i)) * f32(job.softcap));
    }
  }
  if (sight.latest_first <= begin && sight.earliest_end >= end) return;
  for (int key = begin; key < end; ++key) {
    for (int v = 0; v < VECTORS; ++v) {
      float* at = scores + ((key - begin) * VECTORS + v) * COUNT;
      store(at, seen(Lanes<V>::at(at), key, sight.first + v * COUNT, sight.end + v * COUNT));
    }
  }
}

// The largest score so far, and by how much everything before shrinks for it.
template <typename V>
INLINE V raise_largest(const float* scores, int keys, int stride, float* largest, float* shrink) {
  const V before = Lanes<V>::at(largest);
  V a = before, b = before;
  for (int k = 0; k < keys; k += 2) {
    a = max(a, Lanes<V>::at(scores + k * stride));
    b = max(b, Lanes<V>::at(scores + (k + 1) * stride));
  }
  const V now = max(a, b);
  store(largest, now);
  // A lane that has seen nothing yet stays at LOWEST: relative to a reference far above it, masked keys weigh nothing.
  const V reference = max(now, Lanes<V>::all(LOWEST / 3.0f));
  store(shrink, exp2_below(before - reference));
  return reference;
}

// scores -> weights relative to the largest, in place. `keys` is a multiple of two.
template <typename V, int VECTORS>
INLINE void weigh(float* scores, int keys, const Partial& part, float* shrink) {
  constexpr int COUNT = Lanes<V>::COUNT, STRIDE = COUNT * VECTORS;
  for (int v = 0; v < VECTORS; ++v) {
    float* of = scores + v * COUNT;
    const V reference = raise_largest<V>(of, keys, STRIDE, part.largest + v * COUNT, shrink + v * COUNT);
    V sum = Lanes<V>::at(part.sum + v * COUNT) * Lanes<V>::at(shrink + v * COUNT);
    for (int k = 0; k < keys; k += 2) {
      const V a = exp2_below(Lanes<V>::at(of + k * STRIDE) - reference);
      const V b = exp2_below(Lanes<V>::at(of + (k + 1) * STRIDE) - reference);
      store(of + k * STRIDE, a);
      store(of + (k + 1) * STRIDE, b);
      sum = sum + a + b;
    }
    store(part.sum + v * COUNT, sum);
  }
}

// --- floats: values

constexpr int TILE_ROWS = 4, WIDEST = RYZEN_WIDE ? 4 : 1;  // query rows and tiles of columns summed at once

// out[row][column] = out * shrink + sum over keys of weight * value, for ROWS rows and COLUMNS tiles of which the last
// has `tail` columns.
template <int ROWS, int COLUMNS>
INLINE void add_tile(const float* weights, int lanes, const float* values, int dim, int keys, const float* shrink,
                     int tail, Ahead& ahead, float* out) {
  F32 sums[ROWS][COLUMNS];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < COLUMNS; ++c) {
      const float* at = out + r * dim + c * LANES;
      sums[r][c] = (c + 1 < COLUMNS ? load(at) : load(at, tail)) * f32(shrink[r]);
    }
  }
  for (int k = 0; k < keys; ++k) {
    ahead.turn();
    F32 value[COLUMNS];
#pragma GCC unroll 4
    for (int c = 0; c < COLUMNS; ++c) {
      const float* at = values + int64_t{k} * dim + c * LANES;
      value[c] = c + 1 < COLUMNS ? load(at) : load(at, tail);
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const F32 weight = f32(weights[k * lanes + r]);
#pragma GCC unroll 4
      for (int c = 0; c < COLUMNS; ++c) sums[r][c] = fma(weight, value[c], sums[r][c]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < COLUMNS; ++c) {
      float* at = out + r * dim + c * LANES;
      if (c + 1 < COLUMNS) {
        store(at, sums[r][c]);
      } else {
        store(at, sums[r][c], tail);
      }
    }
  }
}

INLINE void add_values(const float* weights, int lanes, const float* values, int dim, int keys, const float* shrink,
                       Ahead ahead, float* out) {
  for (int row = 0; row < lanes; row += TILE_ROWS) {
    const float* of = weights + row;
    float* to = out + row * dim;
    int c = 0;
    for (; c + WIDEST * LANES <= dim; c += WIDEST * LANES) {
      add_tile<TILE_ROWS, WIDEST>(of, lanes, values + c, dim, keys, shrink + row, LANES, ahead, to + c);
    }
    const int left = dim - c, tail = left % LANES ? left % LANES : LANES;
    if (left > 3 * LANES) {
      add_tile<TILE_ROWS, 4>(of, lanes, values + c, dim, keys, shrink + row, tail, ahead, to + c);
    } else if (left > 2 * LANES) {
      add_tile<TILE_ROWS, 3>(of, lanes, values + c, dim, keys, shrink + row, tail, ahead, to + c);
    } else if (left > LANES) {
      add_tile<TILE_ROWS, 2>(of, lanes, values + c, dim, keys, shrink + row, tail, ahead, to + c);
    } else if (left > 0) {
      add_tile<TILE_ROWS, 1>(of, lanes, values + c, dim, keys, shrink + row, tail, ahead, to + c);
    }
  }
}

// Adds the values of stored rows [begin, begin + keys), and asks for the keys of the block behind them.
INLINE void add_block(const AttentionJob& job, const Stored& stored, const Stored& to_come, int64_t begin, int keys,
                      int lanes, const float* shrink, const AttendScratch& scratch, float* out) {
  const float* values = (const float*)(stored.data + begin * job.row_bytes);
  if (job.format != CacheFormat::F32) {
    float* copy = (float*)scratch.values;
    for (int i = 0; i < keys; ++i) stored.widen(job, begin + i, copy + int64_t{i} * job.dim);
    values = copy;
  }
  const int turns = keys * (lanes / TILE_ROWS) * ((job.dim + WIDEST * LANES - 1) / (WIDEST * LANES));
  const Ahead ahead = Ahead::of(job, to_come, begin + keys, BLOCK_KEYS, turns);
  add_values(scratch.scores, lanes, values, job.dim, keys, shrink, ahead, out);
}

template <typename V, int VECTORS>
INLINE void attend_floats(const AttentionJob& job, const Stored& keys, const Stored& values, const uint8_t* queries,
                          const Sight& sight, int begin, int end, int64_t rows, const AttendScratch& scratch,
                          const Partial& part) {
  constexpr int LANE_COUNT = Lanes<V>::COUNT * VECTORS;
  alignas(64) float shrink[LANE_COUNT];
  const int scored = (end - begin + GROUP_KEYS - 1) / GROUP_KEYS * GROUP_KEYS;
  for (int k = 0; k < scored; k += GROUP_KEYS) {
    score_group<V, VECTORS>(job, keys, begin + k, rows, (const float*)queries, values, scratch,
                            scratch.scores + k * LANE_COUNT);
  }
  cap_and_mask<V, VECTORS>(job, sight, begin, begin + scored, scratch.scores);
  weigh<V, VECTORS>(scratch.scores, scored, part, shrink);
  add_block(job, values, keys, begin, end - begin, LANE_COUNT, shrink, scratch, part.out);
}

#if RYZEN_WIDE
#include "attention_integers.inl"
#endif

// --- a split

template <typename V, int VECTORS>
INLINE void attend_lanes(const AttentionJob& job, int64_t row, int kv_head, int64_t block, int64_t split,
                         const AttendScratch& scratch, const Partial& part) {
  constexpr int LANE_COUNT = Lanes<V>::COUNT * VECTORS;
  const Sequence& sequence = job.sequences[row];
  const Sight sight(job, sequence, block, LANE_COUNT);
  const uint8_t* queries = job.queries_of(row, kv_head, block);
  const int64_t steps = job.scale_group ? job.dim / job.scale_group : 0;
  const int64_t channels = int64_t(kv_head) * job.dim;
  const Stored keys = {sequence.keys + kv_head * sequence.head_bytes, job.k_scale ? job.k_scale + channels : nullptr,
                       sequence.key_steps + kv_head * sequence.head_steps, steps};
  const Stored values = {sequence.values + kv_head * sequence.head_bytes,
                         job.v_scale ? job.v_scale + channels : nullptr,
                         sequence.value_steps + kv_head * sequence.head_steps, steps};
  for (int lane = 0; lane < LANE_COUNT; ++lane) part.largest[lane] = LOWEST, part.sum[lane] = 0.0f;
  float* out = job.integers ? scratch.sums : part.out;
  __builtin_memset(out, 0, sizeof(float) * size_t(LANE_COUNT) * size_t(job.dim));
  const int64_t split_end = (split + 1) * SPLIT_KEYS;
  for (int64_t at = split * SPLIT_KEYS; at < split_end; at += BLOCK_KEYS) {
    int64_t begin = sight.least > at ? sight.least / GROUP_KEYS * GROUP_KEYS : at;
    const int64_t end = sight.most < at + BLOCK_KEYS ? sight.most : at + BLOCK_KEYS;
    if (begin >= end) continue;
#if RYZEN_WIDE
    if (job.integers) {
      attend_integers<V, VECTORS>(job, keys, values, queries, sight, int(begin), int(end), sequence.rows, scratch,
                                  part);
      continue;
    }
#endif
    attend_floats<V, VECTORS>(job, keys, values, queries, sight, int(begin), int(end), sequence.rows, scratch, part);
  }
#if RYZEN_WIDE
  if (job.integers) take_sums(job, queries, values.scale, LANE_COUNT, scratch.sums, part);
#endif
}

// The Partial of one split of the stored rows, [split * SPLIT_KEYS, (split + 1) * SPLIT_KEYS).
static void attend_split(const AttentionJob& job, int64_t row, int kv_head, int64_t block, int64_t split,
                         uint8_t* scratch, const Partial& part) {
  const AttendScratch room = AttendScratch::at(scratch, job.dim);
  switch (job.lanes_of(block)) {
    case 8: attend_lanes<F8, 1>(job, row, kv_head, block, split, room, part); break;
    case 16: attend_lanes<F32, 1>(job, row, kv_head, block, split, room, part); break;
    default: attend_lanes<F32, 2>(job, row, kv_head, block, split, room, part);
  }
}

// --- splits together

// total = total and part, whose keys come after it.
static void fold(int lanes, int dim, const Partial& total, const Partial& part) {
  for (int lane = 0; lane < lanes; lane += 8) {
    const F8 a = Lanes<F8>::at(total.largest + lane), b = Lanes<F8>::at(part.largest + lane), most = max(a, b);
    alignas(32) float keep[8], add[8];
    store(keep, exp2_below(a - most));
    store(add, exp2_below(b - most));
    store(total.largest + lane, most);
    const F8 old_sum = Lanes<F8>::at(total.sum + lane) * Lanes<F8>::at(keep);
    store(total.sum + lane, fma(Lanes<F8>::at(part.sum + lane), Lanes<F8>::at(add), old_sum));
    for (int i = 0; i < 8; ++i) {
      float* to = total.out + (lane + i) * dim;
      const float* from = part.out + (lane + i) * dim;
      for (int c = 0; c < dim; c += 8) {
        const F8 old = Lanes<F8>::at(to + c) * Lanes<F8>::all(keep[i]);
        store(to + c, fma(Lanes<F8>::at(from + c), Lanes<F8>::all(add[i]), old));
      }
    }
  }
}

// The finished rows of a block, where the output wants them.
static void finish(const AttentionJob& job, int64_t row, int kv_head, int64_t block, const Partial& total) {
  const int64_t rows = job.rows_of(block);
  for (int64_t lane = 0; lane < rows; ++lane) {
    const int64_t query_row = block * MOST_LANES + lane, token = query_row / job.group;
    const int64_t head = int64_t(kv_head) * job.group + query_row % job.group;
    float keep = 1.0f, sum = total.sum[lane];
    if (job.sink) {
      // One more key, with this score and no value.
      const float sink = job.sink[head] * LOG2_E, most = sink > total.largest[lane] ? sink : total.largest[lane];
      alignas(32) float both[8] = {total.largest[lane] - most, sink - most};
      store(both, exp2_below(Lanes<F8>::at(both)));
      keep = both[0];
      sum = sum * keep + both[1];
    }
    const F8 factor = Lanes<F8>::all(keep / sum);
    float* to = job.output + ((row * job.tokens + token) * job.heads + head) * job.dim;
    for (int c = 0; c < job.dim; c += 8) store(to + c, Lanes<F8>::at(total.out + lane * job.dim + c) * factor);
  }
}
