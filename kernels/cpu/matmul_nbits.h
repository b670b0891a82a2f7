// MatMulNBits: y = x W^T with W (N, K) in 2, 4 or 8 bits, one scale (and zero point) per block of a row.
//
// Inputs and attributes are those of com.microsoft's operator of the same name, so that a node is replaced by changing
// its domain. What this one adds: an activation, gated (SwiGLU, GeGLU) or not, and a residual behind the product;
// activations that a norm has already rounded; and `isa`.
//
// Activations are rounded to 8 bits over blocks of the weights' length, each block by its own largest magnitude, as
// accuracy_level 4 says. Sums within a block are exact integers; blocks are added in float32 in the order of k. A row's
// product thus does not depend on the rows beside it, on the tasks, or on the instruction set.
#pragma once

#include <cstdint>
#include <string>

#include "isa.h"
#include "memory.h"
#include "op.h"

namespace ryzen {

enum class Activation : int { NONE, RELU, RELU2, SILU, GELU, GELU_TANH, QUICK_GELU, SIGMOID, TANH };

constexpr int PANEL = 32;  // rows of W that are streamed together
constexpr int LANE_ROWS = 16;
constexpr int HALVES = PANEL / LANE_ROWS;
constexpr int LEAST_BLOCK = 32;

// W as it is streamed: panels of 32 rows one after the other, each a sequence of blocks. A block is 32 scales; where
// there are zero points, 32 products of scale and zero point; and the codes: tiles of 64 bytes for the first and the
// second 16 rows in turn, in each of the tile's 16 lanes four neighbours in k, and in the bits of each byte as many
// such quads as fit, the earlier in the lower bits. Rows that pad have zeros. Where the product is gated, a panel's
// first half is the gate of 16 columns and its second half what is gated.
struct PackedWeights {
  int bits = 0;
  bool zeros = false;
  int64_t block = 0;
  int64_t blocks = 0;  // of a row
  int64_t panels = 0;
  std::shared_ptr<const uint8_t[]> data;

  int64_t tiles_at() const { return (zeros ? 2 : 1) * PANEL * int64_t(sizeof(float)); }  // bytes into a block
  int64_t block_bytes() const { return tiles_at() + PANEL * block * bits / 8; }
  int64_t panel_bytes() const { return blocks * block_bytes(); }
  const uint8_t* panel(int64_t index) const { return data.get() + index * panel_bytes(); }
};

// Rows of activations in 8 bits. Rows lie in groups of GROUP, the last ones in groups of half of that and so on, so
// that what is multiplied together is read together: a group is its rows' first four codes, one row after the other,
// then the next four. `steps` and `sums` of the codes are (rows, blocks).
constexpr int GROUP = 8;

struct RoundedRows {
  int64_t block;
  int64_t blocks;
  const int8_t* codes;
  const float* steps;
  const int32_t* sums;

  int64_t width() const { return blocks * block; }
};

// The size of the group that begins at `row`, of `rows` in all.
inline int64_t group_at(int64_t row, int64_t rows) {
  int64_t size = GROUP;
  while (row + size > rows) size /= 2;
  return size;
}

// What happens behind the product, and where it goes. `columns` are those of the output: half of N where it is gated.
struct Epilogue {
  Activation activation = Activation::NONE;
  bool gated = false;
  const float* bias = nullptr;      // (panels, PANEL)
  const float* residual = nullptr;  // (rows, columns)
  float* out = nullptr;             // (rows, columns)
  int64_t columns = 0;
};

// By its name; throws Refused for a name that is none.
Activation find_activation(const std::string& name);

namespace scalar {
float activate(float x, Activation activation);
}

// The row of W at one of a panel's PANEL places; -1 pads.
int64_t source_row(int64_t panel, int place, int64_t rows, bool gated);

class MatMulNBits {
 public:
  static constexpr const char* NAME = "MatMulNBits";
  static constexpr Port INPUTS[] = {
      {ORT_UNDEFINED},              // A (..., K) float, or int8 (..., blocks * block) with steps
      {ORT_UINT8},                  // B (N, blocks, bytes of a block)
      {ORT_FLOAT},                  // scales (N, blocks)
      {ORT_UINT8, ORT_OPTIONAL},    // zero_points (N, bytes of a row's)
      {ORT_INT32, ORT_OPTIONAL},    // g_idx: refused
      {ORT_FLOAT, ORT_OPTIONAL},    // bias (N)
      {ORT_FLOAT, ORT_OPTIONAL},    // residual (..., columns)
      {ORT_FLOAT, ORT_OPTIONAL},    // steps (..., blocks)
  };
  static constexpr Port OUTPUTS[] = {{ORT_FLOAT}};

  explicit MatMulNBits(const Info& info);
  void compute(Context& context) const;

 private:
  RoundedRows rounded(Context& context, const Tensor& x, const Tensor& steps, int64_t rows) const;

  int64_t depth_, columns_;
  Activation activation_;
  bool gated_;
  Isa isa_;
  PackedWeights weights_;
  Bytes bias_;  // in panel order; null where there is none
};

}  // namespace ryzen
