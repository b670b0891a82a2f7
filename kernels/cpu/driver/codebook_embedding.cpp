#include "checks.h"
#include "runtime.h"

namespace driver {
namespace {

constexpr int V = 9;

enum { CODES = 1, CODEBOOK, SCALES, GAIN, OFFSET, SLOTS, KEPT };  // the inputs behind ids

struct Case {
  int bits, dim, stages, C;
  int group = 0;  // 0: one scale for a row; -1: no scales
  bool gain = false, offset = false;
  int kept = -1;                     // rows; -1: neither slots nor kept rows
  OrtElement kept_as = ORT_FLOAT16;  // or ORT_FLOAT

  int groups() const { return group > 0 ? C / group : 1; }
  int64_t row_bytes() const { return (int64_t{stages} * (C / dim) * bits + 7) / 8; }
  std::string text() const {
    return "bits=" + std::to_string(bits) + " dim=" + std::to_string(dim) + " stages=" + std::to_string(stages) +
           " C=" + std::to_string(C) + " group=" + std::to_string(group) + (gain ? " gain" : "") +
           (offset ? " offset" : "") + " kept=" + std::to_string(kept) + (kept_as == ORT_FLOAT ? " float" : "");
  }
};

// Every kind of input present or absent by chance.
Case some_case(int bits, int dim, int stages, int C, Random& random) {
  Case c{bits, dim, stages, C};
  c.group = random.below(C) + 1;
  while (C % c.group) --c.group;
  if (random.below(3) == 0) c.group = random.below(2) - 1;
  c.gain = random.below(2), c.offset = random.below(2);
  c.kept = random.below(5) - 1;
  c.kept_as = random.below(2) ? ORT_FLOAT : ORT_FLOAT16;
  return c;
}

Node node_of(const Case& c, const Value& ids, Random& random) {
  Node node;
  node.op = "CodebookEmbedding";
  node.attributes = {
      {"bits", int64_t{c.bits}}, {"width", int64_t{c.C}}, {"group", int64_t{std::max(0, c.group)}}};
  node.inputs = {ids, random.integers<uint8_t>({V, c.row_bytes()}, 256),
                 random.normals({c.stages, int64_t{1} << c.bits, c.dim}), nullptr, nullptr, nullptr, nullptr, nullptr};
  if (c.group >= 0) node.inputs[SCALES] = random.halves({V, c.groups()});
  if (c.gain) node.inputs[GAIN] = random.normals({c.C});
  if (c.offset) node.inputs[OFFSET] = random.normals({c.C});
  if (c.kept >= 0) {
    std::vector<int16_t> slots;
    for (int i = 0; i < V; ++i) slots.push_back(int16_t(random.below(c.kept + 1) - 1));
    node.inputs[SLOTS] = tensor<int16_t>({V}, slots);
    node.inputs[KEPT] = c.kept_as == ORT_FLOAT ? random.normals({c.kept, c.C}) : random.halves({c.kept, c.C});
  }
  for (size_t i = 0; i < node.inputs.size(); ++i) node.constant.push_back(i > 0 && random.below(2) == 0);
  return node;
}

// The code at `place` of a row, bit by bit.
int code_at(const uint8_t* row, int64_t place, int bits) {
  int code = 0;
  for (int i = 0; i < bits; ++i) code |= (row[(place * bits + i) / 8] >> ((place * bits + i) % 8) & 1) << i;
  return code;
}

float kept_at(const Case& c, const Node& node, int64_t place) {
  const Value& kept = node.inputs[KEPT];
  return c.kept_as == ORT_FLOAT ? data<float>(kept)[place] : float(half_value(data<uint16_t>(kept)[place]));
}

float coded_at(const Case& c, const Node& node, int64_t id, int channel) {
  const uint8_t* row = data<uint8_t>(node.inputs[CODES]) + id * c.row_bytes();
  float x = 0.0f;
  for (int stage = 0; stage < c.stages; ++stage) {
    const int code = code_at(row, int64_t{stage} * (c.C / c.dim) + channel / c.dim, c.bits);
    x += data<float>(node.inputs[CODEBOOK])[((stage << c.bits) + code) * c.dim + channel % c.dim];
  }
  if (c.group >= 0) {
    const int group = channel / (c.C / c.groups());
    x *= float(half_value(data<uint16_t>(node.inputs[SCALES])[id * c.groups() + group]));
  }
  if (c.gain) x *= data<float>(node.inputs[GAIN])[channel];
  if (c.offset) x += data<float>(node.inputs[OFFSET])[channel];
  return x;
}

void check_case(const Case& c, const Dims& dims, Random& random) {
  const Value ids = random.integers<int64_t>(dims, V);
  const Node node = node_of(c, ids, random);
  std::vector<double> wanted;
  for (int64_t i = 0; i < count(dims); ++i) {
    const int64_t id = data<int64_t>(ids)[i], slot = c.kept >= 0 ? data<int16_t>(node.inputs[SLOTS])[id] : -1;
    for (int channel = 0; channel < c.C; ++channel)
      wanted.push_back(slot >= 0 ? kept_at(c, node, slot * c.C + channel) : coded_at(c, node, id, channel));
  }
  run_everywhere(node, c.text(), Across::SAME_BITS, [&](const std::vector<Value>& out, const std::string& name) {
    expect_near(data<float>(out[0]), wanted, 0.0, name);
  });
}

void check_hostile_ids(const Node& good, Random& random) {
  const int64_t least = std::numeric_limits<int64_t>::min(), most = std::numeric_limits<int64_t>::max();
  for (int64_t id : {int64_t{-1}, int64_t{V}, most, least})
    expect_refused(good.with_input(0, tensor<int64_t>({2}, {1, id})), "outside");
  expect_refused(good.with_input(0, random.integers<int32_t>({2}, V)), "ids");
  expect_refused(good.with_input(0, random.normals({2})), "ids");
  expect_refused(good.with_input(0, nullptr), "ids");
  expect_refused(good.with_input(0, with_dims(good.inputs[0], {-2})), "shape");
  expect_refused(good.with_input(0, with_dims(good.inputs[0], {int64_t{1} << 40, int64_t{1} << 40})), "shape");
  expect_refused(good.with_input(0, random.integers<int64_t>({1, 1, 1, 1, 1, 1, 1, 2}, V)), "dimensions");
}

void check_hostile_attributes(const Node& good) {
  const int64_t least = std::numeric_limits<int64_t>::min(), most = std::numeric_limits<int64_t>::max();
  for (const char* name : {"bits", "width", "group"}) {
    for (int64_t value : {int64_t{-1}, most, least}) expect_refused(good.with(name, value), name);
  }
  expect_refused(good.with("bits", int64_t{0}), "bits");
  expect_refused(good.with("bits", int64_t{9}), "bits");
  expect_refused(good.with("bits", int64_t{8}), "codebook");
  expect_refused(good.with("width", int64_t{48}).with_input(KEPT, nullptr).with_input(SLOTS, nullptr), "codes");
  expect_refused(good.with("width", int64_t{42}).with("group", int64_t{0}), "width");
  expect_refused(good.with("group", int64_t{9}), "group");
  expect_refused(good.with("group", int64_t{10}), "scales");
  expect_refused(good.with("group", int64_t{0}), "scales");
  expect_refused(good.without("bits"), "bits");
  expect_refused(good.without("width"), "width");
  expect_refused(good.with("bits", 5.0f), "bits");
  expect_refused(good.with("isa", std::string("")), "isa");
}

void check_hostile_tensors(const Case& c, const Node& good, Random& random) {
  const int64_t row = c.row_bytes();
  const struct {
    size_t input;
    const char* name;
    std::vector<Value> bad;
  } cases[] = {
      {CODES,
       "codes",
       {nullptr, with_dims(good.inputs[CODES], {V * row}), with_dims(good.inputs[CODES], {V - 1, row + 1}),
        random.integers<int8_t>({V, row}, 9)}},
      {CODEBOOK,
       "codebook",
       {nullptr, random.normals({3, 32, 4}), random.normals({0, 32, 4}), random.normals({2, 31, 4}),
        random.normals({2, 32, 3}), random.normals({2, 32, 0}), random.normals({2, 128}), random.halves({2, 32, 4})}},
      {SCALES,
       "scales",
       {random.halves({V - 1, 5}), random.halves({V}), random.halves({V, 4}), random.normals({V, 5})}},
      {GAIN, "gain", {random.normals({39}), random.normals({1, 40}), random.normals({}), random.halves({40})}},
      {OFFSET, "offset", {random.normals({41}), random.normals({V, 40}), random.halves({40})}},
      {SLOTS,
       "slots",
       {nullptr, random.integers<int16_t>({V - 1}, 2), random.integers<int16_t>({V, 1}, 2),
        random.integers<int32_t>({V}, 2)}},
      {KEPT,
       "kept",
       {nullptr, random.halves({3, 39}), random.halves({120}), random.halves({3, 40, 1}),
        with_dims(good.inputs[KEPT], {32768, 40}), random.integers<uint8_t>({3, 40}, 9)}},
  };
  for (const auto& each : cases) {
    for (const Value& bad : each.bad) expect_refused(good.with_input(each.input, bad), each.name);
  }
  // The codebook's other shapes go with other codes.
  expect_refused(good.with_input(CODEBOOK, random.normals({1, 32, 4})), "codes");
  expect_refused(good.with_input(CODEBOOK, random.normals({2, 32, 8})), "codes");
  // A slot counts when its row is asked for, which are the first and the last.
  for (int bad : {3, 32767})
    expect_refused(good.with_input(SLOTS, tensor<int16_t>({V}, {-1, 0, 0, 0, 0, 0, 0, 0, int16_t(bad)})), "slots");
  expect_refused(good.with_input(KEPT, random.halves({0, 40})), "slots");
  // A table of no rows has no ids either.
  Node empty = good.with_input(CODES, random.integers<uint8_t>({0, row}, 9));
  for (size_t input : {SCALES, SLOTS, KEPT}) empty = empty.with_input(input, nullptr);
  expect_refused(empty, "outside");
}

void check_hostile(Random& random) {
  const Case c = {5, 4, 2, 40, 8, true, true, 3, ORT_FLOAT16};
  Node good = node_of(c, tensor<int64_t>({2}, {0, V - 1}), random);
  good.inputs[SLOTS] = tensor<int16_t>({V}, {0, 1, 2, -1, -1, -1, -1, -1, 2});
  for (bool constant : {false, true}) {
    good.constant = {false, constant, constant, constant, constant, constant, constant, constant};
    check_hostile_ids(good, random);
    check_hostile_attributes(good);
    check_hostile_tensors(c, good, random);
  }
}

}  // namespace

void check_codebook_embedding() {
  Random random(2);
  for (int bits = 1; bits <= 8; ++bits) {
    for (int dim : {1, 2, 4, 8}) {
      for (int stages : {1, 2}) {
        for (int groups : {1, 3, 7, 17, 100})
          check_case(some_case(bits, dim, stages, groups * dim, random), {5}, random);
      }
    }
  }
  for (int C : {511, 512, 513, 1031, 1536}) {
    check_case(some_case(4, 1, 2, C, random), {2, 31}, random);
    check_case(some_case(7, 1, 2, C, random), {1, 1, 5}, random);
  }
  check_case({8, 8, 2, 1056, 48, true, true}, {40}, random);
  check_case({6, 2, 2, 1056, 352, true, true, 2, ORT_FLOAT}, {40}, random);
  check_case({3, 2, 1, 10}, {0}, random);
  check_case({3, 2, 1, 10}, {}, random);
  check_hostile(random);
}

}  // namespace driver
