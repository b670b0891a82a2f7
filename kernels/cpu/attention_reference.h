// The steps of GroupQueryAttention in plain C++: what processors without AVX2 run, and what the vector code is held to.
#pragma once

#include <cmath>
#include <cstring>

#include "attention_job.h"
#include "half.h"

namespace ryzen::reference {

inline void new_head(const AttentionJob& job, const float* x, const float* norm, int64_t position, float* y) {
  double squares = 0.0;
  for (int i = 0; i < job.dim; ++i) squares += double(x[i]) * x[i];
  const float factor = float(1.0 / std::sqrt(squares / job.dim + job.norm_epsilon));
  for (int i = 0; i < job.dim; ++i) y[i] = norm ? x[i] * factor * norm[i] : x[i];
  if (!job.cos) return;
  const float *cos = job.cos + position * job.half, *sin = job.sin + position * job.half;
  for (int i = 0; i < job.half; ++i) {
    float& first = y[job.interleaved ? 2 * i : i];
    float& second = y[job.interleaved ? 2 * i + 1 : job.half + i];
    const float a = first, b = second, bs = b * sin[i], bc = b * cos[i];
    first = std::fma(a, cos[i], -bs);
    second = std::fma(a, sin[i], bc);
  }
}

inline int code_of(float x, float inverse, int limit) {
  const float rounded = std::nearbyint(x * inverse);
  if (!(rounded < float(limit))) return limit;  // NaN too
  return rounded < float(-limit - 1) ? -limit - 1 : int(rounded);
}

inline void store_row(const AttentionJob& job, const float* x, const float* inverse, float* steps, uint8_t* to) {
  if (job.format == CacheFormat::F32) {
    std::memcpy(to, x, size_t(job.dim) * sizeof(float));
    return;
  }
  const int limit = job.format == CacheFormat::I8 ? 127 : 7;
  float step = 0.0f;
  for (int c = 0; c < job.dim; ++c) {
    if (job.format == CacheFormat::F16) {
      const uint16_t half = float_to_half(x[c]);
      std::memcpy(to + 2 * c, &half, sizeof half);
      continue;
    }
    if (job.scale_group && c % job.scale_group == 0) {
      float most = 0.0f;
      for (int i = c; i < c + job.scale_group; ++i) most = std::fabs(x[i]) > most ? std::fabs(x[i]) : most;
      step = steps[c / job.scale_group] = most / float(limit);
    }
    const float factor = !job.scale_group ? inverse[c] : step > 0.0f ? 1.0f / step : 0.0f;
    const int code = code_of(x[c], factor, limit);
    if (job.format == CacheFormat::I8) {
      to[c] = uint8_t(code);
    } else if (c % 2 == 0) {
      to[c / 2] = uint8_t(code + 8);
    } else {
      to[c / 2] = uint8_t(to[c / 2] | (code + 8) << 4);
    }
  }
}

inline void take_token(const AttentionJob& job, int64_t row, int64_t token) {
  const Sequence& sequence = job.sequences[row];
  const int64_t position = sequence.past + token, at = row * job.tokens + token, stored = sequence.append_at + token;
  const int64_t step_count = job.scale_group ? job.dim / job.scale_group : 0;
  float head[MOST_DIM];
  for (int h = 0; h < job.heads; ++h) {
    new_head(job, job.query + at * job.query_stride + int64_t(h) * job.dim, job.q_norm, position, head);
    const int64_t query_row = token * job.group + h % job.group, block = query_row / MOST_LANES;
    float* to = reinterpret_cast<float*>(job.queries_of(row, h / job.group, block)) + query_row % MOST_LANES;
    for (int c = 0; c < job.dim; ++c) to[c * job.lanes_of(block)] = head[c] * job.query_factor;
  }
  for (int h = 0; h < job.kv_heads; ++h) {
    const int64_t channels = int64_t(h) * job.dim, place = h * sequence.head_bytes + stored * job.row_bytes;
    const int64_t steps = h * sequence.head_steps + stored * step_count;
    new_head(job, job.key + at * job.key_stride + channels, job.k_norm, position, head);
    store_row(job, head, job.k_inverse ? job.k_inverse + channels : nullptr,
              job.scale_group ? sequence.key_steps + steps : nullptr, sequence.keys + place);
    store_row(job, job.value + at * job.key_stride + channels, job.v_inverse ? job.v_inverse + channels : nullptr,
              job.scale_group ? sequence.value_steps + steps : nullptr, sequence.values + place);
  }
}

inline float stored_channel(const AttentionJob& job, const uint8_t* row, const float* scale, const float* steps,
                            int c) {
  if (job.format == CacheFormat::F32) {
    float value;
    std::memcpy(&value, row + 4 * c, sizeof value);
    return value;
  }
  if (job.format == CacheFormat::F16) {
    uint16_t half;
    std::memcpy(&half, row + 2 * c, sizeof half);
    return half_to_float(half);
  }
  const int code = job.format == CacheFormat::I8 ? int8_t(row[c]) : ((row[c / 2] >> (c % 2 * 4)) & 15) - 8;
  return float(code) * (job.scale_group ? steps[c / job.scale_group] : scale[c]);
}

inline void attend_split(const AttentionJob& job, int64_t row, int kv_head, int64_t block, int64_t split,
                         uint8_t* scratch, const Partial& part) {
  const Sequence& sequence = job.sequences[row];
  const int lanes = job.lanes_of(block), dim = job.dim;
  const float* queries = reinterpret_cast<const float*>(job.queries_of(row, kv_head, block));
  const int64_t step_count = job.scale_group ? dim / job.scale_group : 0;
  float* scores = reinterpret_cast<float*>(scratch);
  auto channel = [&](const uint8_t* data, const float* scale, const float* steps, int64_t key, int c) {
    return stored_channel(job, data + kv_head * sequence.head_bytes + key * job.row_bytes,
                          scale ? scale + int64_t(kv_head) * dim : nullptr,
                          steps ? steps + kv_head * sequence.head_steps + key * step_count : nullptr, c);
  };
  for (int lane = 0; lane < lanes; ++lane) {
    part.largest[lane] = LOWEST;
    part.sum[lane] = 0.0f;
    float* out = part.out + int64_t{lane} * dim;
    for (int c = 0; c < dim; ++c) out[c] = 0.0f;
    if (lane >= job.rows_of(block)) continue;
    const int64_t position = sequence.past + (block * MOST_LANES + lane) / job.group;
    const int64_t begin = job.window && position >= job.window ? position - job.window + 1 - sequence.first : 0;
    const int64_t first = begin > split * SPLIT_KEYS ? begin : split * SPLIT_KEYS;
    const int64_t last = position + 1 - sequence.first, split_end = (split + 1) * SPLIT_KEYS;
    const int64_t end = last < split_end ? last : split_end;
    for (int64_t key = first; key < end; ++key) {
      float score = 0.0f;
      for (int c = 0; c < dim; ++c) {
        score += queries[c * lanes + lane] * channel(sequence.keys, job.k_scale, sequence.key_steps, key, c);
      }
      if (job.softcap > 0.0f) score = std::tanh(score) * job.softcap;
      scores[key - first] = score;
      if (score > part.largest[lane]) part.largest[lane] = score;
    }
    for (int64_t key = first; key < end; ++key) {
      const float weight = std::exp2(scores[key - first] - part.largest[lane]);
      part.sum[lane] += weight;
      for (int c = 0; c < dim; ++c) {
        out[c] += weight * channel(sequence.values, job.v_scale, sequence.value_steps, key, c);
      }
    }
  }
}

inline void fold(int lanes, int dim, const Partial& total, const Partial& part) {
  for (int lane = 0; lane < lanes; ++lane) {
    const float most = std::fmax(total.largest[lane], part.largest[lane]);
    const float keep = std::exp2(total.largest[lane] - most), add = std::exp2(part.largest[lane] - most);
    total.largest[lane] = most;
    total.sum[lane] = total.sum[lane] * keep + part.sum[lane] * add;
    for (int64_t i = int64_t{lane} * dim; i < int64_t{lane + 1} * dim; ++i) {
      total.out[i] = total.out[i] * keep + part.out[i] * add;
    }
  }
}

inline void finish(const AttentionJob& job, int64_t row, int kv_head, int64_t block, const Partial& total) {
  for (int64_t lane = 0; lane < job.rows_of(block); ++lane) {
    const int64_t query_row = block * MOST_LANES + lane, token = query_row / job.group;
    const int64_t head = int64_t(kv_head) * job.group + query_row % job.group;
    float keep = 1.0f, sum = total.sum[lane];
    if (job.sink) {
      const float sink = job.sink[head] * LOG2_E, most = std::fmax(sink, total.largest[lane]);
      keep = std::exp2(total.largest[lane] - most);
      sum = sum * keep + std::exp2(sink - most);
    }
    float* to = job.output + ((row * job.tokens + token) * job.heads + head) * job.dim;
    for (int c = 0; c < job.dim; ++c) to[c] = total.out[lane * job.dim + c] * (keep / sum);
  }
}

inline int64_t scratch_bytes(int) { return SPLIT_KEYS * int64_t{sizeof(float)}; }

constexpr AttentionKernels ATTENTION = {take_token, attend_split, fold, finish, scratch_bytes};

}  // namespace ryzen::reference
