// GroupQueryAttention: com.microsoft's operator of that name, for a processor's caches.
//
//   GroupQueryAttention(query, key?, value?, past_key, past_value, seqlens_k, total_sequence_length, cos_cache?,
//                       sin_cache?, position_ids?, attention_bias?, head_sink?, k_scale?, v_scale?, q_norm_weight?,
//                       k_norm_weight?) -> (output, present_key, present_value, present_k_scale?, present_v_scale?)
//
// with its attributes num_heads, kv_num_heads, scale, softcap, local_window_size, do_rotary, rotary_interleaved,
// k_quant_type, v_quant_type, kv_cache_bit_width, sliding_window_cache, qk_norm_epsilon; refused where used:
// position_ids, attention_bias, smooth_softmax, qk_output, causal = 0. Beyond the original:
//
//   several new tokens behind a filled cache, for any batch: row b has seqlens_k[b] + 1 - tokens of them before
//   q_norm_weight, k_norm_weight (head size): RMS norms of every head, before the rotation
//   kv_group > 0   every stored token has scales of its own, one for so many channels: k_scale and v_scale are
//                  (B, K, S, D / kv_group) and come out again as present_k_scale and present_v_scale
//   isa            see isa.h
//
// The caches are (B, K, S, D): float32, float16, int8, or uint8 with two 4-bit codes in a byte. Where present is bound
// to past's buffer, tokens are appended in place. Head sizes are multiples of 8.
//
// Arithmetic: the cache is read once for all query rows that share a KV head, in splits of SPLIT_KEYS stored rows whose
// results are merged in their order, so that neither the threads nor the other rows of the batch change a result. With
// AVX-512 VNNI, int8 and int4 caches are never widened: queries are rounded to 15 bits and weights to 16, each in two
// bytes.
#pragma once

#include "attention_job.h"
#include "isa.h"
#include "op.h"

namespace ryzen {

class GroupQueryAttention {
 public:
  static constexpr const char* NAME = "GroupQueryAttention";
  explicit GroupQueryAttention(const Info& info);
  void compute(Context& context) const;

 private:
  struct Run;

  Isa isa_;
  int heads_, kv_heads_, bits_, kv_group_;
  float scale_, softcap_, norm_epsilon_;
  int64_t window_;
  bool rotate_, interleaved_, rolling_, quantized_, per_channel_;
};

// The operator for caches of one element type: ONNX Runtime tells overloads of a name apart by their types, and would
// not know the type of an output that may have several.
template <OrtElement CACHE>
class GroupQueryAttentionOf : public GroupQueryAttention {
 public:
  static constexpr Port INPUTS[] = {
      {ORT_FLOAT},                      // query
      {ORT_FLOAT, ORT_OPTIONAL},        // key
      {ORT_FLOAT, ORT_OPTIONAL},        // value
      {CACHE},                          // past_key
      {CACHE},                          // past_value
      {ORT_INT32},                      // seqlens_k
      {ORT_INT32},                      // total_sequence_length
      {ORT_FLOAT, ORT_OPTIONAL},        // cos_cache
      {ORT_FLOAT, ORT_OPTIONAL},        // sin_cache
      {ORT_INT64, ORT_OPTIONAL},        // position_ids
      {ORT_FLOAT, ORT_OPTIONAL},        // attention_bias
      {ORT_FLOAT, ORT_OPTIONAL},        // head_sink
      {ORT_FLOAT, ORT_OPTIONAL},        // k_scale
      {ORT_FLOAT, ORT_OPTIONAL},        // v_scale
      {ORT_FLOAT, ORT_OPTIONAL},        // q_norm_weight
      {ORT_FLOAT, ORT_OPTIONAL},        // k_norm_weight
  };
  static constexpr Port OUTPUTS[] = {
      {ORT_FLOAT}, {CACHE}, {CACHE}, {ORT_FLOAT, ORT_OPTIONAL}, {ORT_FLOAT, ORT_OPTIONAL}};

  using GroupQueryAttention::GroupQueryAttention;
};

}  // namespace ryzen
