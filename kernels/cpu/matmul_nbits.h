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

#include <algorithm>
#include <cstdint>
#include <functional>
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
  int64_t first = 0;  // the panel that `data` begins with
  std::shared_ptr<const uint8_t[]> data;

  int64_t tiles_at() const { return (zeros ? 2 : 1) * PANEL * int64_t(sizeof(float)); }  // bytes into a block
  int64_t block_bytes() const { return tiles_at() + PANEL * block * bits / 8; }
  int64_t panel_bytes() const { return blocks * block_bytes(); }
  const uint8_t* panel(int64_t index) const { return data.get() + (index - first) * panel_bytes(); }
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

// The size of the group that begins at `row`, of `rows` in all: a power of two, or the last three, which read each
// panel once together.
inline int64_t group_at(int64_t row, int64_t rows) {
  if (rows - row == 3) return 3;
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

// A node's attributes and constants, checked; what this operator and SparseMatMulNBits read alike.
struct NBitsNode {
  int64_t depth, rows;  // K and N
  int64_t block, blocks;
  int bits;
  Activation activation;
  bool gated;
  Isa isa;
  const uint8_t* codes;
  const float* scales;
  const uint8_t* zeros;  // null: the middle
  const float* bias;     // null: none

  explicit NBitsNode(const Info& info);
  int64_t columns() const { return gated ? rows / 2 : rows; }
  // Panels that hold all columns.
  int64_t panels() const;
  // The form of the weights without the weights.
  PackedWeights form() const;
  // One panel's blocks, in memory of form().panel_bytes().
  void pack_panel(int64_t panel, uint8_t* to) const;
  // The bias in the order of `panels` panels; null where there is none.
  Bytes packed_bias(int64_t panels) const;
};

// What is computed in vectors, by instruction set.
struct ProductPath {
  void (*multiply_panels)(const PackedWeights&, const RoundedRows&, int64_t rows, int64_t begin, int64_t end,
                          const Epilogue&);
  void (*round_row)(const float* x, int64_t depth, int64_t blocks, int64_t block, int64_t group, int8_t* codes,
                    float* steps, int32_t* sums);
  void (*take_row)(const int8_t* x, int64_t blocks, int64_t block, int64_t group, int8_t* codes, int32_t* sums);
};

const ProductPath& product_path(Isa isa);

// work(begin, end) over `count` parts that make `bytes`: a second thread does half of what is much, because a session
// that opens has no pool to lend yet.
void in_two_threads(int64_t bytes, int64_t count, const std::function<void(int64_t, int64_t)>& work);

// `rows` rows of activations in groups. round(row, group, codes, steps, sums) rounds one: its first four codes are at
// `codes`, the next four `group` rows behind; the other two are the row's own. Valid until this thread's next call.
template <typename Round>
RoundedRows round_in_groups(Context& context, int64_t rows, int64_t block, int64_t blocks, const Round& round) {
  constexpr int64_t SERIAL_ELEMENTS = 16 << 10;  // that are rounded sooner than a thread is woken
  const int64_t width = blocks * block;
  // One allocation: codes first, which are the widest.
  struct Rounded;
  uint8_t* room = scratch<Rounded>(size_t(whole_lines(rows * width)) + 2 * size_t(rows * blocks) * sizeof(float));
  auto* codes = reinterpret_cast<int8_t*>(room);
  auto* steps = reinterpret_cast<float*>(room + whole_lines(rows * width));
  auto* sums = reinterpret_cast<int32_t*>(steps + rows * blocks);
  auto task = [&](size_t index) {  // GROUP rows, which may be several groups at the end
    const int64_t begin = int64_t(index) * GROUP, end = std::min(begin + GROUP, rows);
    for (int64_t first = begin, group; first < end; first += group) {
      group = group_at(first, rows);
      for (int64_t row = first; row < first + group; ++row) {
        round(row, group, codes + first * width + (row - first) * 4, steps + row * blocks, sums + row * blocks);
      }
    }
  };
  const int64_t tasks = (rows + GROUP - 1) / GROUP;
  if (rows * width <= SERIAL_ELEMENTS) {
    for (int64_t index = 0; index < tasks; ++index) task(size_t(index));
  } else {
    context.parallel(size_t(tasks), task);
  }
  return {block, blocks, codes, steps, sums};
}

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
  explicit MatMulNBits(const NBitsNode& node);
  RoundedRows rounded(Context& context, const Tensor& x, const Tensor& steps, int64_t rows) const;

  int64_t depth_, columns_;
  Activation activation_;
  bool gated_;
  const ProductPath& path_;
  PackedWeights weights_;
  Bytes bias_;  // in panel order; null where there is none
};

}  // namespace ryzen
