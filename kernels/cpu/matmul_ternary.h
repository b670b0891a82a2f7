// MatMulTernary: y = x W^T with weights of -1, 0 and +1 (BitNet b1.58).
//
//   MatMulTernary(A, packed, scale) -> (..., columns)
//
//   A       float (..., K), of rank 1 to 4
//   packed  uint8, an initializer, four codes of two bits in a byte, the first in its lowest:
//           (N, ceil(K / 4)): codes 0, 1 and 2 stand for -1, 0 and +1; what fills up the last byte is not read
//           (N, ceil(K / 127), 32): codes 1, 2 and 3 do, in blocks of 127 and one code that must be 2; so must be those
//           behind K. That is how MatMulNBits reads them, to which each block shows the row's largest magnitude there.
//   scale   float, an initializer: (1), (N), or (N, ceil(K / 127)) of equal numbers in a row
//   K, N    the product's lengths
//   gated, activation   as of our MatMulNBits: columns are N, or N / 2 where it is gated
//   isa     see isa.h
//
// A row of A is rounded to 8 bits with one step, max|x| / 127 (round_activations.h). Its products are then exact
// integers, so before an activation all instruction sets give the same bits, and a row's result does not depend on the
// rows beside it.
#pragma once

#include <memory>

#include "isa.h"
#include "matmul_nbits.h"
#include "op.h"

namespace ryzen {

// Weights as they are streamed: panels of 32 rows (PANEL, in the order of source_row), each of them pairs of tiles of 64
// bytes, for its first and second 16 rows. In a tile every lane has a row, and a lane's byte j has the codes 0, 1 and 2
// for k = j, 4 + j, 8 + j and 12 + j behind the tile's first k, the first in the lowest bits.
struct TernaryPanels {
  static constexpr int K_PER_TILE = 16, PAIR = 2 * 64;

  int64_t tiles = 0;   // pairs in a panel
  int64_t panels = 0;
  std::shared_ptr<uint8_t[]> data;

  int64_t bytes() const { return tiles * PAIR; }  // of a panel
  const uint8_t* panel(int64_t index) const { return data.get() + index * bytes(); }
};

// Rows of A in 8 bits, each filled up with zeros to whole cache lines.
struct TernaryRows {
  int8_t* codes;
  float* steps;
  int32_t* sums;  // of a row's codes
  int64_t width;
};

// What one task computes: rows [first, end_row) of A against the panels [begin, end).
struct TernaryTask {
  const TernaryPanels* weights;
  int64_t begin, end;
  TernaryRows a;
  int64_t first, end_row;
  const float* scales;  // (panels, PANEL)
  Epilogue epilogue;
};

class MatMulTernary {
 public:
  static constexpr const char* NAME = "MatMulTernary";
  static constexpr Port INPUTS[] = {{ORT_FLOAT}, {ORT_UINT8}, {ORT_FLOAT}};
  static constexpr Port OUTPUTS[] = {{ORT_FLOAT}};

  explicit MatMulTernary(const Info& info);
  void compute(Context& context) const;

 private:
  Isa isa_;
  int64_t K_, columns_;
  Activation activation_;
  bool gated_;
  TernaryPanels weights_;
  Bytes scales_;  // in panel order
};

}  // namespace ryzen
