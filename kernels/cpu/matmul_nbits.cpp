#include "matmul_nbits.h"

#include <array>
#include <cmath>
#include <cstring>
#include <system_error>
#include <thread>

#include "round_activations.h"

#define RYZEN_VECTOR_CODE "matmul_nbits.inl"
#include "each_isa.h"

namespace ryzen {
namespace {

constexpr int64_t MOST_SIZE = int64_t{1} << 28;    // of K and of N
constexpr int64_t TASK_BYTES = 64 << 10;           // of weights: some microseconds of memory
constexpr int64_t SERIAL_PACK = 1 << 20;             // bytes of weights that are packed sooner than a thread starts
constexpr std::array<const char*, 9> ACTIVATIONS = {"none",      "relu",       "relu2",   "silu", "gelu",
                                                    "gelu_tanh", "quick_gelu", "sigmoid", "tanh"};

}  // namespace

Activation find_activation(const std::string& name) {
  for (size_t i = 0; i < ACTIVATIONS.size(); ++i) {
    if (name == ACTIVATIONS[i]) return Activation(i);
  }
  refuse("activation is '", name, "', which is not one of those this library has");
}

namespace {

// --- packing

// Four codes of `bits` each, from the low bits of x, to the low bits of four bytes.
uint32_t spread(uint32_t x, int bits) {
  if (bits == 8) return x;
  if (bits == 4) {
    x &= 0xffff;
    x = (x | x << 8) & 0x00ff00ff;
    return (x | x << 4) & 0x0f0f0f0f;
  }
  x &= 0xff;
  x = (x | x << 12) & 0x000f000f;
  return (x | x << 6) & 0x03030303;
}

}  // namespace

int64_t source_row(int64_t panel, int place, int64_t rows, bool gated) {
  if (!gated) {
    const int64_t row = panel * PANEL + place;
    return row < rows ? row : -1;
  }
  const int64_t half = rows / 2, row = panel * LANE_ROWS + place % LANE_ROWS;
  return row < half ? row + place / LANE_ROWS * half : -1;
}

namespace {

float zero_point(const NBitsNode& from, int bits, int64_t blocks, int64_t row, int64_t block) {
  const int64_t row_bytes = (blocks * bits + 7) / 8, bit = block * bits;
  return float(from.zeros[row * row_bytes + bit / 8] >> (bit % 8) & ((1 << bits) - 1));
}

// One row of one block to its place in the panel.
void pack_row(const PackedWeights& w, const NBitsNode& from, int64_t row, int64_t block, int place, uint8_t* to) {
  const float scale = from.scales[row * w.blocks + block];
  std::memcpy(to + place * sizeof scale, &scale, sizeof scale);
  if (w.zeros) {
    const float scaled = scale * zero_point(from, w.bits, w.blocks, row, block);
    std::memcpy(to + (PANEL + place) * sizeof scaled, &scaled, sizeof scaled);
  }
  const int64_t bytes = w.block * w.bits / 8;
  const uint8_t* codes = from.codes + (row * w.blocks + block) * bytes;
  uint8_t* lane = to + w.tiles_at() + place * 4;  // the halves' tiles lie side by side: 32 lanes
  for (int64_t i = 0; i < bytes; i += 4, lane += PANEL * 4) {
    uint32_t source, packed = 0;
    std::memcpy(&source, codes + i, 4);
    for (int bit = 0; bit < 8; bit += w.bits) packed |= spread(source >> (4 * bit), w.bits) << bit;
    std::memcpy(lane, &packed, 4);
  }
}

}  // namespace

// --- the reference: the same arithmetic in plain loops over the same packed weights
namespace scalar {

float activate(float x, Activation activation) {
  switch (activation) {
    case Activation::NONE: return x;
    case Activation::RELU: return x < 0.0f ? 0.0f : x;
    case Activation::RELU2: return x < 0.0f ? 0.0f : x * x;
    case Activation::SILU: return x / (1.0f + std::exp(-x));
    case Activation::GELU: return x * 0.5f * (1.0f + std::erf(x * 0.70710678f));
    case Activation::GELU_TANH: return x * 0.5f * (1.0f + std::tanh(0.79788456f * (x + 0.044715f * x * x * x)));
    case Activation::QUICK_GELU: return x / (1.0f + std::exp(-1.702f * x));
    case Activation::SIGMOID: return 1.0f / (1.0f + std::exp(-x));
    case Activation::TANH: return std::tanh(x);
  }
  return x;
}

// The product of one row, whose codes lie `stride` quads apart, with one row of a panel.
float product(const PackedWeights& w, const RoundedRows& x, const int8_t* codes, int64_t stride, int64_t row,
              int64_t panel, int place) {
  const int split = 8 / w.bits, mask = (1 << w.bits) - 1;
  float total = 0.0f;
  for (int64_t b = 0; b < w.blocks; ++b) {
    const uint8_t* at = w.panel(panel) + b * w.block_bytes();
    int32_t whole = 0;
    for (int64_t k = 0; k < w.block; ++k) {
      const int64_t quad = k / 4, tile = quad / split;
      const int code = at[w.tiles_at() + (tile * PANEL + place) * 4 + k % 4] >> (quad % split * w.bits) & mask;
      whole += code * codes[(b * w.block / 4 + quad) * stride * 4 + k % 4];
    }
    float scale;
    std::memcpy(&scale, at + place * sizeof scale, sizeof scale);
    const float step = x.steps[row * x.blocks + b];
    const int32_t sum = x.sums[row * x.blocks + b];
    if (!w.zeros) whole -= (1 << (w.bits - 1)) * sum;
    total = std::fma(float(whole), scale * step, total);
    if (w.zeros) {
      float scaled_zero;
      std::memcpy(&scaled_zero, at + (PANEL + place) * sizeof scaled_zero, sizeof scaled_zero);
      total = std::fma(-step * float(sum), scaled_zero, total);
    }
  }
  return total;
}

void multiply_panels(const PackedWeights& w, const RoundedRows& x, int64_t rows, int64_t begin, int64_t end,
                     const Epilogue& e) {
  const int width = e.gated ? LANE_ROWS : PANEL;
  for (int64_t first = 0, group; first < rows; first += group) {
    group = group_at(first, rows);
    for (int64_t row = first; row < first + group; ++row) {
      const int8_t* codes = x.codes + first * x.width() + (row - first) * 4;
      for (int64_t panel = begin; panel < end; ++panel) {
        auto value = [&](int place) {
          const float sum = product(w, x, codes, group, row, panel, place);
          return e.bias ? sum + e.bias[panel * PANEL + place] : sum;
        };
        for (int place = 0; place < width && panel * width + place < e.columns; ++place) {
          float y = activate(value(place), e.activation);
          if (e.gated) y *= value(place + LANE_ROWS);
          const int64_t at = row * e.columns + panel * width + place;
          e.out[at] = e.residual ? y + e.residual[at] : y;
        }
      }
    }
  }
}

void take_row(const int8_t* x, int64_t blocks, int64_t block, int64_t group, int8_t* codes, int32_t* sums) {
  for (int64_t b = 0; b < blocks; ++b) {
    sums[b] = 0;
    for (int64_t i = b * block; i < (b + 1) * block; ++i) {
      codes[i / 4 * group * 4 + i % 4] = x[i];
      sums[b] += x[i];
    }
  }
}

void round_row(const float* x, int64_t depth, int64_t blocks, int64_t block, int64_t group, int8_t* codes, float* steps,
               int32_t* sums) {
  int8_t rounded[LARGEST_BLOCK];
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t left = std::min(depth - b * block, block);
    round_block_reference(x + b * block, int(left), int(block), rounded, steps + b);
    take_row(rounded, 1, block, group, codes + b * block * group, sums + b);
  }
}

}  // namespace scalar

const ProductPath& product_path(Isa isa) {
  static const ProductPath paths[] = {
      {scalar::multiply_panels, scalar::round_row, scalar::take_row},
      {avx2::multiply_panels, avx2::round_row, avx2::take_row},
      {avx2_vnni::multiply_panels, avx2_vnni::round_row, avx2_vnni::take_row},
      {avx512_vnni::multiply_panels, avx512_vnni::round_row, avx512_vnni::take_row},
  };
  return paths[int(isa)];
}

namespace {

// A constant of exactly `count` elements.
template <typename T>
const T* constant(const Info& info, size_t index, const char* name, OrtElement element, int64_t count) {
  const Tensor tensor = info.constant(index);
  if (!tensor) refuse(name, " must be a constant");
  const T* data = tensor.as<const T>(element, name);
  if (tensor.shape.count() != count)
    refuse(name, " has the shape ", tensor.shape.text(), ", expected ", count, " elements");
  return data;
}

enum Input : size_t { A, B, SCALES, ZERO_POINTS, G_IDX, BIAS, RESIDUAL, STEPS };

PackedWeights pack(const NBitsNode& node) {
  PackedWeights w = node.form();
  const std::shared_ptr<uint8_t[]> data = allocate_weights(size_t(w.panels * w.panel_bytes()));
  auto pack_panels = [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) node.pack_panel(panel, data.get() + panel * w.panel_bytes());
  };
  in_two_threads(w.panels * w.panel_bytes(), w.panels, pack_panels);
  w.data = data;
  return w;
}

}  // namespace

NBitsNode::NBitsNode(const Info& info)
    : depth(info.integer("K", 0, 1, MOST_SIZE)),
      rows(info.integer("N", 0, 1, MOST_SIZE)),
      block(info.integer("block_size")),
      activation(find_activation(info.text("activation", "none"))),
      gated(info.integer("gated", 0, 0, 1)),
      isa(chosen_isa(info.text("isa", "auto"))) {
  const int64_t width = info.integer("bits", 4);
  if (width != 2 && width != 4 && width != 8) refuse("bits is ", width, ", expected 2, 4 or 8");
  bits = int(width);
  if (block < LEAST_BLOCK || block > LARGEST_BLOCK || block % LEAST_BLOCK)
    refuse("block_size is ", block, ", expected a multiple of ", LEAST_BLOCK, " up to ", LARGEST_BLOCK);
  if (gated && rows % 2) refuse("N is ", rows, ", which gated does not split into halves");
  const size_t inputs = info.inputs();
  if (inputs <= SCALES) refuse("it has ", inputs, " inputs, expected at least 3");
  blocks = (depth + block - 1) / block;
  codes = constant<uint8_t>(info, B, "B", ORT_UINT8, rows * blocks * (block * bits / 8));
  scales = constant<float>(info, SCALES, "scales", ORT_FLOAT, rows * blocks);
  zeros = nullptr;
  if (info.has_input(ZERO_POINTS))
    zeros = constant<uint8_t>(info, ZERO_POINTS, "zero_points", ORT_UINT8, rows * ((blocks * bits + 7) / 8));
  if (info.has_input(G_IDX)) refuse("g_idx, an order of its own for columns, is not supported");
  bias = info.has_input(BIAS) ? constant<float>(info, BIAS, "bias", ORT_FLOAT, rows) : nullptr;
}

int64_t NBitsNode::panels() const {
  const int64_t width = gated ? LANE_ROWS : PANEL;
  return (columns() + width - 1) / width;
}

PackedWeights NBitsNode::form() const {
  PackedWeights w;
  w.bits = bits;
  w.zeros = zeros != nullptr;
  w.block = block;
  w.blocks = blocks;
  w.panels = panels();
  return w;
}

void NBitsNode::pack_panel(int64_t panel, uint8_t* to) const {
  const PackedWeights w = form();
  for (int64_t b = 0; b < w.blocks; ++b, to += w.block_bytes()) {
    for (int place = 0; place < PANEL; ++place) {
      const int64_t row = source_row(panel, place, rows, gated);
      if (row >= 0) {
        pack_row(w, *this, row, b, place, to);
      } else {
        for (int64_t i = 0; i < w.block_bytes(); i += PANEL * 4) std::memset(to + i + place * 4, 0, 4);
      }
    }
  }
}

Bytes NBitsNode::packed_bias(int64_t panels) const {
  if (bias == nullptr) return {};
  Bytes out = allocate(size_t(panels) * PANEL * sizeof(float));
  auto* to = reinterpret_cast<float*>(out.get());
  for (int64_t i = 0; i < panels * PANEL; ++i) {
    const int64_t row = source_row(i / PANEL, int(i % PANEL), rows, gated);
    to[i] = row < 0 ? 0.0f : bias[row];
  }
  return out;
}

void in_two_threads(int64_t bytes, int64_t count, const std::function<void(int64_t, int64_t)>& work) {
  const int64_t half = bytes < SERIAL_PACK ? 0 : count / 2;
  std::thread helper;
  try {
    if (half > 0) helper = std::thread(work, 0, half);
  } catch (const std::system_error&) {  // none to be had: alone, then
    work(0, half);
  }
  work(half, count);
  if (helper.joinable()) helper.join();
}

MatMulNBits::MatMulNBits(const Info& info) : MatMulNBits(NBitsNode(info)) {}

MatMulNBits::MatMulNBits(const NBitsNode& node)
    : depth_(node.depth),
      columns_(node.columns()),
      activation_(node.activation),
      gated_(node.gated),
      path_(product_path(node.isa)),
      weights_(pack(node)),
      bias_(node.packed_bias(weights_.panels)) {}

RoundedRows MatMulNBits::rounded(Context& context, const Tensor& x, const Tensor& given, int64_t rows) const {
  const int64_t block = weights_.block, blocks = weights_.blocks, width = blocks * block;
  const float* floats = given ? nullptr : x.floats("A");
  const int8_t* taken = given ? x.as<const int8_t>(ORT_INT8, "A") : nullptr;
  const float* taken_steps = given ? given.floats("steps") : nullptr;
  return round_in_groups(
      context, rows, block, blocks, [&](int64_t row, int64_t group, int8_t* codes, float* steps, int32_t* sums) {
        if (given) {
          std::memcpy(steps, taken_steps + row * blocks, size_t(blocks) * sizeof(float));
          path_.take_row(taken + row * width, blocks, block, group, codes, sums);
        } else {
          path_.round_row(floats + row * depth_, depth_, blocks, block, group, codes, steps, sums);
        }
      });
}

void MatMulNBits::compute(Context& context) const {
  const Tensor x = context.input(A), residual = context.input(RESIDUAL), steps = context.input(STEPS);
  const int64_t width = steps ? weights_.blocks * weights_.block : depth_;
  if (x.shape.rank == 0 || x.shape.back() != width)
    refuse("A has the shape ", x.shape.text(), ", expected its last dimension to be ", width);
  const int64_t rows = x.shape.count() / width;
  if (steps && steps.shape.count() != rows * weights_.blocks)
    refuse("steps has the shape ", steps.shape.text(), ", expected ", rows, " times ", weights_.blocks, " elements");
  Shape shape = x.shape;
  shape.dims[shape.rank - 1] = columns_;
  if (residual && residual.shape != shape)
    refuse("residual has the shape ", residual.shape.text(), ", expected ", shape.text());
  Epilogue epilogue;
  epilogue.activation = activation_;
  epilogue.gated = gated_;
  epilogue.bias = reinterpret_cast<const float*>(bias_.get());
  epilogue.residual = residual ? residual.floats("residual") : nullptr;
  epilogue.out = context.output<float>(0, shape);
  epilogue.columns = columns_;
  if (rows == 0) return;
  const RoundedRows activations = rounded(context, x, steps, rows);
  // Many small tasks, so that a thread that lost its core to somebody else holds nobody up.
  const int64_t panels = std::max<int64_t>(1, TASK_BYTES / weights_.panel_bytes());
  context.parallel(size_t((weights_.panels + panels - 1) / panels), [&](size_t task) {
    const int64_t begin = int64_t(task) * panels, end = std::min(begin + panels, weights_.panels);
    path_.multiply_panels(weights_, activations, rows, begin, end, epilogue);
  });
}

}  // namespace ryzen
