#include "norm.h"

#include <cmath>

#include "round_activations.h"

#define RYZEN_VECTOR_CODE "norm.inl"
#include "each_isa.h"

namespace ryzen {
namespace {

constexpr int64_t MOST_CHANNELS = int64_t{1} << 20;
constexpr int64_t FLOATS_PER_TASK = 1 << 14;

// The same in plain C++, with totals in double.
template <bool CENTRED>
void norm_row_reference(const NormRow& row) {
  auto added = [&row](int i) {
    float s = row.x[i];
    if (row.skip) s += row.skip[i];
    if (row.skip_bias) s += row.skip_bias[i];
    return s;
  };
  double mean = 0.0, squares = 0.0;
  if (CENTRED) {
    for (int i = 0; i < row.C; ++i) mean += added(i);
    mean /= row.C;
  }
  for (int i = 0; i < row.C; ++i) squares += (added(i) - mean) * (added(i) - mean);
  const float middle = float(mean), factor = float(1.0 / std::sqrt(squares / row.C + double(row.epsilon)));
  const int block = row.codes ? row.block : row.C;
  float held[LARGEST_BLOCK];
  for (int begin = 0; begin < row.C; begin += block) {
    const int count = std::min(block, row.C - begin);
    float* y = row.y ? row.y + begin : row.codes ? held : nullptr;
    for (int i = 0; i < count; ++i) {
      const float s = added(begin + i);
      if (row.sum) row.sum[begin + i] = s;
      if (y) y[i] = (s - middle) * factor * row.weight[begin + i] + (row.beta ? row.beta[begin + i] : 0.0f);
    }
    if (row.codes) round_block_reference(y, count, block, row.codes + begin, row.steps + begin / block);
  }
}

template <bool CENTRED>
void (*kernel_for(Isa isa))(const NormRow&) {
  switch (isa) {
    case Isa::AVX512_VNNI: return CENTRED ? avx512_vnni::layer_norm_row : avx512_vnni::rms_norm_row;
    case Isa::AVX2_VNNI: return CENTRED ? avx2_vnni::layer_norm_row : avx2_vnni::rms_norm_row;
    case Isa::AVX2: return CENTRED ? avx2::layer_norm_row : avx2::rms_norm_row;
    case Isa::SCALAR: break;
  }
  return norm_row_reference<CENTRED>;
}

// An operand of C channels, or null where it is absent.
const float* channels(const Tensor& tensor, int64_t C, const char* name) {
  if (!tensor) return nullptr;
  if (tensor.shape != Shape{C}) refuse(name, " has the shape ", tensor.shape.text(), ", expected (", C, ")");
  return tensor.floats(name);
}

}  // namespace

SkipNorm::SkipNorm(const Info& info)
    : isa_(chosen_isa(info.text("isa", "auto"))),
      epsilon_(info.number("epsilon", 1e-5f)),
      block_(int(info.integer("block_size", 0, 0, LARGEST_BLOCK))) {
  if (!(epsilon_ >= 0.0f && epsilon_ <= 1.0f)) refuse("epsilon is ", epsilon_, ", expected a number from 0 to 1");
  if (block_ != 0 && block_ != 32 && block_ != 64 && block_ != 128 && block_ != 256)
    refuse("block_size is ", block_, ", expected 32, 64, 128 or 256, or 0 where no codes are wanted");
}

void SkipNorm::compute(const Context& context, const Operands& operands, Kernel kernel) const {
  const Shape& shape = operands.x.shape;
  if (shape.rank < 1 || shape.rank > 4) refuse("x has ", shape.rank, " dimensions, expected 1 to 4");
  const int64_t C = shape.back();
  if (C < 1 || C > MOST_CHANNELS) refuse("x has ", C, " channels, expected 1 to ", MOST_CHANNELS);
  if (operands.skip && operands.skip.shape != shape)
    refuse("skip has the shape ", operands.skip.shape.text(), ", expected that of x, ", shape.text());
  NormRow first{};
  first.x = operands.x.floats("x");
  first.skip = operands.skip ? operands.skip.floats("skip") : nullptr;
  first.weight = channels(operands.weight, C, "weight");
  if (!first.weight) refuse("it has no weight");
  first.beta = channels(operands.beta, C, "beta");
  first.skip_bias = channels(operands.skip_bias, C, "skip_bias");
  first.C = int(C);
  first.block = block_;
  first.epsilon = epsilon_;

  const int64_t rows = shape.count() / C, rows_per_task = std::max<int64_t>(1, FLOATS_PER_TASK / C);
  first.y = context.output<float>(0, shape);
  first.sum = context.output<float>(1, shape);
  // Where there is no block size, codes are asked for all the same, to refuse them.
  const int64_t block = block_ ? block_ : LARGEST_BLOCK, blocks = (C + block - 1) / block;
  Shape codes = shape, steps = shape;
  codes.dims[shape.rank - 1] = blocks * block;
  steps.dims[shape.rank - 1] = blocks;
  first.codes = context.output<int8_t>(2, codes);
  first.steps = context.output<float>(3, steps);
  if (!first.codes != !first.steps) refuse("only one of codes and steps is wanted, expected both or neither");
  if (first.codes && !block_) refuse("codes are wanted, and block_size is 0");

  auto task = [&](size_t index) {
    const int64_t begin = int64_t(index) * rows_per_task, end = std::min(rows, begin + rows_per_task);
    for (int64_t r = begin; r < end; ++r) {
      NormRow row = first;
      row.x += r * C;
      if (row.skip) row.skip += r * C;
      if (row.y) row.y += r * C;
      if (row.sum) row.sum += r * C;
      if (row.codes) {
        row.codes += r * blocks * block;
        row.steps += r * blocks;
      }
      kernel(row);
    }
  };
  context.parallel(size_t((rows + rows_per_task - 1) / rows_per_task), task);
}

void SkipRMSNorm::compute(Context& context) const {
  SkipNorm::compute(context, {context.input(0), context.input(1), context.input(2), {}, context.input(3)},
                    kernel_for<false>(isa_));
}

void SkipLayerNorm::compute(Context& context) const {
  SkipNorm::compute(
      context, {context.input(0), context.input(1), context.input(2), context.input(3), context.input(4)},
      kernel_for<true>(isa_));
}

}  // namespace ryzen
