#include "codebook_embedding.h"

#define RYZEN_VECTOR_CODE "codebook_embedding.inl"
#include "each_isa.h"

namespace ryzen {
namespace {

constexpr int64_t MOST_CHANNELS = int64_t{1} << 20;
constexpr int64_t CHANNELS_PER_TASK = 1 << 14;
constexpr int64_t LINES_AHEAD = 16;  // of the next row, fetched while this one is decoded

// The same in plain C++.
void codebook_row_reference(const CodebookRow& row) {
  const int groups = row.C / row.dim;
  auto entry = [&](int stage, int c) {
    const int64_t bit = (int64_t{stage} * groups + c / row.dim) * row.bits;
    int code = 0;
    for (int i = 0; i < row.bits; ++i) code |= (row.codes[(bit + i) / 8] >> ((bit + i) % 8) & 1) << i;
    return row.codebook[((stage << row.bits) + code) * row.dim + c % row.dim];
  };
  for (int c = 0; c < row.C; ++c) {
    float x = entry(0, c);
    if (row.stages == 2) x += entry(1, c);
    row.out[c] = row.scales ? x * row.scales[c / row.scale_group] : x;
  }
}

void (*kernel_for(Isa isa))(const CodebookRow&) {
  switch (isa) {
    case Isa::AVX512_VNNI: return avx512_vnni::codebook_row;
    case Isa::AVX2_VNNI: return avx2_vnni::codebook_row;
    case Isa::AVX2: return avx2::codebook_row;
    case Isa::SCALAR: break;
  }
  return codebook_row_reference;
}

void fetch(const uint8_t* row, int64_t size) {
  for (int64_t line = 0; line < std::min<int64_t>(LINES_AHEAD, (size + 63) / 64); ++line)
    __builtin_prefetch(row + line * 64);
}

template <typename T>
void check_ids(const T* ids, int64_t count, int64_t V) {
  for (int64_t i = 0; i < count; ++i) {
    if (ids[i] < 0 || ids[i] >= V) refuse("id ", ids[i], " at place ", i, " is outside of the table of ", V, " rows");
  }
}

}  // namespace

CodebookEmbedding::CodebookEmbedding(const Info& info)
    : isa_(chosen_isa(info.text("isa", "auto"))),
      bits_(int(info.integer("bits", 0, 1, 8))),
      dim_(int(info.integer("dim", 1, 1, 8))),
      stages_(int(info.integer("stages", 1, 1, 2))),
      width_(int(info.integer("width", 0, 1, MOST_CHANNELS))),
      scale_group_(int(info.integer("scale_group", 0, 0, MOST_CHANNELS))) {
  if (dim_ != 1 && dim_ != 2 && dim_ != 4 && dim_ != 8) refuse("dim is ", dim_, ", expected 1, 2, 4 or 8");
  if (width_ % dim_ != 0) refuse("width is ", width_, ", expected a multiple of dim, which is ", dim_);
  const Tensor codes = info.constant(1), codebook = info.constant(2), scales = info.constant(3);
  if (codes) check_codes(codes);
  if (codebook) check_codebook(codebook);
  if (codes && scales) check_scales(scales, codes.shape[0]);
}

void CodebookEmbedding::check_codes(const Tensor& codes) const {
  codes.as<const uint8_t>(ORT_UINT8, "codes");
  if (codes.shape.rank != 2 || codes.shape[1] != row_bytes())
    refuse("codes has the shape ", codes.shape.text(), ", expected (V, ", row_bytes(), ")");
}

void CodebookEmbedding::check_codebook(const Tensor& codebook) const {
  codebook.floats("codebook");
  const Shape expected{stages_, int64_t{1} << bits_, dim_};
  if (codebook.shape != expected)
    refuse("codebook has the shape ", codebook.shape.text(), ", expected ", expected.text());
}

void CodebookEmbedding::check_scales(const Tensor& scales, int64_t V) const {
  scales.floats("scales");
  const Shape expected = scale_group_ ? Shape{V, scales_of_a_row()} : Shape{V};
  if (scales.shape != expected) refuse("scales has the shape ", scales.shape.text(), ", expected ", expected.text());
}

void CodebookEmbedding::compute(Context& context) const {
  const Tensor ids = context.input(0), codes = context.input(1), codebook = context.input(2), scales = context.input(3);
  check_codes(codes);
  check_codebook(codebook);
  const int64_t V = codes.shape[0];
  if (scales) check_scales(scales, V);
  const int64_t count = ids.shape.count();
  if (ids.element != ORT_INT32 && ids.element != ORT_INT64)
    refuse("ids has elements of type ", int(ids.element), ", expected int32 (6) or int64 (7)");
  if (ids.shape.rank == MOST_DIMS) refuse("ids has ", MOST_DIMS, " dimensions, the most are ", MOST_DIMS - 1);
  const bool wide = ids.element == ORT_INT64;
  if (wide) {
    check_ids(static_cast<const int64_t*>(ids.data), count, V);
  } else {
    check_ids(static_cast<const int32_t*>(ids.data), count, V);
  }
  auto id = [&](int64_t i) {
    return wide ? static_cast<const int64_t*>(ids.data)[i] : int64_t{static_cast<const int32_t*>(ids.data)[i]};
  };

  Shape shape = ids.shape;
  shape.dims[shape.rank++] = width_;
  float* out = context.output<float>(0, shape);
  const uint8_t* table = static_cast<const uint8_t*>(codes.data);
  const int64_t bytes = row_bytes(), scales_each = scales_of_a_row();
  const auto kernel = kernel_for(isa_);
  const int64_t rows_per_task = std::max<int64_t>(1, CHANNELS_PER_TASK / width_);
  auto task = [&](size_t index) {
    const int64_t begin = int64_t(index) * rows_per_task, end = std::min(count, begin + rows_per_task);
    CodebookRow row{};
    row.end = table + V * bytes;
    row.codebook = static_cast<const float*>(codebook.data);
    row.bits = bits_;
    row.dim = dim_;
    row.stages = stages_;
    row.C = width_;
    row.scale_group = scale_group_ ? scale_group_ : width_;
    for (int64_t i = begin; i < end; ++i) {
      if (i + 1 < end) fetch(table + id(i + 1) * bytes, bytes);
      row.codes = table + id(i) * bytes;
      row.scales = scales ? static_cast<const float*>(scales.data) + id(i) * scales_each : nullptr;
      row.out = out + i * width_;
      kernel(row);
    }
  };
  context.parallel(size_t((count + rows_per_task - 1) / rows_per_task), task);
}

}  // namespace ryzen
