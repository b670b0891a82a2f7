#include "checks.h"
#include "runtime.h"

namespace driver {
namespace {

constexpr int V = 9;

struct Case {
  int bits, dim, stages, C;
  int scale_group;  // 0: one scale for a row; -1: no scales
};

int64_t row_bytes(const Case& c) { return (int64_t{c.stages} * (c.C / c.dim) * c.bits + 7) / 8; }

Node node_of(const Case& c, const Value& ids, Random& random) {
  Node node;
  node.op = "CodebookEmbedding";
  node.attributes = {{"bits", int64_t{c.bits}},
                     {"dim", int64_t{c.dim}},
                     {"stages", int64_t{c.stages}},
                     {"width", int64_t{c.C}},
                     {"scale_group", int64_t{std::max(0, c.scale_group)}}};
  node.inputs = {ids, random.integers<uint8_t>({V, row_bytes(c)}, 256),
                 random.normals({c.stages, int64_t{1} << c.bits, c.dim})};
  if (c.scale_group == 0) node.inputs.push_back(random.normals({V}));
  if (c.scale_group > 0) node.inputs.push_back(random.normals({V, (c.C + c.scale_group - 1) / c.scale_group}));
  node.constant = {false, random.below(2) == 0, true, random.below(2) == 0};
  return node;
}

// The code at `place` of a row, bit by bit.
int code_at(const uint8_t* row, int64_t place, int bits) {
  int code = 0;
  for (int i = 0; i < bits; ++i) code |= (row[(place * bits + i) / 8] >> ((place * bits + i) % 8) & 1) << i;
  return code;
}

template <typename Id>
void check_case(const Case& c, const Dims& dims, Random& random) {
  const Value ids = random.integers<Id>(dims, V);
  const Node node = node_of(c, ids, random);
  std::vector<double> wanted;
  for (int64_t i = 0; i < count(dims); ++i) {
    const int64_t id = data<Id>(ids)[i];
    const uint8_t* row = data<uint8_t>(node.inputs[1]) + id * row_bytes(c);
    for (int channel = 0; channel < c.C; ++channel) {
      float sum = 0.0f;
      for (int stage = 0; stage < c.stages; ++stage) {
        const int code = code_at(row, int64_t{stage} * (c.C / c.dim) + channel / c.dim, c.bits);
        sum += data<float>(node.inputs[2])[((stage << c.bits) + code) * c.dim + channel % c.dim];
      }
      if (c.scale_group == 0) sum *= data<float>(node.inputs[3])[id];
      if (c.scale_group > 0) {
        const int groups = (c.C + c.scale_group - 1) / c.scale_group;
        sum *= data<float>(node.inputs[3])[id * groups + channel / c.scale_group];
      }
      wanted.push_back(double(sum));
    }
  }
  const std::string what = "bits=" + std::to_string(c.bits) + " dim=" + std::to_string(c.dim) +
                           " stages=" + std::to_string(c.stages) + " C=" + std::to_string(c.C) +
                           " scale_group=" + std::to_string(c.scale_group);
  run_everywhere(node, what, Across::SAME_BITS, [&](const std::vector<Value>& out, const std::string& name) {
    expect_near(data<float>(out[0]), wanted, 0.0, name);
  });
}

void check_hostile(Random& random) {
  const Case c = {5, 4, 2, 40, 16};
  const Value ids = tensor<int64_t>({2}, {0, V - 1});
  Node good = node_of(c, ids, random);
  for (bool constant : {false, true}) {
    good.constant = {false, constant, constant, constant};
    const int64_t least = std::numeric_limits<int64_t>::min(), most = std::numeric_limits<int64_t>::max();
    for (int64_t id : {int64_t{-1}, int64_t{V}, most, least})
      expect_refused(good.with_input(0, tensor<int64_t>({2}, {1, id})), "outside");
    for (int32_t id : {-1, V, std::numeric_limits<int32_t>::max(), std::numeric_limits<int32_t>::min()})
      expect_refused(good.with_input(0, tensor<int32_t>({2}, {1, id})), "outside");
    expect_refused(good.with_input(0, random.normals({2})), "ids");
    expect_refused(good.with_input(0, nullptr), "ids");
    expect_refused(good.with_input(0, with_dims(ids, {-2})), "shape");
    expect_refused(good.with_input(0, with_dims(ids, {int64_t{1} << 40, int64_t{1} << 40})), "shape");
    expect_refused(good.with_input(0, random.integers<int64_t>({1, 1, 1, 1, 1, 1, 1, 2}, V)), "dimensions");
    for (const char* name : {"bits", "dim", "stages", "width", "scale_group"}) {
      for (int64_t value : {int64_t{-1}, most, least})
        expect_refused(good.with(name, value), name);
    }
    expect_refused(good.with("bits", int64_t{0}), "bits");
    expect_refused(good.with("bits", int64_t{9}), "bits");
    expect_refused(good.with("bits", int64_t{8}), "codes");
    expect_refused(good.with("dim", int64_t{3}), "dim");
    expect_refused(good.with("dim", int64_t{8}), "codes");
    expect_refused(good.with("stages", int64_t{3}), "stages");
    expect_refused(good.with("stages", int64_t{1}), "codes");
    expect_refused(good.with("width", int64_t{41}), "width");
    expect_refused(good.with("width", int64_t{80}), "codes");
    expect_refused(good.with("scale_group", int64_t{8}), "scales");
    expect_refused(good.with("scale_group", int64_t{0}), "scales");
    expect_refused(good.without("bits"), "bits");
    expect_refused(good.without("width"), "width");
    expect_refused(good.with("bits", 5.0f), "bits");
    expect_refused(good.with("isa", std::string("")), "isa");
    expect_refused(good.with_input(1, with_dims(good.inputs[1], {V * row_bytes(c)})), "codes");
    expect_refused(good.with_input(1, random.integers<int8_t>({V, row_bytes(c)}, 9)), "codes");
    expect_refused(good.with_input(1, nullptr), "codes");
    expect_refused(good.with_input(2, random.normals({1, 32, 4})), "codebook");
    expect_refused(good.with_input(2, random.normals({2, 31, 4})), "codebook");
    expect_refused(good.with_input(2, random.integers<uint8_t>({2, 32, 4}, 9)), "codebook");
    expect_refused(good.with_input(2, nullptr), "codebook");
    expect_refused(good.with_input(3, random.normals({V - 1, 3})), "scales");
    expect_refused(good.with_input(3, random.normals({V})), "scales");
    expect_refused(good.with_input(3, random.integers<uint8_t>({V, 3}, 9)), "scales");
    // A table of no rows has no ids either.
    const Value no_rows = random.integers<uint8_t>({0, row_bytes(c)}, 9);
    expect_refused(good.with_input(1, no_rows).with_input(3, nullptr), "outside");
  }
}

}  // namespace

void check_codebook_embedding() {
  Random random(2);
  for (int bits = 1; bits <= 8; ++bits) {
    for (int dim : {1, 2, 4, 8}) {
      for (int stages : {1, 2}) {
        for (int groups : {1, 3, 7, 17, 100}) {
          const int scale_group = random.below(3) - 1 ? random.below(40) + 1 : random.below(2) - 1;
          check_case<int64_t>({bits, dim, stages, groups * dim, scale_group}, {3}, random);
        }
      }
    }
  }
  for (int C : {511, 512, 513, 1031}) {
    check_case<int32_t>({4, 1, 2, C, 32}, {2, 31}, random);
    check_case<int64_t>({7, 1, 2, C, -1}, {1, 1, 5}, random);
  }
  check_case<int32_t>({8, 8, 2, 1048, 48}, {40}, random);
  check_case<int64_t>({3, 2, 1, 10, 0}, {0}, random);
  check_case<int64_t>({3, 2, 1, 10, 0}, {}, random);
  check_hostile(random);
}

}  // namespace driver
