// One run of GroupQueryAttention as its steps see it: plain numbers and pointers, checked before.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ryzen {

// How the channels of a key or value are stored.
enum class CacheFormat : int { F32, F16, I8, I4 };

constexpr int BLOCK_KEYS = 128;     // scored at once; blocks begin at multiples of this in every cache
constexpr int SPLIT_KEYS = 512;     // one partial result; a whole number of blocks
constexpr int MOST_LANES = 32;      // query rows that share one read of the cache
constexpr int MOST_DIM = 1024;       // channels of a head
constexpr int MOST_INTEGER_DIM = 256;  // channels whose products with 15-bit queries fit 32 bits
constexpr float LOWEST = -3.0e38f;  // the score of a key that a row may not see
constexpr float LOG2_E = 1.44269504088896341f;

static_assert(SPLIT_KEYS % BLOCK_KEYS == 0, "a split is made of whole blocks");

// One row of the batch: where its tokens stand and where its keys and values lie.
struct Sequence {
  int64_t past;         // absolute position of its first new token
  int64_t first;        // absolute position of stored row 0
  int64_t append_at;    // the stored row that the first new token takes
  int64_t rows;         // stored rows that may be read, the new ones included
  uint8_t *keys, *values;  // of KV head 0
  int64_t head_bytes;   // from one KV head to the next
  float *key_steps, *value_steps;  // of KV head 0, where every token has scales of its own
  int64_t head_steps;              // from one KV head to the next
};

struct AttentionJob {
  // Sizes.
  int64_t batch, tokens;
  int heads, kv_heads, group, dim;  // group: query heads that share one KV head
  // The new tokens: (batch, tokens, ...), the distance from one token to the next in floats.
  const float *query, *key, *value;
  int64_t query_stride, key_stride;
  // What happens to them: normalised where weights are given, then rotated where tables are given.
  const float *q_norm, *k_norm;
  float norm_epsilon;
  const float *cos, *sin;
  int half;  // columns of the tables
  bool interleaved;
  // The cache.
  CacheFormat format;
  int64_t row_bytes;
  int scale_group;  // channels that share one of a token's own scales, 0: scales are fixed per channel
  const float *k_scale, *v_scale, *k_inverse, *v_inverse;  // (kv_heads, dim), where fixed
  const Sequence* sequences;
  // Attention. Scores are in units of log2; with a soft cap c they are c * tanh(query_factor * q.k), else
  // query_factor * q.k.
  float query_factor, softcap;  // softcap in units of log2, 0: none
  int64_t window;               // 0: none
  const float* sink;            // (heads), or null
  bool integers;                // scores and sums in integer dot products
  // Query rows of one KV head, token by token: blocks of MOST_LANES, the last one as narrow as it may be.
  int64_t query_rows, blocks, query_bytes;  // query_bytes: of all blocks of one (batch row, KV head)
  uint8_t* queries;
  const int* value_order;  // integers: the channel at each place of a sum
  float* output;           // (batch, tokens, heads * dim)

  int64_t rows_of(int64_t block) const {
    const int64_t left = query_rows - block * MOST_LANES;
    return left < MOST_LANES ? left : MOST_LANES;
  }
  int lanes_of(int64_t block) const {
    const int64_t rows = rows_of(block);
    return rows <= 8 ? 8 : rows <= 16 ? 16 : 32;
  }
  // Bytes that one lane of a query block takes: floats, or two bytes a channel, a scale and a correction.
  int64_t lane_bytes() const { return integers ? 2 * dim + 8 : 4 * dim; }
  uint8_t* queries_of(int64_t row, int64_t kv_head, int64_t block) const {
    return queries + (row * kv_heads + kv_head) * query_bytes + block * MOST_LANES * lane_bytes();
  }
};

// The state of a block of query rows: for every lane the largest score, the sum of the weights relative to it, and the
// weighted sum of values; `out` is (lanes, dim).
struct Partial {
  float *largest, *sum, *out;

  static int64_t floats(int lanes, int dim) { return int64_t{lanes} * (dim + 2); }
  static Partial at(float* data, int lanes) { return {data, data + lanes, data + 2 * lanes}; }
};

// The steps of the operator in one instruction set. `scratch` has scratch_bytes(dim), aligned to a cache line.
struct AttentionKernels {
  void (*take_token)(const AttentionJob&, int64_t row, int64_t token);
  void (*attend_split)(const AttentionJob&, int64_t row, int kv_head, int64_t block, int64_t split, uint8_t* scratch,
                       const Partial& part);
  void (*fold)(int lanes, int dim, const Partial& total, const Partial& part);
  void (*finish)(const AttentionJob&, int64_t row, int kv_head, int64_t block, const Partial& total);
  int64_t (*scratch_bytes)(int dim);
};

}  // namespace ryzen
