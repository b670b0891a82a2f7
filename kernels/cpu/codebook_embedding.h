// CodebookEmbedding: rows of a table that is stored as codes into small codebooks.
//
//   CodebookEmbedding(ids, codes, codebook, scales?, gain?, offset?, slots?, kept?) -> (..., C)
//
//   ids       int64, of up to 7 dimensions; from 0 to V - 1, anything else is an error. (ONNX's Gather, which stands in
//             for this operator, takes -V to -1 as well and counts them from the end.)
//   codes     uint8 (V, ceil(stages * C / dim * bits / 8)): a row's codes of `bits` bits without gaps, lowest bits of a
//             byte first; one code for every `dim` channels, all of the first stage, then all of the second
//   codebook  float (stages, 2^bits, dim): 1 or 2 stages; dim 1, 2, 4 or 8
//   scales    float16 (V, C / group), one for every `group` channels
//   gain      float (C)
//   offset    float (C)
//   slots     int16 (V): where in `kept` a row is, or -1 (as any negative number) for a row that is coded; a slot
//             beyond `kept` is an error when its row is asked for
//   kept      float16 or float (n, C), n up to 32767; given where slots are
//   bits      1 to 8
//   width     C, a multiple of dim, up to 2^20
//   group     channels that share a scale, a divisor of C; 0 (the default): all of a row
//   isa       see isa.h
//
// A channel of a coded row is ((entry of the first stage + entry of the second) * scale) * gain + offset in float32,
// each step rounded, without what is absent; one of a kept row is what is kept, widened. All instruction sets give the
// same bits.
#pragma once

#include "isa.h"
#include "op.h"

namespace ryzen {

// What rows are decoded from; what is absent is null.
struct CodebookTable {
  const uint8_t *codes, *end;  // up to `end`, where they end, may be read
  const float* codebook;
  const uint16_t* scales;
  const float *gain, *offset;
  const int16_t* slots;
  const uint8_t* kept;
  bool kept_halves;   // float16, not float
  int64_t row_bytes;  // of codes
  int bits, dim, stages, C, group;

  int groups() const { return C / group; }
  int64_t kept_row_bytes() const { return int64_t{C} * (kept_halves ? 2 : 4); }
};

class CodebookEmbedding {
 public:
  static constexpr const char* NAME = "CodebookEmbedding";
  static constexpr Port INPUTS[] = {
      {ORT_INT64},                    // ids
      {ORT_UINT8},                    // codes
      {ORT_FLOAT},                    // codebook
      {ORT_FLOAT16, ORT_OPTIONAL},    // scales
      {ORT_FLOAT, ORT_OPTIONAL},      // gain
      {ORT_FLOAT, ORT_OPTIONAL},      // offset
      {ORT_INT16, ORT_OPTIONAL},      // slots
      {ORT_UNDEFINED, ORT_OPTIONAL},  // kept
  };
  static constexpr Port OUTPUTS[] = {{ORT_FLOAT}};

  explicit CodebookEmbedding(const Info& info);
  void compute(Context& context) const;

 private:
  // The inputs behind ids; absent are those that the node has not, and until it runs those that are no constants.
  struct Inputs {
    Tensor codes, codebook, scales, gain, offset, slots, kept;

    // Reads those that are still absent.
    template <typename At>
    void read(const At& at) {
      size_t index = 1;
      for (Tensor* tensor : {&codes, &codebook, &scales, &gain, &offset, &slots, &kept}) {
        if (!*tensor) *tensor = at(index);
        ++index;
      }
    }
  };

  void check_rank(const Inputs& in) const;
  void check_codes(const Inputs& in) const;
  void check_scaling(const Inputs& in) const;
  void check_kept(const Inputs& in) const;
  CodebookTable table(const Inputs& in) const;

  Isa isa_;
  int bits_, width_, group_;
  Inputs constants_;  // held here: asking the runtime for them takes as long as decoding several rows
};

}  // namespace ryzen
