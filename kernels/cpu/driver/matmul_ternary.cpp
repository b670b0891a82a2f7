#include "checks.h"
#include "runtime.h"

namespace driver {
namespace {

Value pack(const std::vector<int>& weights, int64_t N, int64_t K, Random& random) {
  std::vector<uint8_t> packed(size_t(N * ((K + 3) / 4)));
  for (int64_t n = 0; n < N; ++n) {
    for (int64_t k = 0; k < (K + 3) / 4 * 4; ++k) {
      const int code = k < K ? weights[size_t(n * K + k)] + 1 : random.below(4);  // what fills up is not read
      packed[size_t(n * ((K + 3) / 4) + k / 4)] |= uint8_t(code << (k % 4 * 2));
    }
  }
  return tensor<uint8_t>({N, (K + 3) / 4}, packed);
}

Node node_of(const Dims& dims, const std::vector<int>& weights, int64_t N, bool scale_per_row, Random& random) {
  Node node;
  node.op = "MatMulTernary";
  node.attributes = {{"K", dims.back()}, {"N", N}};
  node.inputs = {random.normals(dims), pack(weights, N, dims.back(), random), random.normals({scale_per_row ? N : 1})};
  node.constant = {false, true, true};
  return node;
}

void check_case(const Dims& dims, int64_t N, Random& random) {
  const int64_t K = dims.back(), rows = count(dims) / K;
  std::vector<int> weights(size_t(N * K));
  for (int& weight : weights) weight = random.below(3) - 1;
  const bool scale_per_row = random.below(2);
  const Node node = node_of(dims, weights, N, scale_per_row, random);
  const float* x = data<float>(node.inputs[0]);
  const float* scale = data<float>(node.inputs[2]);
  std::vector<double> wanted;
  double largest = 0.0;
  for (int64_t row = 0; row < rows; ++row) {
    float most = 0.0f;
    for (int64_t k = 0; k < K; ++k) most = std::max(most, std::fabs(x[row * K + k]));
    for (int64_t n = 0; n < N; ++n) {
      double sum = 0.0;
      for (int64_t k = 0; k < K; ++k)
        sum += std::nearbyint(double(x[row * K + k] * (127.0f / most))) * weights[size_t(n * K + k)];
      wanted.push_back(sum * double(most / 127.0f) * double(scale[scale_per_row ? n : 0]));
      largest = std::max(largest, std::fabs(wanted.back()));
    }
  }
  const std::string what = "rows=" + std::to_string(rows) + " K=" + std::to_string(K) + " N=" + std::to_string(N);
  run_everywhere(node, what, Across::SAME_BITS, [&](const std::vector<Value>& out, const std::string& name) {
    expect_near(data<float>(out[0]), wanted, largest * 1e-6, name);
  });
}

void check_hostile(Random& random) {
  const int64_t K = 21, N = 19;
  const Node good = node_of({2, K}, std::vector<int>(size_t(N * K), 1), N, true, random);
  for (const char* name : {"K", "N"}) {
    for (int64_t value : {int64_t{0}, int64_t{-1}, std::numeric_limits<int64_t>::max(),
                          std::numeric_limits<int64_t>::min(), int64_t{1} << 40})
      expect_refused(good.with(name, value), name);
    expect_refused(good.without(name), name);
    expect_refused(good.with(name, std::string("21")), name);
  }
  expect_refused(good.with("K", int64_t{1} << 20).with("N", int64_t{1} << 24), "packed");
  expect_refused(good.with("K", int64_t{25}), "packed");
  const Value ones = tensor<uint8_t>({N, 6}, std::vector<uint8_t>(size_t(N * 6), 0xaa));
  expect_refused(good.with("K", int64_t{22}).with_input(1, ones), "A has");  // as many bytes in a row: A tells
  expect_refused(good.with("N", int64_t{20}), "packed");
  expect_refused(good.with("N", int64_t{1}), "packed");
  expect_refused(good.with("isa", std::string("avx1024")), "isa");
  expect_refused(good.with_input(0, random.normals({2, 20})), "A has");
  expect_refused(good.with_input(0, random.normals({})), "A has");
  expect_refused(good.with_input(0, random.normals({1, 1, 1, 2, K})), "A has");
  expect_refused(good.with_input(0, with_dims(good.inputs[0], {-2, K})), "shape");
  expect_refused(good.with_input(0, with_dims(good.inputs[0], {int64_t{1} << 61, K})), "shape");
  expect_refused(good.with_input(0, random.integers<int8_t>({2, K}, 9)), "A has");
  expect_refused(good.with_input(0, nullptr), "A has");
  expect_refused(good.with_input(1, with_dims(good.inputs[1], {N * 6})), "packed");
  expect_refused(good.with_input(1, random.integers<int8_t>({N, 6}, 1)), "packed");
  expect_refused(good.with_input(1, nullptr), "packed");
  expect_refused(good.with_input(1, tensor<uint8_t>({N, 6}, std::vector<uint8_t>(size_t(N * 6), 0x33))), "code 3");
  expect_refused(good.with_input(2, random.normals({N - 1})), "scale");
  expect_refused(good.with_input(2, random.normals({})), "scale");
  expect_refused(good.with_input(2, random.integers<uint8_t>({N}, 9)), "scale");
  expect_refused(good.with_input(2, nullptr), "scale");
  for (const std::vector<bool>& constant : {std::vector<bool>{}, {false, true, false}, {false, false, true}}) {
    Node computed = good;
    computed.constant = constant;
    expect_refused(computed, "initializer");
  }
  expect_refused(good.with("gated", int64_t{1}), "halves");
  expect_refused(good.with("activation", std::string("mish")), "activation");
  const Value blocks = tensor<uint8_t>({N, 1, 32}, std::vector<uint8_t>(size_t(N * 32), 0x55));
  expect_refused(good.with_input(1, blocks), "code 1");  // where it must be 2
  expect_refused(good.with_input(1, with_dims(good.inputs[1], {N, 6, 1})), "packed");
}

}  // namespace

void check_matmul_ternary() {
  Random random(3);
  for (int64_t K : {1, 3, 4, 15, 16, 17, 31, 64, 257}) {
    for (int64_t N : {1, 2, 15, 16, 17, 47}) {
      for (int64_t rows : {1, 2, 3, 5, 11}) check_case({rows, K}, N, random);
    }
  }
  check_case({5, 13, 130}, 37, random);  // rows of two tasks
  check_case({1, 1, 2, 2100}, 530, random);  // panels of two tasks
  check_case({29}, 7, random);
  check_case({0, 29}, 7, random);
  check_hostile(random);
}

}  // namespace driver
