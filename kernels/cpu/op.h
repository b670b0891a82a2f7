// What every operator is written with: attributes and constant inputs when a kernel is made, tensors and tasks when it
// runs, and one template that turns a class into an OrtCustomOp.
//
// An operator is a class with
//   static constexpr const char* NAME;
//   static constexpr Port INPUTS[], OUTPUTS[];
//   explicit Operator(const Info&);       throws Refused for what it cannot compute
//   void compute(Context&) const;         may run in several threads at once
// Exceptions become error statuses; none crosses the ABI.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <exception>
#include <initializer_list>
#include <iterator>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "ort_abi.h"

namespace ryzen {

// A graph, an attribute or a tensor that the operator does not accept. The message names what and why.
class Refused : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

template <typename... Parts>
[[noreturn]] void refuse(Parts&&... parts) {
  std::string text;
  auto add = [&text](const auto& part) {
    if constexpr (std::is_arithmetic_v<std::decay_t<decltype(part)>>) {
      text += std::to_string(part);
    } else {
      text += part;
    }
  };
  (add(parts), ...);
  throw Refused(text);
}

inline void check(const OrtApi* api, OrtStatus* status) {
  if (status == nullptr) return;
  const std::string text = ort::GetErrorMessage::call(api, status);
  ort::ReleaseStatus::call(api, status);
  throw Refused("ONNX Runtime: " + text);
}

constexpr size_t MOST_DIMS = 8;

struct Shape {
  int64_t dims[MOST_DIMS] = {};
  size_t rank = 0;

  Shape() = default;
  Shape(std::initializer_list<int64_t> sizes) : rank(sizes.size()) { std::copy(sizes.begin(), sizes.end(), dims); }

  int64_t operator[](size_t axis) const { return dims[axis]; }
  int64_t back() const { return dims[rank - 1]; }
  // How many elements; throws Refused for what no tensor can be.
  int64_t count() const {
    int64_t product = 1;
    for (size_t axis = 0; axis < rank; ++axis) {
      if (dims[axis] < 0 || __builtin_mul_overflow(product, dims[axis], &product))
        refuse("a tensor has the impossible shape ", text());
    }
    return product;
  }
  std::string text() const {
    std::string out = "(";
    for (size_t axis = 0; axis < rank; ++axis) out += (axis ? ", " : "") + std::to_string(dims[axis]);
    return out + ")";
  }
};

inline bool operator==(const Shape& a, const Shape& b) {
  return a.rank == b.rank && std::equal(a.dims, a.dims + a.rank, b.dims);
}
inline bool operator!=(const Shape& a, const Shape& b) { return !(a == b); }

// A tensor of the runtime's; absent optional ones have no data and count as false.
struct Tensor {
  void* data = nullptr;
  Shape shape;
  OrtElement element = ORT_UNDEFINED;

  explicit operator bool() const { return element != ORT_UNDEFINED; }

  // The data as T; throws Refused when the elements are of another type.
  template <typename T>
  T* as(OrtElement wanted, const char* name) const {
    if (element != wanted) refuse(name, " has elements of type ", int(element), ", expected ", int(wanted));
    return static_cast<T*>(data);
  }
  const float* floats(const char* name) const { return as<const float>(ORT_FLOAT, name); }
};

namespace detail {

inline Tensor view(const OrtApi* api, const OrtValue* value) {
  Tensor tensor;
  if (value == nullptr) return tensor;
  OrtTensorTypeAndShapeInfo* info = nullptr;
  check(api, ort::GetTensorTypeAndShape::call(api, value, &info));
  size_t rank = 0;
  OrtStatus* status = ort::GetDimensionsCount::call(api, info, &rank);
  if (status == nullptr && rank <= MOST_DIMS) status = ort::GetDimensions::call(api, info, tensor.shape.dims, rank);
  if (status == nullptr) status = ort::GetTensorElementType::call(api, info, &tensor.element);
  ort::ReleaseTensorTypeAndShapeInfo::call(api, info);
  check(api, status);
  if (rank > MOST_DIMS) refuse("a tensor has ", rank, " dimensions, the most are ", MOST_DIMS);
  tensor.shape.rank = rank;
  check(api, ort::GetTensorMutableData::call(api, const_cast<OrtValue*>(value), &tensor.data));
  return tensor;
}

}  // namespace detail

// A node as it is when its kernel is made.
class Info {
 public:
  Info(const OrtApi* api, const OrtKernelInfo* info) : api_(api), info_(info) {}

  int64_t integer(const char* name, int64_t fallback) const {
    int64_t value = fallback;
    if (has_integer(name, &value)) return value;
    expect_absent(name, "an integer");
    return fallback;
  }
  int64_t integer(const char* name) const {
    int64_t value = 0;
    if (!has_integer(name, &value)) refuse("it has no integer attribute ", name);
    return value;
  }
  // An integer attribute between two bounds, both allowed.
  int64_t integer(const char* name, int64_t fallback, int64_t least, int64_t most) const {
    const int64_t value = integer(name, fallback);
    if (value < least || value > most)
      refuse(name, " is ", value, ", expected a number from ", least, " to ", most);
    return value;
  }
  float number(const char* name, float fallback) const {
    float value = fallback;
    if (has_number(name, &value)) return value;
    expect_absent(name, "a float");
    return fallback;
  }
  std::string text(const char* name, const char* fallback) const {
    size_t size = 0;
    if (!has_text(name, &size)) {
      expect_absent(name, "a string");
      return fallback;
    }
    std::string value(size, '\0');
    check(api_, ort::KernelInfoGetAttribute_string::call(api_, info_, name, value.data(), &size));
    value.resize(size > 0 ? size - 1 : 0);  // the size counts the final zero
    return value;
  }
  size_t inputs() const {
    size_t count = 0;
    check(api_, ort::KernelInfo_GetInputCount::call(api_, info_, &count));
    return count;
  }
  // Whether the node names something there: optional inputs before others may be left out.
  bool has_input(size_t index) const {
    if (index >= inputs()) return false;
    size_t size = 0;
    check(api_, ort::KernelInfo_GetInputName::call(api_, info_, index, nullptr, &size));
    return size > 1;  // the size counts the final zero
  }
  // An initializer; absent (false) when the input is missing or computed by the graph.
  Tensor constant(size_t index) const {
    if (!has_input(index)) return {};
    int is_constant = 0;
    const OrtValue* value = nullptr;
    if (!found(ort::KernelInfoGetConstantInput_tensor::call(api_, info_, index, &is_constant, &value))) return {};
    return is_constant ? detail::view(api_, value) : Tensor{};
  }
  const OrtApi* api() const { return api_; }

 private:
  bool has_integer(const char* name, int64_t* value) const {
    return found(ort::KernelInfoGetAttribute_int64::call(api_, info_, name, value));
  }
  bool has_number(const char* name, float* value) const {
    return found(ort::KernelInfoGetAttribute_float::call(api_, info_, name, value));
  }
  bool has_text(const char* name, size_t* size) const {
    return found(ort::KernelInfoGetAttribute_string::call(api_, info_, name, nullptr, size));
  }
  // ONNX Runtime answers alike for what is missing and for what has another type. The latter must not count as missing:
  // the operator would compute something else than the graph says.
  void expect_absent(const char* name, const char* wanted) const {
    int64_t integer = 0;
    float number = 0.0f;
    size_t size = 0;
    if (has_integer(name, &integer) || has_number(name, &number) || has_text(name, &size))
      refuse(name, " is of another type, expected ", wanted);
  }
  bool found(OrtStatus* status) const {
    if (status == nullptr) return true;
    ort::ReleaseStatus::call(api_, status);
    return false;
  }
  const OrtApi* api_;
  const OrtKernelInfo* info_;
};

// One run of a kernel.
class Context {
 public:
  Context(const OrtApi* api, OrtKernelContext* context) : api_(api), context_(context) {}

  Tensor input(size_t index) const {
    size_t count = 0;
    check(api_, ort::KernelContext_GetInputCount::call(api_, context_, &count));
    if (index >= count) return {};
    const OrtValue* value = nullptr;
    check(api_, ort::KernelContext_GetInput::call(api_, context_, index, &value));
    return detail::view(api_, value);
  }
  // The output's buffer: what the caller has bound, else a new one. An optional output that nobody reads is null, and
  // so may be one without elements.
  template <typename T>
  T* output(size_t index, const Shape& shape) const {
    size_t count = 0;
    check(api_, ort::KernelContext_GetOutputCount::call(api_, context_, &count));
    if (index >= count) return nullptr;
    OrtValue* value = nullptr;
    check(api_, ort::KernelContext_GetOutput::call(api_, context_, index, shape.dims, shape.rank, &value));
    if (value == nullptr) return nullptr;
    void* data = nullptr;
    check(api_, ort::GetTensorMutableData::call(api_, value, &data));
    return static_cast<T*>(data);
  }
  // body(task) for every task in [0, count), on the session's own threads; returns when all are done. Tasks must not
  // depend on which thread runs them. What one throws, for want of scratch, is thrown here again: the runtime's threads
  // know no exceptions.
  template <typename Body>
  void parallel(size_t count, const Body& body) const {
    if (count == 1) return body(size_t{0});
    if (count == 0) return;
    Tasks<Body> tasks{body};
    check(api_, ort::KernelContext_ParallelFor::call(api_, context_, Tasks<Body>::run, count, count, &tasks));
    if (tasks.failed.load()) std::rethrow_exception(tasks.failure);
  }

 private:
  template <typename Body>
  struct Tasks {
    const Body& body;
    std::exception_ptr failure = nullptr;  // of the first task that failed
    std::atomic<bool> failed{false};

    static void run(void* data, size_t task) noexcept {
      auto& tasks = *static_cast<Tasks*>(data);
      try {
        tasks.body(task);
      } catch (...) {
        if (!tasks.failed.exchange(true)) tasks.failure = std::current_exception();
      }
    }
  };

  const OrtApi* api_;
  OrtKernelContext* context_;
};

// An input or output of an operator; ORT_UNDEFINED admits several types, which the kernel checks itself.
struct Port {
  OrtElement element;
  OrtCharacteristic characteristic = ORT_REQUIRED;
};

// The kernel with the table that it was made through.
template <typename Operator>
struct Kernel {
  const OrtApi* api;
  Operator op;
};

template <typename Body>
OrtStatus* guarded(const OrtApi* api, const char* name, const Body& body) noexcept {
  char text[512];
  OrtErrorCode code = ORT_FAIL;
  try {
    body();
    return nullptr;
  } catch (const Refused& error) {
    code = ORT_INVALID_ARGUMENT;
    std::snprintf(text, sizeof text, "ryzen::%s: %s", name, error.what());
  } catch (const std::exception& error) {
    std::snprintf(text, sizeof text, "ryzen::%s: %s", name, error.what());
  } catch (...) {
    std::snprintf(text, sizeof text, "ryzen::%s: an unknown failure", name);
  }
  return ort::CreateStatus::call(api, code, text);
}

template <typename Operator>
const OrtCustomOp* custom_op() {
  static const OrtCustomOp table = [] {
    using Op = const OrtCustomOp*;
    OrtCustomOp op{};
    op.version = ort::API_VERSION;
    op.GetName = [](Op) { return Operator::NAME; };
    op.GetExecutionProviderType = [](Op) -> const char* { return nullptr; };
    op.GetInputType = [](Op, size_t index) { return Operator::INPUTS[index].element; };
    op.GetInputTypeCount = [](Op) { return std::size(Operator::INPUTS); };
    op.GetOutputType = [](Op, size_t index) { return Operator::OUTPUTS[index].element; };
    op.GetOutputTypeCount = [](Op) { return std::size(Operator::OUTPUTS); };
    op.GetInputCharacteristic = [](Op, size_t index) { return Operator::INPUTS[index].characteristic; };
    op.GetOutputCharacteristic = [](Op, size_t index) { return Operator::OUTPUTS[index].characteristic; };
    op.GetInputMemoryType = [](Op, size_t) { return ORT_MEMORY_DEFAULT; };
    op.GetVariadicInputMinArity = [](Op) { return 1; };
    op.GetVariadicInputHomogeneity = [](Op) { return 0; };
    op.GetVariadicOutputMinArity = [](Op) { return 1; };
    op.GetVariadicOutputHomogeneity = [](Op) { return 0; };
    op.CreateKernelV2 = [](Op, const OrtApi* api, const OrtKernelInfo* info, void** kernel) {
      return guarded(api, Operator::NAME, [&] { *kernel = new Kernel<Operator>{api, Operator(Info(api, info))}; });
    };
    op.KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
      const auto* made = static_cast<const Kernel<Operator>*>(kernel);
      return guarded(made->api, Operator::NAME, [&] {
        Context run(made->api, context);
        made->op.compute(run);
      });
    };
    op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel<Operator>*>(kernel); };
    op.GetStartVersion = [](Op) { return 1; };
    op.GetEndVersion = [](Op) { return 1 << 20; };
    op.GetMayInplace = [](int**, int**) { return size_t{0}; };
    op.ReleaseMayInplace = [](int*, int*) {};
    op.GetAliasMap = [](int**, int**) { return size_t{0}; };
    op.ReleaseAliasMap = [](int*, int*) {};
    return op;
  }();
  return &table;
}

}  // namespace ryzen
