#include "codebook_embedding.h"

#include "half.h"

#define RYZEN_VECTOR_CODE "codebook_embedding.inl"
#include "each_isa.h"

namespace ryzen {
namespace {

constexpr int64_t MOST_CHANNELS = int64_t{1} << 20;
constexpr int64_t MOST_KEPT = 32767;
constexpr size_t MOST_ID_DIMS = MOST_DIMS - 1;  // the output has one more
constexpr int64_t CHANNELS_PER_TASK = 1 << 14;

// The same in plain C++, in three functions.

void copy_kept_reference(const CodebookTable& table, int64_t slot, float* out) {
  const uint8_t* row = table.kept + slot * table.kept_row_bytes();
  if (!table.kept_halves) {
    std::memcpy(out, row, size_t(table.kept_row_bytes()));
    return;
  }
  for (int c = 0; c < table.C; ++c) out[c] = half_to_float(reinterpret_cast<const uint16_t*>(row)[c]);
}

void decode_row_reference(const CodebookTable& table, int64_t id, float* out) {
  const uint8_t* row = table.codes + id * table.row_bytes;
  auto entry = [&](int stage, int c) {
    const int64_t bit = (int64_t{stage} * (table.C / table.dim) + c / table.dim) * table.bits;
    int code = 0;
    for (int i = 0; i < table.bits; ++i) code |= (row[(bit + i) / 8] >> ((bit + i) % 8) & 1) << i;
    return table.codebook[((stage << table.bits) + code) * table.dim + c % table.dim];
  };
  for (int c = 0; c < table.C; ++c) {
    float x = entry(0, c);
    if (table.stages == 2) x += entry(1, c);
    if (table.scales) x *= half_to_float(table.scales[id * table.groups() + c / table.group]);
    if (table.gain) x *= table.gain[c];
    if (table.offset) x += table.offset[c];
    out[c] = x;
  }
}

void codebook_rows_reference(const CodebookTable& table, const int64_t* ids, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i, out += table.C) {
    const int64_t slot = table.slots ? table.slots[ids[i]] : -1;
    if (slot >= 0) {
      copy_kept_reference(table, slot, out);
    } else {
      decode_row_reference(table, ids[i], out);
    }
  }
}

using Kernel = void (*)(const CodebookTable&, const int64_t* ids, int64_t count, float* out);

Kernel kernel_for(Isa isa) {
  switch (isa) {
    case Isa::AVX512_VNNI: return avx512_vnni::codebook_rows;
    case Isa::AVX2_VNNI: return avx2_vnni::codebook_rows;
    case Isa::AVX2: return avx2::codebook_rows;
    case Isa::SCALAR: break;
  }
  return codebook_rows_reference;
}

void expect(const Tensor& tensor, OrtElement element, const Shape& shape, const char* name) {
  tensor.as<const void>(element, name);
  if (tensor.shape != shape) refuse(name, " has the shape ", tensor.shape.text(), ", expected ", shape.text());
}

void check_ids(const int64_t* ids, int64_t count, int64_t V) {
  for (int64_t i = 0; i < count; ++i) {
    if (ids[i] < 0 || ids[i] >= V) refuse("id ", ids[i], " at place ", i, " is outside of the table of ", V, " rows");
  }
}

void check_slots(const int16_t* slots, const int64_t* ids, int64_t count, int64_t kept) {
  for (int64_t i = 0; i < count; ++i) {
    const int16_t slot = slots[ids[i]];
    if (slot >= kept)
      refuse("slots has ", int(slot), " for row ", ids[i], ", expected a place among the ", kept, " kept rows or -1");
  }
}

}  // namespace

CodebookEmbedding::CodebookEmbedding(const Info& info)
    : isa_(chosen_isa(info.text("isa", "auto"))),
      bits_(int(info.integer("bits", 0, 1, 8))),
      width_(int(info.integer("width", 0, 1, MOST_CHANNELS))),
      group_(int(info.integer("group", 0, 0, MOST_CHANNELS))) {
  if (group_ == 0) group_ = width_;
  if (width_ % group_ != 0) refuse("group is ", group_, ", expected a divisor of the width, which is ", width_);
  if (info.has_input(6) != info.has_input(7)) refuse("slots and kept must be both given or both absent");
  constants_.read([&](size_t index) { return info.constant(index); });
  if (!constants_.codes) return;
  check_rank(constants_);
  if (constants_.codebook) check_codes(constants_);
  check_scaling(constants_);
  check_kept(constants_);
}

// Whether there are rows to be counted, as all other checks do.
void CodebookEmbedding::check_rank(const Inputs& in) const {
  if (in.codes.shape.rank != 2) refuse("codes has the shape ", in.codes.shape.text(), ", expected two dimensions");
}

// The codebook, and the codes into it.
void CodebookEmbedding::check_codes(const Inputs& in) const {
  in.codebook.floats("codebook");
  const Shape& book = in.codebook.shape;
  const int64_t stages = book.rank == 3 ? book[0] : 0, dim = book.rank == 3 ? book[2] : 0;
  const bool known = (stages == 1 || stages == 2) && (dim == 1 || dim == 2 || dim == 4 || dim == 8);
  if (!known || book[1] != int64_t{1} << bits_)
    refuse("codebook has the shape ", book.text(), ", expected (1 or 2, ", 1 << bits_, ", 1, 2, 4 or 8)");
  if (width_ % dim != 0) refuse("width is ", width_, ", expected a multiple of the codebook's ", dim, " channels");
  expect(in.codes, ORT_UINT8, {in.codes.shape[0], (stages * (width_ / dim) * bits_ + 7) / 8}, "codes");
}

void CodebookEmbedding::check_scaling(const Inputs& in) const {
  if (in.scales) expect(in.scales, ORT_FLOAT16, {in.codes.shape[0], width_ / group_}, "scales");
  if (in.gain) expect(in.gain, ORT_FLOAT, {width_}, "gain");
  if (in.offset) expect(in.offset, ORT_FLOAT, {width_}, "offset");
}

void CodebookEmbedding::check_kept(const Inputs& in) const {
  if (in.slots) expect(in.slots, ORT_INT16, {in.codes.shape[0]}, "slots");
  if (!in.kept) return;
  const int64_t rows = in.kept.shape.rank == 2 ? in.kept.shape[0] : 0;
  if (rows > MOST_KEPT) refuse("kept has ", rows, " rows, the most are ", MOST_KEPT);
  if (in.kept.element != ORT_FLOAT && in.kept.element != ORT_FLOAT16)
    refuse("kept has elements of type ", int(in.kept.element), ", expected float (1) or float16 (10)");
  expect(in.kept, in.kept.element, {rows, width_}, "kept");
}

CodebookTable CodebookEmbedding::table(const Inputs& in) const {
  CodebookTable table{};
  table.codes = static_cast<const uint8_t*>(in.codes.data);
  table.row_bytes = in.codes.shape[1];
  table.end = table.codes + in.codes.shape.count();
  table.codebook = static_cast<const float*>(in.codebook.data);
  table.scales = static_cast<const uint16_t*>(in.scales.data);
  table.gain = static_cast<const float*>(in.gain.data);
  table.offset = static_cast<const float*>(in.offset.data);
  table.slots = static_cast<const int16_t*>(in.slots.data);
  table.kept = static_cast<const uint8_t*>(in.kept.data);
  table.kept_halves = in.kept.element == ORT_FLOAT16;
  table.bits = bits_;
  table.dim = int(in.codebook.shape[2]);
  table.stages = int(in.codebook.shape[0]);
  table.C = width_;
  table.group = group_;
  return table;
}

void CodebookEmbedding::compute(Context& context) const {
  const Tensor input = context.input(0);
  const auto* ids = input.as<const int64_t>(ORT_INT64, "ids");
  if (input.shape.rank > MOST_ID_DIMS) refuse("ids has ", MOST_DIMS, " dimensions, the most are ", MOST_ID_DIMS);
  const int64_t count = input.shape.count();
  Inputs in = constants_;
  in.read([&](size_t index) { return context.input(index); });
  check_rank(in);
  check_codes(in);
  check_scaling(in);
  check_kept(in);
  check_ids(ids, count, in.codes.shape[0]);
  const CodebookTable table = this->table(in);
  if (in.slots) check_slots(table.slots, ids, count, in.kept.shape[0]);

  Shape shape = input.shape;
  shape.dims[shape.rank++] = width_;
  float* out = context.output<float>(0, shape);
  const auto kernel = kernel_for(isa_);
  const int64_t rows = std::max<int64_t>(1, CHANNELS_PER_TASK / width_);
  context.parallel(size_t((count + rows - 1) / rows), [&](size_t task) {
    const int64_t begin = int64_t(task) * rows;
    kernel(table, ids + begin, std::min(rows, count - begin), out + begin * width_);
  });
}

}  // namespace ryzen
