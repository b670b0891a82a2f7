// CodebookEmbedding: rows of a table that is stored as codes into small codebooks.
//
//   CodebookEmbedding(ids, codes, codebook, scales?) -> (..., C)
//
//   ids       int64 or int32, any shape; from 0 to V - 1, anything else is an error
//   codes     uint8 (V, ceil(stages * C / dim * bits / 8)): a row's codes of `bits` bits without gaps, lowest bits of a
//             byte first; one code for every `dim` channels, all of the first stage, then all of the second
//   codebook  float (stages, 2^bits, dim)
//   scales    float (V), one for a row, or (V, ceil(C / scale_group)), one for every scale_group channels
//   bits      1 to 8
//   dim       1 (the default), 2, 4 or 8
//   stages    1 (the default) or 2
//   width     C, a multiple of dim
//   scale_group  0 (the default) where a row has one scale
//   isa       see isa.h
//
// A channel is the sum of its stages' entries, times the scale. All instruction sets give the same bits.
#pragma once

#include "isa.h"
#include "op.h"

namespace ryzen {

// One row to decode.
struct CodebookRow {
  const uint8_t *codes, *end;  // the row's, and where the whole table's end: up to there may be read
  const float* codebook;
  const float* scales;  // the row's, or null
  float* out;
  int bits, dim, stages, C, scale_group;
};

class CodebookEmbedding {
 public:
  static constexpr const char* NAME = "CodebookEmbedding";
  static constexpr Port INPUTS[] = {{ORT_UNDEFINED}, {ORT_UINT8}, {ORT_FLOAT}, {ORT_FLOAT, ORT_OPTIONAL}};
  static constexpr Port OUTPUTS[] = {{ORT_FLOAT}};

  explicit CodebookEmbedding(const Info& info);
  void compute(Context& context) const;

 private:
  int64_t row_bytes() const { return (int64_t{stages_} * (width_ / dim_) * bits_ + 7) / 8; }
  int64_t scales_of_a_row() const { return scale_group_ ? (width_ + scale_group_ - 1) / scale_group_ : 1; }
  void check_codes(const Tensor& codes) const;
  void check_codebook(const Tensor& codebook) const;
  void check_scales(const Tensor& scales, int64_t V) const;

  Isa isa_;
  int bits_, dim_, stages_, width_, scale_group_;
};

}  // namespace ryzen
