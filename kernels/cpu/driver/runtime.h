// A stand-in for ONNX Runtime that the operators can be run under without it: in a program of our own, so that
// AddressSanitizer and UndefinedBehaviorSanitizer see everything, and with graphs that no real runtime lets through.
//
// Tensors live in heap blocks of exactly their size, or end where a page begins that nobody may touch: the former shows
// an access beyond to the sanitizer, the latter also one by masked instructions, which the sanitizer does not see.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <variant>
#include <vector>

#include "../isa.h"
#include "../ort_abi.h"

namespace driver {

enum class Placement { HEAP, BEFORE_A_GUARD };

// Memory of exactly `size` bytes, filled with ones: floats that nobody writes are NaN.
class Block {
 public:
  Block(size_t size, Placement placement);
  ~Block();
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;
  uint8_t* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  size_t size_, mapped_ = 0;
  uint8_t *data_ = nullptr, *mapping_ = nullptr;
};

}  // namespace driver

struct OrtValue {
  OrtElement element;
  std::vector<int64_t> dims;
  std::shared_ptr<driver::Block> block;
};

namespace driver {

using Value = std::shared_ptr<OrtValue>;  // null where an optional one is absent
using Dims = std::vector<int64_t>;

template <typename T>
constexpr OrtElement element_of() {
  if constexpr (std::is_same_v<T, float>) return ORT_FLOAT;
  if constexpr (std::is_same_v<T, uint8_t>) return ORT_UINT8;
  if constexpr (std::is_same_v<T, int8_t>) return ORT_INT8;
  if constexpr (std::is_same_v<T, int16_t>) return ORT_INT16;
  if constexpr (std::is_same_v<T, int32_t>) return ORT_INT32;
  if constexpr (std::is_same_v<T, int64_t>) return ORT_INT64;
}

// How many elements `dims` say; zero where they say nothing that can be.
int64_t count(const Dims& dims);

Value empty_tensor(OrtElement element, const Dims& dims, Placement placement);

template <typename T>
Value tensor(const Dims& dims, const std::vector<T>& values) {
  Value value = empty_tensor(element_of<T>(), dims, Placement::HEAP);
  const size_t size = std::min(value->block->size(), values.size() * sizeof(T));
  std::copy_n(reinterpret_cast<const uint8_t*>(values.data()), size, value->block->data());
  return value;
}

template <typename T>
const T* data(const Value& value) {
  return reinterpret_cast<const T*>(value->block->data());
}

// What the bits of a float16 stand for.
double half_value(uint16_t bits);

// The same bytes under another shape, which may lie about them.
Value with_dims(const Value& value, const Dims& dims);

using Attribute = std::variant<int64_t, float, std::string>;
using Attributes = std::map<std::string, Attribute>;

struct Node {
  std::string op;
  Attributes attributes;
  std::vector<Value> inputs;
  std::vector<bool> constant;                // by input; those behind its end are not
  std::vector<bool> outputs = {true};        // which are wanted

  Node with(const std::string& name, Attribute value) const;
  Node without(const std::string& name) const;
  Node with_input(size_t index, Value value) const;
};

struct Outcome {
  std::string error;  // empty where all went well
  std::vector<Value> outputs;
};

// Makes the node's kernel, runs it once and destroys it.
Outcome run(const Node& node, int threads, Placement placement);

// Runs the node with every instruction set of this processor, with 1 and 3 threads, with its tensors in both places;
// all runs with one instruction set must give the same bits. Then calls `check` with the outputs, once for each set.
using Check = std::function<void(const std::vector<Value>& outputs, const std::string& what)>;
enum class Across { MAY_DIFFER, SAME_BITS };  // between instruction sets
void run_everywhere(const Node& node, const std::string& what, Across across, const Check& check);

// The node must come back as an error whose text has `part` in it, with every instruction set.
void expect_refused(const Node& node, const std::string& part);

[[noreturn]] void fail(const std::string& text);
void expect_near(const float* got, const std::vector<double>& wanted, double tolerance, const std::string& what);

// How many runs and refusals there were since the last call, as a line of text.
std::string tally();

// Repeatable numbers.
class Random {
 public:
  explicit Random(uint32_t seed) : engine_(seed) {}
  int below(int bound) { return int(engine_() % uint32_t(bound)); }
  float normal() { return normal_(engine_); }
  Value normals(const Dims& dims, float scale = 1.0f);
  Value halves(const Dims& dims);  // float16 from 1 to 2 and from -1 to -2
  template <typename T>
  Value integers(const Dims& dims, int bound) {
    std::vector<T> values(size_t(count(dims)));
    for (T& value : values) value = T(below(bound));
    return tensor<T>(dims, values);
  }

 private:
  std::mt19937 engine_;
  std::normal_distribution<float> normal_;
};

// The library's registration through this runtime, and through one that is too old.
void register_operators();
void check_refusal_of_an_old_runtime();

// A task that throws: its exception must come out on the thread that asked for the tasks.
void check_a_failing_task();

}  // namespace driver
