#include "checks.h"
#include "runtime.h"

namespace driver {
namespace {

enum Input : size_t { A, B, SCALES, ZERO_POINTS, G_IDX, BIAS, RESIDUAL, STEPS };

struct Case {
  Dims dims;  // of A; the last is K
  int64_t N;
  int bits, block;
  bool zeros = false, bias = false, residual = false, steps = false, gated = false;
  const char* activation = "none";
  float threshold = -1.0f;  // negative: of MatMulNBits, which has none

  bool sparse() const { return threshold >= 0.0f; }
  int64_t K() const { return dims.back(); }
  int64_t blocks() const { return (K() + block - 1) / block; }
  int64_t rows() const { return count(dims) / K(); }
  int64_t columns() const { return gated ? N / 2 : N; }
};

Dims last_dim(Dims dims, int64_t last) {
  dims.back() = last;
  return dims;
}

Node node_of(const Case& c, Random& random) {
  Node node;
  node.op = c.sparse() ? "SparseMatMulNBits" : "MatMulNBits";
  node.attributes = {{"K", c.K()},
                     {"N", c.N},
                     {"bits", int64_t{c.bits}},
                     {"block_size", int64_t{c.block}},
                     {"accuracy_level", int64_t{4}},
                     {"gated", int64_t{c.gated}},
                     {"activation", std::string(c.activation)}};
  if (c.sparse()) node.attributes["threshold"] = c.threshold;
  node.inputs.resize(8);
  const Dims taken = last_dim(c.dims, c.blocks() * c.block);
  node.inputs[A] = c.steps ? random.integers<int8_t>(taken, 256) : random.normals(c.dims);
  node.inputs[B] = random.integers<uint8_t>({c.N, c.blocks(), c.block * c.bits / 8}, 256);
  node.inputs[SCALES] = random.normals({c.N, c.blocks()}, 0.1f);
  if (c.zeros) node.inputs[ZERO_POINTS] = random.integers<uint8_t>({c.N, (c.blocks() * c.bits + 7) / 8}, 256);
  if (c.bias) node.inputs[BIAS] = random.normals({c.N});
  if (c.residual) node.inputs[RESIDUAL] = random.normals(last_dim(c.dims, c.columns()));
  if (c.steps) node.inputs[STEPS] = random.normals(last_dim(c.dims, c.blocks()), 0.05f);
  node.constant = {false, true, true, true, true, true};
  while (!node.inputs.back()) node.inputs.pop_back();
  return node;
}

double activate(const std::string& name, double x) {
  if (name == "relu") return std::max(0.0, x);
  if (name == "relu2") return std::max(0.0, x) * std::max(0.0, x);
  if (name == "silu") return x / (1.0 + std::exp(-x));
  if (name == "gelu") return 0.5 * x * (1.0 + std::erf(x / std::sqrt(2.0)));
  if (name == "gelu_tanh") return 0.5 * x * (1.0 + std::tanh(std::sqrt(2.0 / M_PI) * (x + 0.044715 * x * x * x)));
  if (name == "quick_gelu") return x / (1.0 + std::exp(-1.702 * x));
  if (name == "sigmoid") return 1.0 / (1.0 + std::exp(-x));
  if (name == "tanh") return std::tanh(x);
  return x;
}

// W in double, (N, blocks * block).
std::vector<double> weights_of(const Case& c, const Node& node) {
  const int64_t width = c.blocks() * c.block, row_bytes = c.block * c.bits / 8;
  const int mask = (1 << c.bits) - 1;
  std::vector<double> w(size_t(c.N * width));
  for (int64_t n = 0; n < c.N; ++n) {
    for (int64_t k = 0; k < width; ++k) {
      const int64_t block = k / c.block, bit = k % c.block * c.bits;
      const uint8_t* codes = data<uint8_t>(node.inputs[B]) + (n * c.blocks() + block) * row_bytes;
      const int code = codes[bit / 8] >> (bit % 8) & mask;
      int zero = 1 << (c.bits - 1);
      if (c.zeros) {
        const int64_t bytes = (c.blocks() * c.bits + 7) / 8, at = block * c.bits;
        zero = data<uint8_t>(node.inputs[ZERO_POINTS])[n * bytes + at / 8] >> (at % 8) & mask;
      }
      w[size_t(n * width + k)] = double(code - zero) * double(data<float>(node.inputs[SCALES])[n * c.blocks() + block]);
    }
  }
  return w;
}

// The activations as the product sees them, (rows, blocks * block).
std::vector<double> rounded(const Case& c, const Node& node) {
  const int64_t width = c.blocks() * c.block;
  std::vector<double> x(size_t(c.rows() * width));
  for (int64_t row = 0; row < c.rows(); ++row) {
    for (int64_t b = 0; b < c.blocks(); ++b) {
      const int64_t begin = b * c.block, end = begin + c.block;
      if (c.steps) {
        const double step = data<float>(node.inputs[STEPS])[row * c.blocks() + b];
        const int8_t* codes = data<int8_t>(node.inputs[A]) + row * width;
        for (int64_t k = begin; k < end; ++k) x[size_t(row * width + k)] = codes[k] * step;
        continue;
      }
      std::vector<float> from(data<float>(node.inputs[A]) + row * c.K(), data<float>(node.inputs[A]) + (row + 1) * c.K());
      for (float& value : from) value = std::fabs(value) < c.threshold ? 0.0f : value;
      float most = 0.0f;
      for (int64_t k = begin; k < std::min(end, c.K()); ++k) most = std::max(most, std::fabs(from[size_t(k)]));
      if (most == 0.0f) continue;
      for (int64_t k = begin; k < std::min(end, c.K()); ++k)
        x[size_t(row * width + k)] = std::nearbyint(double(from[size_t(k)] * (127.0f / most))) * double(most / 127.0f);
    }
  }
  return x;
}

void check_case(const Case& c, Random& random) {
  const Node node = node_of(c, random);
  const std::vector<double> w = weights_of(c, node), x = rounded(c, node);
  const int64_t width = c.blocks() * c.block;
  std::vector<double> wanted;
  double largest = 1.0;
  for (int64_t row = 0; row < c.rows(); ++row) {
    auto product = [&](int64_t n) {
      double sum = 0.0, magnitude = 0.0;
      for (int64_t k = 0; k < width; ++k) {
        const double term = x[size_t(row * width + k)] * w[size_t(n * width + k)];
        sum += term;
        magnitude += std::fabs(term);
      }
      largest = std::max(largest, magnitude);
      return c.bias ? sum + double(data<float>(node.inputs[BIAS])[n]) : sum;
    };
    for (int64_t n = 0; n < c.columns(); ++n) {
      double y = activate(c.activation, product(n));
      if (c.gated) y *= product(n + c.columns());
      if (c.residual) y += double(data<float>(node.inputs[RESIDUAL])[row * c.columns() + n]);
      wanted.push_back(y);
    }
  }
  const std::string what = node.op + " rows=" + std::to_string(c.rows()) + " K=" + std::to_string(c.K()) +
                           " N=" + std::to_string(c.N) + " bits=" + std::to_string(c.bits) +
                           " block=" + std::to_string(c.block) + " zeros=" + std::to_string(c.zeros) +
                           " gated=" + std::to_string(c.gated) + " " + c.activation;
  // Sums are off by some roundings of the magnitudes they add up; a square or a gate multiplies that by another one.
  const bool squared = c.gated || std::string(c.activation) == "relu2";
  const double tolerance = 4e-6 * largest * (squared ? 2.0 * largest : 1.0);
  const bool exact = std::string(c.activation) == "none";  // an exponential differs in its last bits
  run_everywhere(node, what, exact ? Across::SAME_BITS : Across::MAY_DIFFER,
                 [&](const std::vector<Value>& out, const std::string& name) {
                   expect_near(data<float>(out[0]), wanted, tolerance, name);
                 });
}

void check_hostile(Random& random) {
  const Case c = {{2, 70}, 22, 4, 32, true, true, true, false, true, "silu"};
  const Node good = node_of(c, random);
  for (const char* name : {"K", "N", "bits", "block_size", "gated"}) {
    for (int64_t value : {int64_t{-1}, std::numeric_limits<int64_t>::max(), std::numeric_limits<int64_t>::min(),
                          int64_t{1} << 40})
      expect_refused(good.with(name, value), name);
  }
  for (const char* name : {"K", "N", "block_size"}) {
    expect_refused(good.without(name), name);
    expect_refused(good.with(name, int64_t{0}), name);
    expect_refused(good.with(name, 32.0f), name);
  }
  // The largest lengths that are let through: what they say of the buffers must not overflow.
  const int64_t most = int64_t{1} << 28;
  expect_refused(good.with("K", most).with("N", most), "B has");
  const Node largest = good.with("K", most).with("N", most);
  expect_refused(largest.with("block_size", int64_t{256}).with("bits", int64_t{8}), "B has");
  for (int64_t bits : {0, 1, 3, 5, 6, 7, 16}) expect_refused(good.with("bits", bits), "bits");
  for (int64_t block : {16, 33, 48, 512}) expect_refused(good.with("block_size", block), "block_size");
  expect_refused(good.with("bits", int64_t{8}), "B has");
  expect_refused(good.with("block_size", int64_t{64}), "B has");
  expect_refused(good.with("K", int64_t{97}), "B has");
  expect_refused(good.with("K", int64_t{71}), "A has");  // as many blocks: A tells them apart
  expect_refused(good.with("N", int64_t{24}), "B has");
  expect_refused(good.with("N", int64_t{21}), "N is 21");
  expect_refused(good.with("activation", std::string("swish")), "activation");
  expect_refused(good.with("isa", std::string("avx3")), "isa");
  expect_refused(good.with_input(B, random.integers<uint8_t>({22, 3, 15}, 256)), "B has");
  expect_refused(good.with_input(B, random.integers<int8_t>({22, 3, 16}, 100)), "B has");
  expect_refused(good.with_input(B, with_dims(good.inputs[B], {-22, 3, -16})), "shape");
  expect_refused(good.with_input(B, with_dims(good.inputs[B], {int64_t{1} << 62, 3, 16})), "shape");
  expect_refused(good.with_input(SCALES, random.normals({22, 2})), "scales");
  expect_refused(good.with_input(SCALES, random.integers<uint8_t>({22, 3}, 9)), "scales");
  expect_refused(good.with_input(ZERO_POINTS, random.integers<uint8_t>({22, 1}, 256)), "zero_points");
  expect_refused(good.with_input(ZERO_POINTS, random.normals({22, 2})), "zero_points");
  expect_refused(good.with_input(G_IDX, random.integers<int32_t>({96}, 3)), "g_idx");
  expect_refused(good.with_input(BIAS, random.normals({21})), "bias");
  expect_refused(good.with_input(A, random.normals({2, 69})), "A has");
  expect_refused(good.with_input(A, random.normals({})), "A has");
  expect_refused(good.with_input(A, nullptr), "A has");
  expect_refused(good.with_input(A, random.integers<int8_t>({2, 70}, 100)), "A has");
  expect_refused(good.with_input(A, with_dims(good.inputs[A], {-2, 70})), "shape");
  expect_refused(good.with_input(A, with_dims(good.inputs[A], {int64_t{1} << 60, 70})), "shape");
  expect_refused(good.with_input(RESIDUAL, random.normals({2, 22})), "residual");
  expect_refused(good.with_input(RESIDUAL, random.normals({1, 11})), "residual");
  expect_refused(good.with_input(RESIDUAL, random.integers<int32_t>({2, 11}, 9)), "residual");
  for (size_t index : {B, SCALES, ZERO_POINTS, BIAS}) {
    Node computed = good;
    computed.constant[index] = false;
    expect_refused(computed, "constant");
  }
  Node short_of_inputs = good;
  short_of_inputs.inputs.resize(2);
  expect_refused(short_of_inputs, "inputs");

  const Node taken = node_of({{2, 70}, 22, 4, 32, false, false, false, true}, random);
  expect_refused(taken.with_input(A, random.normals({2, 96})), "A has");
  expect_refused(taken.with_input(A, random.integers<int8_t>({2, 70}, 100)), "A has");
  expect_refused(taken.with_input(A, random.integers<uint8_t>({2, 96}, 100)), "A has");
  expect_refused(taken.with_input(STEPS, random.normals({2, 2})), "steps");
  expect_refused(taken.with_input(STEPS, random.normals({1, 3})), "steps");
  expect_refused(taken.with_input(STEPS, random.integers<int32_t>({2, 3}, 9)), "steps");
}

void check_hostile_threshold(Random& random) {
  const Node good = node_of({{2, 70}, 22, 4, 32, true, true, true, false, true, "silu", 0.5f}, random);
  for (float wrong : {-1.0f, std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()})
    expect_refused(good.with("threshold", wrong), "threshold");
  expect_refused(good.with("threshold", int64_t{1}), "threshold");
  expect_refused(good.with("N", int64_t{21}), "N is 21");
  expect_refused(good.with("K", int64_t{71}), "A has");
  expect_refused(good.with_input(A, random.normals({2, 96})), "A has");
  expect_refused(good.with_input(A, random.integers<int8_t>({2, 70}, 100)), "A has");
  expect_refused(good.with_input(RESIDUAL, random.normals({2, 22})), "residual");
  expect_refused(good.with_input(B, random.integers<uint8_t>({22, 3, 15}, 256)), "B has");
}

}  // namespace

void check_matmul_sparse() {
  Random random(5);
  for (int bits : {2, 4, 8}) {
    for (int block : {32, 96, 256}) {
      for (int64_t K : {1, 33, 300}) {
        const int64_t N = 1 + random.below(300);
        const bool zeros = random.below(2), bias = random.below(2), residual = random.below(2);
        for (float threshold : {0.0f, 0.7f, 9.0f}) {
          check_case({{1, K}, N, bits, block, zeros, bias, residual, false, false, "none", threshold}, random);
          check_case({{3, K}, 2 * N, bits, block, zeros, bias, residual, false, true, "silu", threshold}, random);
          check_case({{9, K}, N, bits, block, !zeros, !bias, !residual, false, false, "none", threshold}, random);
        }
      }
    }
  }
  check_case({{2, 300}, 6000, 4, 128, true, false, false, false, false, "none", 0.5f}, random);  // strips
  check_case({{0, 64}, 20, 4, 32, false, false, false, false, false, "none", 0.5f}, random);
  check_hostile_threshold(random);
}

void check_matmul_nbits() {
  Random random(4);
  for (int bits : {2, 4, 8}) {
    for (int block : {32, 64, 96, 128, 256}) {
      for (int64_t K : {1, 31, 33, 257, 300}) {
        const int64_t N = 1 + random.below(70), rows = 1 + random.below(20);
        const bool zeros = random.below(2), bias = random.below(2), residual = random.below(2), steps = random.below(2);
        check_case({{rows, K}, N, bits, block, zeros, bias, residual, steps}, random);
        check_case({{1, K}, N, bits, block, !zeros, !bias, !residual, !steps}, random);
        check_case({{1, rows, K}, 2 * N, bits, block, zeros, bias, residual, steps, true, "silu"}, random);
      }
    }
    for (int64_t N : {1, 15, 16, 17, 32, 33, 64, 65, 127}) check_case({{3, 64}, N, bits, 32, bits == 2, true}, random);
    for (int64_t rows : {1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33}) check_case({{rows, 96}, 40, bits, 32}, random);
  }
  for (const char* activation : {"relu", "relu2", "silu", "gelu", "gelu_tanh", "quick_gelu", "sigmoid", "tanh"}) {
    check_case({{3, 64}, 19, 4, 32, false, true, false, false, false, activation}, random);
    check_case({{3, 64}, 38, 4, 32, true, true, true, false, true, activation}, random);
  }
  check_case({{2, 1100}, 1030, 4, 32, true}, random);  // panels of several tasks
  check_case({{130, 160}, 21, 8, 32, false}, random);  // rows that are rounded in tasks
  check_case({{0, 64}, 20, 4, 32}, random);
  check_case({{64}, 20, 4, 32}, random);
  check_hostile(random);
}

}  // namespace driver
