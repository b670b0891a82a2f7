#include "matmul_ternary.h"

#include <cstring>

#include "memory.h"
#include "round_activations.h"

#define RYZEN_VECTOR_CODE "matmul_ternary.inl"
#include "each_isa.h"

namespace ryzen {
namespace {

constexpr int64_t MOST_K = int64_t{1} << 20;  // sums of 2 x 127 x K fit into 32 bits
constexpr int64_t MOST_N = int64_t{1} << 24;
constexpr int64_t BYTES_PER_TASK = 1 << 16;   // of weights
constexpr int64_t ROWS_PER_TASK = 64;         // rows of A that stay in the second-level cache
constexpr int64_t FLOATS_PER_TASK = 1 << 14;  // to round
constexpr int64_t BLOCK = 128, RUN = BLOCK - 1;  // of codes that are stored for MatMulNBits, and those of them that count

// The same in plain C++, out of the same panels.
void ternary_task_reference(const TernaryTask& task) {
  const TernaryPanels& weights = *task.weights;
  const Epilogue& e = task.epilogue;
  const int width = e.gated ? LANE_ROWS : PANEL;
  for (int64_t row = task.first; row < task.end_row; ++row) {
    const int8_t* codes = task.a.codes + row * task.a.width;
    auto product = [&](int64_t panel, int place) {
      const uint8_t* lane = weights.panel(panel) + place * 4;
      int32_t sum = 0;
      for (int64_t k = 0; k < weights.tiles * TernaryPanels::K_PER_TILE; ++k) {
        const uint8_t byte = lane[k / TernaryPanels::K_PER_TILE * TernaryPanels::PAIR + k % 4];
        sum += (byte >> (k / 4 % 4 * 2) & 3) * codes[k];
      }
      return float(sum - task.a.sums[row]) * task.a.steps[row] * task.scales[panel * PANEL + place];
    };
    for (int64_t panel = task.begin; panel < task.end; ++panel) {
      for (int place = 0; place < width && panel * width + place < e.columns; ++place) {
        float y = scalar::activate(product(panel, place), e.activation);
        if (e.gated) y *= product(panel, place + LANE_ROWS);
        e.out[row * e.columns + panel * width + place] = y;
      }
    }
  }
}

void ternary_round_reference(const float* x, int K, int width, int8_t* codes, float* step, int32_t* sum) {
  round_block_reference(x, K, width, codes, step);
  *sum = 0;
  for (int k = 0; k < width; ++k) *sum += codes[k];
}

struct Kernels {
  void (*product)(const TernaryTask&);
  void (*round)(const float* x, int K, int width, int8_t* codes, float* step, int32_t* sum);
};

Kernels kernels_for(Isa isa) {
  switch (isa) {
    case Isa::AVX512_VNNI: return {avx512_vnni::ternary_task, avx512_vnni::ternary_round};
    case Isa::AVX2_VNNI: return {avx2_vnni::ternary_task, avx2_vnni::ternary_round};
    case Isa::AVX2: return {avx2::ternary_task, avx2::ternary_round};
    case Isa::SCALAR: break;
  }
  return {ternary_task_reference, ternary_round_reference};
}

// Four codes of two bits as bytes.
uint32_t spread(uint8_t byte) {
  uint32_t x = (byte | uint32_t{byte} << 12) & 0x000f000f;
  return (x | x << 6) & 0x03030303;
}

void check(const uint8_t* codes, int64_t count, int least, int most, int64_t n) {
  for (int64_t k = 0; k < count; ++k) {
    if (codes[k] < least || codes[k] > most)
      refuse("packed has code ", int(codes[k]), " in row ", n, ", expected ", least, " to ", most);
  }
}

// One row's codes 0, 1 and 2 to `to`; `room` is for a whole row of what is stored.
void read_row(const Tensor& packed, const uint8_t* bytes, int64_t n, int64_t K, uint8_t* room, uint8_t* to) {
  const int64_t row_bytes = packed.shape.count() / packed.shape[0];
  for (int64_t at = 0; at < row_bytes; ++at) {
    const uint32_t quad = spread(bytes[n * row_bytes + at]);
    std::memcpy(room + at * 4, &quad, 4);
  }
  if (packed.shape.rank == 2) {
    check(room, K, 0, 2, n);
    std::memcpy(to, room, size_t(K));
    return;
  }
  for (int64_t k = 0, block = 0; block < packed.shape[1]; ++block, k += RUN) {
    const uint8_t* codes = room + block * BLOCK;
    const int64_t count = std::min(RUN, K - k);
    check(codes, count, 1, 3, n);
    check(codes + count, BLOCK - count, 2, 2, n);
    for (int64_t i = 0; i < count; ++i) to[k + i] = uint8_t(codes[i] - 1);
  }
}

TernaryPanels pack(const Tensor& packed, const uint8_t* bytes, int64_t N, int64_t K, bool gated) {
  using Panels = TernaryPanels;
  Panels panels;
  panels.tiles = (K + Panels::K_PER_TILE - 1) / Panels::K_PER_TILE;
  const int64_t columns = gated ? N / 2 : N, width = gated ? LANE_ROWS : PANEL;
  panels.panels = (columns + width - 1) / width;
  panels.data = allocate_weights(size_t(panels.panels * panels.bytes()));
  const Bytes room = allocate(size_t(packed.shape.count() / N * 4));
  const Bytes row = allocate(size_t(panels.tiles * Panels::K_PER_TILE));
  for (int64_t panel = 0; panel < panels.panels; ++panel) {
    for (int place = 0; place < PANEL; ++place) {
      std::memset(row.get(), 0, size_t(panels.tiles * Panels::K_PER_TILE));  // rows and columns that pad
      const int64_t n = source_row(panel, place, N, gated);
      if (n >= 0) read_row(packed, bytes, n, K, room.get(), row.get());
      uint8_t* lane = panels.data.get() + panel * panels.bytes() + place * 4;
      for (int64_t tile = 0; tile < panels.tiles; ++tile, lane += Panels::PAIR) {
        uint32_t quads[4];
        std::memcpy(quads, row.get() + tile * Panels::K_PER_TILE, sizeof quads);
        const uint32_t four = quads[0] | quads[1] << 2 | quads[2] << 4 | quads[3] << 6;
        std::memcpy(lane, &four, sizeof four);
      }
    }
  }
  return panels;
}

// One scale for each place of the panels.
Bytes panel_scales(const Tensor& scale, int64_t N, int64_t K, bool gated, int64_t panels) {
  const Shape each{N}, blocks{N, (K + RUN - 1) / RUN};
  if (scale.shape != Shape{1} && scale.shape != each && scale.shape != blocks)
    refuse("scale has the shape ", scale.shape.text(), ", expected (1), (", N, ") or ", blocks.text());
  const float* scales = scale.floats("scale");
  const int64_t step = scale.shape == Shape{1} ? 0 : scale.shape.count() / N;
  for (int64_t n = 0; n < N; ++n) {
    for (int64_t i = 1; i < step; ++i) {
      if (std::memcmp(scales + n * step, scales + n * step + i, sizeof(float)) != 0)
        refuse("scale has different numbers in row ", n);
    }
  }
  Bytes out = allocate(size_t(panels) * PANEL * sizeof(float));
  auto* to = reinterpret_cast<float*>(out.get());
  for (int64_t i = 0; i < panels * PANEL; ++i) {
    const int64_t n = source_row(i / PANEL, int(i % PANEL), N, gated);
    to[i] = n < 0 ? 0.0f : scales[n * step];
  }
  return out;
}

}  // namespace

MatMulTernary::MatMulTernary(const Info& info)
    : isa_(chosen_isa(info.text("isa", "auto"))),
      K_(info.integer("K", 0, 1, MOST_K)),
      columns_(info.integer("N", 0, 1, MOST_N)),
      activation_(find_activation(info.text("activation", "none"))),
      gated_(info.integer("gated", 0, 0, 1)) {
  const int64_t N = columns_;
  if (gated_ && N % 2) refuse("N is ", N, ", which gated does not split into halves");
  const Tensor packed = info.constant(1), scale = info.constant(2);
  if (!packed) refuse("packed is computed by the graph, expected an initializer");
  if (!scale) refuse("scale is computed by the graph, expected an initializer");
  const Shape dense{N, (K_ + 3) / 4}, blocks{N, (K_ + RUN - 1) / RUN, BLOCK / 4};
  if (packed.shape != dense && packed.shape != blocks)
    refuse("packed has the shape ", packed.shape.text(), ", expected ", dense.text(), " or ", blocks.text());
  weights_ = pack(packed, packed.as<const uint8_t>(ORT_UINT8, "packed"), N, K_, gated_);
  scales_ = panel_scales(scale, N, K_, gated_, weights_.panels);
  if (gated_) columns_ /= 2;
}

void MatMulTernary::compute(Context& context) const {
  const Tensor A = context.input(0);
  if (A.shape.rank < 1 || A.shape.rank > 4) refuse("A has ", A.shape.rank, " dimensions, expected 1 to 4");
  if (A.shape.back() != K_) refuse("A has the shape ", A.shape.text(), ", expected (..., ", K_, ")");
  const float* x = A.floats("A");
  const int64_t rows = A.shape.count() / K_, width = whole_lines(K_);
  Shape shape = A.shape;
  shape.dims[shape.rank - 1] = columns_;
  Epilogue epilogue;
  epilogue.activation = activation_;
  epilogue.gated = gated_;
  epilogue.out = context.output<float>(0, shape);
  epilogue.columns = columns_;
  if (rows == 0) return;

  const Kernels kernels = kernels_for(isa_);
  uint8_t* room = scratch<TernaryRows>(size_t(rows * (width + int64_t(sizeof(float) + sizeof(int32_t)))));
  float* steps = reinterpret_cast<float*>(room + rows * width);
  const TernaryRows a{reinterpret_cast<int8_t*>(room), steps, reinterpret_cast<int32_t*>(steps + rows), width};
  const int64_t rounded_per_task = std::max<int64_t>(1, FLOATS_PER_TASK / width);
  auto round = [&](size_t index) {
    const int64_t begin = int64_t(index) * rounded_per_task, end = std::min(rows, begin + rounded_per_task);
    for (int64_t row = begin; row < end; ++row)
      kernels.round(x + row * K_, int(K_), int(width), a.codes + row * width, a.steps + row, a.sums + row);
  };
  context.parallel(size_t((rows + rounded_per_task - 1) / rounded_per_task), round);

  const int64_t panels_per_task = std::max<int64_t>(1, BYTES_PER_TASK / weights_.bytes());
  const int64_t ranges = (weights_.panels + panels_per_task - 1) / panels_per_task;
  const int64_t chunks = (rows + ROWS_PER_TASK - 1) / ROWS_PER_TASK;
  auto product = [&](size_t index) {
    TernaryTask task{};
    task.weights = &weights_;
    task.begin = int64_t(index) % ranges * panels_per_task;
    task.end = std::min(weights_.panels, task.begin + panels_per_task);
    task.a = a;
    task.first = int64_t(index) / ranges * ROWS_PER_TASK;
    task.end_row = std::min(rows, task.first + ROWS_PER_TASK);
    task.scales = reinterpret_cast<const float*>(scales_.get());
    task.epilogue = epilogue;
    kernels.product(task);
  };
  context.parallel(size_t(chunks * ranges), product);
}

}  // namespace ryzen
