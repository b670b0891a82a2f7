#include "../round_activations.h"
#include "checks.h"
#include "runtime.h"

namespace driver {
namespace {

struct Case {
  Dims dims;
  bool layer, skip, skip_bias, beta;
  int64_t block;  // 0 where no codes are wanted
  std::vector<bool> outputs;
};

Node node_of(const Case& c, Random& random) {
  const Dims channels = {c.dims.back()};
  Node node;
  node.op = c.layer ? "SkipLayerNorm" : "SkipRMSNorm";
  node.attributes = {{"epsilon", 1e-5f}, {"block_size", c.block}};
  node.inputs = {random.normals(c.dims), c.skip ? random.normals(c.dims) : nullptr, random.normals(channels)};
  if (c.layer) node.inputs.push_back(c.beta ? random.normals(channels) : nullptr);
  if (c.skip_bias) node.inputs.push_back(random.normals(channels));
  node.outputs = c.outputs;
  return node;
}

void check_case(const Case& c, Random& random) {
  const Node node = node_of(c, random);
  const int64_t C = c.dims.back(), rows = count(c.dims) / C;
  const size_t bias_at = c.layer ? 4 : 3;
  const float* x = data<float>(node.inputs[0]);
  const float* weight = data<float>(node.inputs[2]);
  std::vector<double> sums, ys;
  for (int64_t row = 0; row < rows; ++row) {
    std::vector<double> s;
    double mean = 0.0, squares = 0.0;
    for (int64_t i = 0; i < C; ++i) {
      double value = x[row * C + i];
      if (c.skip) value += data<float>(node.inputs[1])[row * C + i];
      if (c.skip_bias) value += data<float>(node.inputs[bias_at])[i];
      s.push_back(value);
      if (c.layer) mean += value / double(C);
    }
    for (double value : s) squares += (value - mean) * (value - mean);
    for (int64_t i = 0; i < C; ++i) {
      sums.push_back(s[size_t(i)]);
      const double y = (s[size_t(i)] - mean) / std::sqrt(squares / double(C) + 1e-5) * weight[i];
      ys.push_back(c.layer && c.beta ? y + data<float>(node.inputs[3])[i] : y);
    }
  }
  const std::string what =
      "C=" + std::to_string(C) + " rows=" + std::to_string(rows) + " block=" + std::to_string(c.block);
  run_everywhere(node, what, Across::MAY_DIFFER, [&](const std::vector<Value>& out, const std::string& name) {
    // A layer norm of few channels divides by what is left of their difference, which float rounds.
    const double tolerance = c.layer && C < 8 ? 2e-3 : 2e-5;
    if (c.outputs[0]) expect_near(data<float>(out[0]), ys, tolerance, name + " y");
    if (c.outputs.size() > 1 && c.outputs[1]) expect_near(data<float>(out[1]), sums, 2e-6, name + " sum");
    if (c.outputs.size() < 3 || !c.outputs[2]) return;
    const int64_t blocks = (C + c.block - 1) / c.block;
    for (int64_t row = 0; row < rows && c.outputs[0]; ++row) {
      for (int64_t b = 0; b < blocks; ++b) {
        std::vector<int8_t> codes(size_t(c.block), 1);
        float step = -1.0f;
        const int64_t length = std::min(c.block, C - b * c.block);
        ryzen::round_block_reference(data<float>(out[0]) + row * C + b * c.block, int(length), int(c.block),
                                     codes.data(), &step);
        const int8_t* got = data<int8_t>(out[2]) + (row * blocks + b) * c.block;
        if (std::memcmp(got, codes.data(), codes.size()) != 0 || data<float>(out[3])[row * blocks + b] != step)
          fail(name + ": the codes of block " + std::to_string(b) + " are not those of y");
      }
    }
    for (int64_t row = 0; row < rows; ++row) {  // without y as well
      for (int64_t i = 0; i < C; ++i) {
        const float step = data<float>(out[3])[row * blocks + i / c.block];
        const double y = double(data<int8_t>(out[2])[row * blocks * c.block + i]) * double(step);
        if (!(std::fabs(y - ys[size_t(row * C + i)]) <= 0.501 * double(step) + tolerance))
          fail(name + ": code " + std::to_string(i) + " is off by more than half a step");
      }
    }
  });
}

void check_hostile(Random& random) {
  for (bool layer : {false, true}) {
    const Node good = node_of({{2, 3, 40}, layer, true, true, true, 32, {true, true, true, true}}, random);
    expect_refused(good.with("block_size", int64_t{33}), "block_size");
    expect_refused(good.with("block_size", int64_t{-32}), "block_size");
    expect_refused(good.with("block_size", std::numeric_limits<int64_t>::max()), "block_size");
    expect_refused(good.with("block_size", int64_t{0}), "block_size");
    expect_refused(good.without("block_size"), "block_size");
    expect_refused(good.with("epsilon", -1.0f), "epsilon");
    expect_refused(good.with("epsilon", std::numeric_limits<float>::quiet_NaN()), "epsilon");
    expect_refused(good.with("isa", std::string("mmx")), "isa");
    expect_refused(good.with_input(0, random.normals({})), "dimensions");
    expect_refused(good.with_input(0, random.normals({1, 1, 2, 3, 40})), "dimensions");
    expect_refused(good.with_input(0, random.normals({1, 1, 1, 1, 1, 1, 1, 1, 1, 40})), "dimensions");
    expect_refused(good.with_input(0, random.normals({2, 3, 0})), "channels");
    expect_refused(good.with_input(0, with_dims(good.inputs[0], {2, 3, -40})), "channels");
    expect_refused(good.with_input(0, with_dims(good.inputs[0], {2, 3, int64_t{1} << 40})), "channels");
    expect_refused(good.with_input(0, with_dims(good.inputs[0], {int64_t{1} << 62, 3, 40})), "shape");
    expect_refused(good.with_input(0, random.integers<int32_t>({2, 3, 40}, 9)), "type");
    expect_refused(good.with_input(0, nullptr), "dimensions");
    expect_refused(good.with_input(1, random.normals({2, 3, 39})), "skip");
    expect_refused(good.with_input(1, random.normals({3, 40})), "skip");
    expect_refused(good.with_input(1, random.integers<int8_t>({2, 3, 40}, 9)), "skip");
    expect_refused(good.with_input(2, random.normals({39})), "weight");
    expect_refused(good.with_input(2, random.normals({1, 40})), "weight");
    expect_refused(good.with_input(2, random.integers<uint8_t>({40}, 9)), "weight");
    expect_refused(good.with_input(2, nullptr), "weight");
    expect_refused(good.with_input(layer ? 4 : 3, random.normals({41})), "skip_bias");
    if (layer) expect_refused(good.with_input(3, random.normals({1})), "beta");
    for (size_t lonely : {2, 3}) {
      Node node = good;
      node.outputs[lonely] = false;
      expect_refused(node, "codes and steps");
    }
  }
}

}  // namespace

void check_norm() {
  Random random(1);
  for (bool layer : {false, true}) {
    for (int64_t C : {1, 3, 15, 16, 17, 31, 64, 67, 128, 130, 257, 1000}) {
      for (int64_t block : {32, 64, 128, 256}) {
        const bool odd = random.below(2), bias = random.below(2), beta = random.below(2);
        check_case({{3, C}, layer, true, bias, beta, block, {true, true, true, true}}, random);
        check_case({{C}, layer, odd, odd, true, block, {false, odd, true, true}}, random);
      }
      check_case({{2, 1, 2, C}, layer, false, false, true, 0, {true}}, random);
      check_case({{2, C}, layer, true, true, false, 0, {false, true}}, random);
    }
    check_case({{70, 1031}, layer, true, true, true, 128, {true, true, true, true}}, random);  // in many tasks
    check_case({{0, 5}, layer, true, true, true, 32, {true, true, true, true}}, random);
  }
  check_hostile(random);
}

}  // namespace driver
