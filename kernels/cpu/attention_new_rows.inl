// What happens to the new tokens before anything attends: heads are normalised and rotated, keys and values stored as
// the cache wants them, queries laid out as lanes.

// y = x / sqrt(mean(x^2) + epsilon) * weight
INLINE void normalise(const float* x, const float* weight, float epsilon, int dim, float* y) {
  F32 squares = f32(0.0f);
  for (int i = 0; i < dim; i += LANES) {
    const F32 v = load(x + i, dim - i < LANES ? dim - i : LANES);
    squares = fma(v, v, squares);
  }
  const float factor = 1.0f / __builtin_sqrtf(sum(squares) / float(dim) + epsilon);
  for (int i = 0; i < dim; i += LANES) {
    const int count = dim - i < LANES ? dim - i : LANES;
    store(y + i, load(x + i, count) * f32(factor) * load(weight + i, count), count);
  }
}

// The pair (a, b) becomes (a cos - b sin, a sin + b cos), in ONNX Runtime's own order of roundings.
INLINE void rotate(float* __restrict x, const float* __restrict cos, const float* __restrict sin, int half,
                   bool interleaved) {
  if (interleaved) {
    for (int i = 0; i < half; ++i) {
      const float a = x[2 * i], b = x[2 * i + 1];
      x[2 * i] = __builtin_fmaf(a, cos[i], -(b * sin[i]));
      x[2 * i + 1] = __builtin_fmaf(a, sin[i], b * cos[i]);
    }
    return;
  }
  for (int i = 0; i < half; i += LANES) {
    const int count = half - i < LANES ? half - i : LANES;
    const F32 a = load(x + i, count), b = load(x + half + i, count);
    const F32 c = load(cos + i, count), s = load(sin + i, count);
    const F32 bs = b * s, bc = b * c;
    store(x + i, fma(a, c, f32(0.0f) - bs), count);
    store(x + half + i, fma(a, s, bc), count);
  }
}

INLINE void new_head(const AttentionJob& job, const float* x, const float* norm, int64_t position, float* y) {
  if (norm) {
    normalise(x, norm, job.norm_epsilon, job.dim, y);
  } else {
    __builtin_memcpy(y, x, size_t(job.dim) * sizeof(float));
  }
  if (job.cos) rotate(y, job.cos + position * job.half, job.sin + position * job.half, job.half, job.interleaved);
}

// Codes of x * inverse, to the nearest and ties to even, clamped to limit and -limit - 1; NaN becomes limit.
INLINE void round_channels(const float* x, const float* inverse, float limit, int dim, int8_t* codes) {
  for (int i = 0; i < dim; i += LANES) {
    const int count = dim - i < LANES ? dim - i : LANES;
    const F32 rounded = nearest(load(x + i, count) * load(inverse + i, count));
    store_bytes(codes + i, to_i32(max(min(rounded, f32(limit)), f32(-limit - 1.0f))), count);
  }
}

// The steps of a token that has scales of its own: the largest magnitude of a group takes the code `limit`.
INLINE void choose_steps(const float* x, int group, float limit, int dim, float* steps, float* inverse) {
  for (int begin = 0; begin < dim; begin += group) {
    float most = 0.0f;
    for (int i = begin; i < begin + group; ++i) {
      const float size = __builtin_fabsf(x[i]);
      most = size > most ? size : most;
    }
    const float step = most / limit;
    steps[begin / group] = step;
    for (int i = begin; i < begin + group; ++i) inverse[i] = step > 0.0f ? 1.0f / step : 0.0f;
  }
}

// One row of dim floats as the cache stores it. `steps` is written where tokens have their own, `inverse` read
// elsewhere.
INLINE void store_row(const AttentionJob& job, const float* x, const float* inverse, float* steps, uint8_t* to) {
  const int dim = job.dim;
  if (job.format == CacheFormat::F32) {
    __builtin_memcpy(to, x, size_t(dim) * sizeof(float));
    return;
  }
  if (job.format == CacheFormat::F16) {
    for (int i = 0; i < dim; i += 8) {
      _mm_storeu_si128((__m128i*)(to + 2 * i), _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT));
    }
    return;
  }
  const float limit = job.format == CacheFormat::I8 ? 127.0f : 7.0f;
  float own[MOST_DIM];
  if (job.scale_group) {
    choose_steps(x, job.scale_group, limit, dim, steps, own);
    inverse = own;
  }
  if (job.format == CacheFormat::I8) {
    round_channels(x, inverse, limit, dim, (int8_t*)to);
    return;
  }
  int8_t codes[MOST_DIM];
  round_channels(x, inverse, limit, dim, codes);
  for (int i = 0; i < dim / 2; ++i) to[i] = uint8_t((codes[2 * i] + 8) | (codes[2 * i + 1] + 8) << 4);
}

// Where channel c of a query row stands among the integer queries: four channels make a lane of a dot product. Two
// 4-bit codes of one byte are taken apart into all the low ones and then all the high ones.
INLINE int quad_byte(const AttentionJob& job, int c) {
  return job.format == CacheFormat::I4 ? (c & 1) * (job.dim / 2) + c / 2 : c;
}

// Lays out one query row in 15 bits, hi * 256 + lo, with the keys' scales multiplied in. Keys are read as unsigned
// codes, raised by 128 (8 at four bits): what that adds to every score is the row's correction. A row with an infinity
// or a NaN has codes of 0 and a scale of NaN.
INLINE void lay_out_integers(const AttentionJob& job, const float* x, const float* k_scale, int lanes, int lane,
                             uint8_t* block) {
  const int dim = job.dim;
  float scaled_row[MOST_DIM];
  I32 most = i32(0);
  for (int i = 0; i < dim; i += LANES) {
    const int count = dim - i < LANES ? dim - i : LANES;
    const F32 v = load(x + i, count) * load(k_scale + i, count) * f32(job.query_factor);
    most = max(most, magnitude_bits(v));  // as integers, in which a NaN is above every number
    store(scaled_row + i, v, count);
  }
  const int32_t bits = largest(most);
  float maximum;
  __builtin_memcpy(&maximum, &bits, sizeof maximum);
  // Zeros where it is small: the inverse of the step would leave float's range.
  const float step = !(maximum <= __FLT_MAX__) ? __builtin_nanf("") : maximum < 0x1p-100f ? 0.0f : maximum / 32512.0f;
  const float inverse = 1.0f / step;
  int8_t* parts = (int8_t*)block;
  const int high_lane = lanes == 8 ? lane : (lane & 16) * 2 + (lane & 15), low_lane = high_lane + (lanes == 8 ? 8 : 16);
  const int quad_bytes = 2 * lanes * QUAD;
  int32_t total = 0;
  for (int c = 0; c < dim; ++c) {
    const int value = step > 0.0f ? int(__builtin_rintf(scaled_row[c] * inverse)) : 0;
    const int low = int8_t(value), high = (value - low) >> 8, place = quad_byte(job, c);
    int8_t* quad = parts + (place / QUAD) * quad_bytes + place % QUAD;
    quad[high_lane * QUAD] = int8_t(high);
    quad[low_lane * QUAD] = int8_t(low);
    total += value;
  }
  float* scales = (float*)(block + 2 * dim * lanes);
  int32_t* corrections = (int32_t*)(scales + lanes);
  scales[lane] = step;
  corrections[lane] = total * (job.format == CacheFormat::I4 ? 8 : 128);
}

INLINE void lay_out_query(const AttentionJob& job, const float* x, int kv_head, int lanes, int lane, uint8_t* block) {
  if (job.integers) {
    lay_out_integers(job, x, job.k_scale + int64_t(kv_head) * job.dim, lanes, lane, block);
    return;
  }
  float* to = (float*)block + lane;
  for (int c = 0; c < job.dim; ++c) to[c * lanes] = x[c] * job.query_factor;
}

// Everything about one new token of one batch row.
static void take_token(const AttentionJob& job, int64_t row, int64_t token) {
  const Sequence& sequence = job.sequences[row];
  const int64_t position = sequence.past + token, at = row * job.tokens + token;
  const int64_t stored = sequence.append_at + token;
  const int dim = job.dim;
  float head[MOST_DIM];
  for (int h = 0; h < job.heads; ++h) {
    new_head(job, job.query + at * job.query_stride + int64_t(h) * dim, job.q_norm, position, head);
    const int kv_head = h / job.group;
    const int64_t query_row = token * job.group + h % job.group, block = query_row / MOST_LANES;
    lay_out_query(job, head, kv_head, job.lanes_of(block), int(query_row % MOST_LANES),
                  job.queries_of(row, kv_head, block));
  }
  const int64_t step_count = job.scale_group ? dim / job.scale_group : 0;
  for (int h = 0; h < job.kv_heads; ++h) {
    const int64_t channels = int64_t(h) * dim, place = h * sequence.head_bytes + stored * job.row_bytes;
    const int64_t steps = h * sequence.head_steps + stored * step_count;
    new_head(job, job.key + at * job.key_stride + channels, job.k_norm, position, head);
    store_row(job, head, job.k_inverse ? job.k_inverse + channels : nullptr, sequence.key_steps + steps,
              sequence.keys + place);
    store_row(job, job.value + at * job.key_stride + channels, job.v_inverse ? job.v_inverse + channels : nullptr,
              sequence.value_steps + steps, sequence.values + place);
  }
}
