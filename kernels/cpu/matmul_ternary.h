// MatMulTernary: y = x W^T with weights of -1, 0 and +1 (BitNet b1.58).
//
//   MatMulTernary(A, packed, scale) -> (..., N)
//
//   A       float (..., K), of rank 1 to 4
//   packed  uint8 (N, ceil(K / 4)), an initializer: codes of two bits, the first in a byte's lowest; 0, 1 and 2 stand
//           for -1, 0 and +1; what fills up the last byte is not read
//   scale   float (1) or (N)
//   K, N    the product's lengths
//   isa     see isa.h
//
// A row of A is rounded to 8 bits with one step, max|x| / 127 (round_activations.h). Its products are then exact
// integers, so all instruction sets give the same bits, and a row's result does not depend on the rows beside it.
#pragma once

#include <memory>

#include "isa.h"
#include "op.h"

namespace ryzen {

// Weights as they are streamed: panels of 16 rows, each of them tiles of 64 bytes. In a tile every lane has a row, and
// a lane's byte j has the codes for k = j, 4 + j, 8 + j and 12 + j behind the tile's first k, the first in the lowest
// bits.
struct TernaryPanels {
  static constexpr int ROWS = 16, K_PER_TILE = 16, TILE = 64;

  int64_t tiles = 0;   // of a panel
  int64_t panels = 0;
  std::shared_ptr<uint8_t[]> data;

  int64_t width() const { return tiles * K_PER_TILE; }
  const uint8_t* panel(int64_t index) const { return data.get() + index * tiles * TILE; }
};

// Rows of A in 8 bits, each filled up with zeros to whole tiles.
struct TernaryRows {
  int8_t* codes;
  float* steps;
  int32_t* sums;  // of a row's codes
  int64_t width;
};

// What one task computes: `rows` rows of A against the panels [begin, end). All pointers are to the first row.
struct TernaryTask {
  const TernaryPanels* weights;
  int64_t begin, end;
  TernaryRows a;
  int64_t rows;
  const float* scales;
  bool scale_per_row;  // of W; else there is one
  float* out;
  int64_t N;
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
  int64_t K_, N_;
  TernaryPanels weights_;
};

}  // namespace ryzen
