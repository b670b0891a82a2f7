#include "matmul_ternary.h"

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

// The same in plain C++, out of the same panels.
void ternary_task_reference(const TernaryTask& task) {
  const TernaryPanels& weights = *task.weights;
  for (int64_t row = 0; row < task.rows; ++row) {
    const int8_t* codes = task.a.codes + row * task.a.width;
    for (int64_t n = task.begin * TernaryPanels::ROWS; n < std::min(task.N, task.end * TernaryPanels::ROWS); ++n) {
      const uint8_t* tile = weights.panel(n / TernaryPanels::ROWS) + n % TernaryPanels::ROWS * 4;
      int32_t sum = 0;
      for (int64_t k = 0; k < weights.width(); ++k) {
        const uint8_t byte = tile[k / TernaryPanels::K_PER_TILE * TernaryPanels::TILE + k % 4];
        sum += (byte >> (k / 4 % 4 * 2) & 3) * codes[k];
      }
      const float exact = float(sum - task.a.sums[row]);
      task.out[row * task.N + n] = exact * task.a.steps[row] * task.scales[task.scale_per_row ? n : 0];
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

// Four codes of two bits; throws Refused for the one that stands for nothing.
void check_byte(uint8_t byte, int used, int64_t n, int64_t k) {
  for (int i = 0; i < used; ++i) {
    if ((byte >> (2 * i) & 3) == 3) refuse("packed has code 3 for row ", n, " and k = ", k + i, ", expected 0, 1 or 2");
  }
}

TernaryPanels pack(const uint8_t* packed, int64_t N, int64_t K) {
  using Panels = TernaryPanels;
  Panels panels;
  panels.tiles = (K + Panels::K_PER_TILE - 1) / Panels::K_PER_TILE;
  panels.panels = (N + Panels::ROWS - 1) / Panels::ROWS;
  const int64_t size = panels.panels * panels.tiles * Panels::TILE, row_bytes = (K + 3) / 4;
  panels.data = allocate_weights(size_t(size));
  std::fill_n(panels.data.get(), size, uint8_t{0});  // rows and columns that pad
  for (int64_t n = 0; n < N; ++n) {
    uint8_t* lane = panels.data.get() + n / Panels::ROWS * panels.tiles * Panels::TILE + n % Panels::ROWS * 4;
    for (int64_t at = 0; at < row_bytes; ++at) {
      const uint8_t byte = packed[n * row_bytes + at];
      const int used = int(std::min<int64_t>(4, K - at * 4));
      check_byte(byte, used, n, at * 4);
      // A byte's four codes are one quad: they go to the lane's four bytes, all at the same place.
      uint8_t* quad = lane + at / 4 * Panels::TILE;
      for (int j = 0; j < used; ++j) quad[j] |= uint8_t((byte >> (2 * j) & 3) << (at % 4 * 2));
    }
  }
  return panels;
}

}  // namespace

MatMulTernary::MatMulTernary(const Info& info)
    : isa_(chosen_isa(info.text("isa", "auto"))),
      K_(info.integer("K", 0, 1, MOST_K)),
      N_(info.integer("N", 0, 1, MOST_N)) {
  const Tensor packed = info.constant(1), scale = info.constant(2);
  if (!packed) refuse("packed is computed by the graph, expected an initializer");
  const Shape expected{N_, (K_ + 3) / 4};
  if (packed.shape != expected) refuse("packed has the shape ", packed.shape.text(), ", expected ", expected.text());
  if (scale && scale.shape != Shape{1} && scale.shape != Shape{N_})
    refuse("scale has the shape ", scale.shape.text(), ", expected (1) or (", N_, ")");
  weights_ = pack(packed.as<const uint8_t>(ORT_UINT8, "packed"), N_, K_);
}

void MatMulTernary::compute(Context& context) const {
  const Tensor A = context.input(0), scale = context.input(2);
  if (A.shape.rank < 1 || A.shape.rank > 4) refuse("A has ", A.shape.rank, " dimensions, expected 1 to 4");
  if (A.shape.back() != K_) refuse("A has the shape ", A.shape.text(), ", expected (..., ", K_, ")");
  if (scale.shape != Shape{1} && scale.shape != Shape{N_})
    refuse("scale has the shape ", scale.shape.text(), ", expected (1) or (", N_, ")");
  const float* x = A.floats("A");
  const float* scales = scale.floats("scale");
  const int64_t rows = A.shape.count() / K_, width = weights_.width();
  Shape shape = A.shape;
  shape.dims[shape.rank - 1] = N_;
  float* out = context.output<float>(0, shape);
  if (rows == 0) return;

  const Kernels kernels = kernels_for(isa_);
  uint8_t* room = scratch<TernaryRows>(size_t(rows * (width + int64_t(sizeof(float) + sizeof(int32_t)))));
  float* steps = reinterpret_cast<float*>(room + rows * width);  // width is a multiple of 16: they are aligned
  const TernaryRows a{reinterpret_cast<int8_t*>(room), steps, reinterpret_cast<int32_t*>(steps + rows), width};
  const int64_t rounded_per_task = std::max<int64_t>(1, FLOATS_PER_TASK / width);
  auto round = [&](size_t index) {
    const int64_t begin = int64_t(index) * rounded_per_task, end = std::min(rows, begin + rounded_per_task);
    for (int64_t row = begin; row < end; ++row)
      kernels.round(x + row * K_, int(K_), int(width), a.codes + row * width, a.steps + row, a.sums + row);
  };
  context.parallel(size_t((rows + rounded_per_task - 1) / rounded_per_task), round);

  const int64_t panels_per_task = std::max<int64_t>(1, BYTES_PER_TASK / (weights_.tiles * TernaryPanels::TILE));
  const int64_t ranges = (weights_.panels + panels_per_task - 1) / panels_per_task;
  const int64_t chunks = (rows + ROWS_PER_TASK - 1) / ROWS_PER_TASK;
  auto product = [&](size_t index) {
    const int64_t row = int64_t(index) / ranges * ROWS_PER_TASK, panel = int64_t(index) % ranges * panels_per_task;
    TernaryTask task{};
    task.weights = &weights_;
    task.begin = panel;
    task.end = std::min(weights_.panels, panel + panels_per_task);
    task.a = {a.codes + row * width, a.steps + row, a.sums + row, width};
    task.rows = std::min(ROWS_PER_TASK, rows - row);
    task.scales = scales;
    task.scale_per_row = scale.shape[0] != 1;
    task.out = out + row * N_;
    task.N = N_;
    kernels.product(task);
  };
  context.parallel(size_t(chunks * ranges), product);
}

}  // namespace ryzen
