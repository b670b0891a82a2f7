// SparseMatMulNBits: y = s(x) W^T, where s(x) is x without the channels whose magnitude is below a threshold.
//
// Inputs and attributes are those of our MatMulNBits but for `steps`, with one more:
//
//   threshold   float, not negative: x counts as 0 where |x| < threshold (TEAL, Liu et al., 2024); a NaN does not
//
// Activations are rounded to 8 bits after that. A channel whose codes are 0 in all rows adds nothing to any sum of
// integers, so its weights are not read; what is left is added as MatMulNBits adds it, and results are equal to its
// results over s(x), to the bit, for every number of rows.
//
// Weights therefore lie channel by channel. Memory delivers short runs that begin here and there much slower than one
// stream: a core waits for the first lines of each. So a channel's codes for all outputs lie together, the weights of
// eight active channels are read side by side, and each of the eight runs is asked for before it is reached. Cores share
// the blocks of channels, not the outputs, which would cut the runs; what they have added up, as integers, is scaled and
// added in the order of k in a second step. Where there are many rows hardly a channel is 0 in all of them: panels are
// then put together for the dense product, some at a time.
#pragma once

#include "matmul_nbits.h"

namespace ryzen {

// W as sparse products read it: strips of outputs, each of them as many tiles. A strip has
//   for every tile and block, the tile's scales; where there are zero points, then the products of scale and zero point;
//   for every channel, the outputs' codes: 64 bytes for each tile.
// In a tile's bytes lie the codes of 16 outputs each, SPLIT = 8 / bits of them: byte 16 g + j has in its bits, lowest
// first, output j of the halves SPLIT g, SPLIT g + 1 and so on, halves being those of the panels in their order.
struct StripedWeights {
  int bits = 0;
  bool zeros = false;
  int64_t block = 0;
  int64_t blocks = 0;
  int64_t strips = 0;
  int64_t tiles = 0;  // of a strip
  std::shared_ptr<const uint8_t[]> data;

  int split() const { return 8 / bits; }
  int kinds() const { return zeros ? 2 : 1; }  // of numbers beside the codes
  int64_t tile_outputs() const { return 64 * split(); }
  int64_t tile_panels() const { return tile_outputs() / PANEL; }
  int64_t outputs() const { return tiles * tile_outputs(); }       // of a strip
  int64_t panels() const { return tiles * tile_panels(); }         // of a strip
  int64_t channel_bytes() const { return tiles * 64; }             // in a strip
  int64_t codes_at() const { return tiles * blocks * kinds() * tile_outputs() * int64_t(sizeof(float)); }
  int64_t strip_bytes() const { return codes_at() + blocks * block * channel_bytes(); }
  const uint8_t* strip(int64_t index) const { return data.get() + index * strip_bytes(); }
  // From a strip's begin, in floats: the first number of a tile and block.
  int64_t scales_at(int64_t tile, int64_t b) const { return (tile * blocks + b) * kinds() * tile_outputs(); }

  // Where one of a tile's outputs lies among their sums and scales: four lanes that interleaving makes neighbours stay
  // so.
  int64_t place(int64_t output) const {
    const int64_t half = output / LANE_ROWS, lane = output % LANE_ROWS, chunk = half / split(), part = half % split();
    return (part * 4 + lane / 4) * LANE_ROWS + chunk * 4 + lane % 4;
  }
};

// The channels that some row has a code for, in groups of STREAMS: those of a block one after the other, its last ones
// repeated, with codes of 0, to fill a group.
constexpr int STREAMS = 8;

struct ActiveChannels {
  int64_t rows;
  const int32_t* ends;      // (blocks): groups up to here
  const int32_t* channels;  // (groups, STREAMS)
  const int8_t* codes;      // (groups, rows, STREAMS)
  const float* steps;       // (rows, blocks)
  const int32_t* sums;      // (rows, blocks) of the codes
};

// What is computed in vectors. Null where there are none: the dense product in plain loops is the reference.
struct SparsePath {
  void (*add_blocks)(const StripedWeights&, const ActiveChannels&, int64_t strip, int64_t begin, int64_t end,
                     int32_t* sums);
  void (*finish_tiles)(const StripedWeights&, const ActiveChannels&, int64_t strip, int64_t begin, int64_t end,
                       const int32_t* sums, const Epilogue&);
};

class SparseMatMulNBits {
 public:
  static constexpr const char* NAME = "SparseMatMulNBits";
  static constexpr Port INPUTS[] = {
      {ORT_FLOAT},                // A (..., K)
      {ORT_UINT8},                // B (N, blocks, bytes of a block)
      {ORT_FLOAT},                // scales (N, blocks)
      {ORT_UINT8, ORT_OPTIONAL},  // zero_points (N, bytes of a row's)
      {ORT_INT32, ORT_OPTIONAL},  // g_idx: refused
      {ORT_FLOAT, ORT_OPTIONAL},  // bias (N)
      {ORT_FLOAT, ORT_OPTIONAL},  // residual (..., columns)
  };
  static constexpr Port OUTPUTS[] = {{ORT_FLOAT}};

  explicit SparseMatMulNBits(const Info& info);
  void compute(Context& context) const;

 private:
  SparseMatMulNBits(const Info& info, const NBitsNode& node);
  void few_rows(Context& context, const float* x, int64_t rows, const Epilogue& epilogue) const;
  void many_rows(Context& context, const float* x, int64_t rows, const Epilogue& epilogue) const;
  void round_row(const float* x, int64_t group, int8_t* codes, float* steps, int32_t* sums) const;

  int64_t depth_, columns_;
  Activation activation_;
  bool gated_;
  const ProductPath& path_;
  SparsePath sparse_;
  float threshold_;
  PackedWeights dense_;  // the form of panels, without weights
  StripedWeights weights_;
  Bytes bias_;  // in panel order; null where there is none
};

}  // namespace ryzen
