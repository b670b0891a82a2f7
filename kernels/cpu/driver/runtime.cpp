#include "runtime.h"

#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <set>
#include <thread>

#include "../op.h"

struct OrtStatus {
  OrtErrorCode code;
  std::string message;
};

struct OrtTensorTypeAndShapeInfo {
  OrtElement element;
  std::vector<int64_t> dims;
};

struct OrtCustomOpDomain {
  std::string name;
  std::vector<const OrtCustomOp*> ops;
};

struct OrtSessionOptions {
  std::vector<OrtCustomOpDomain*> domains;
};

struct OrtKernelInfo {
  const driver::Node* node;
};

struct OrtKernelContext {
  const driver::Node* node;
  const OrtCustomOp* op;
  int threads;
  driver::Placement placement;
  std::vector<driver::Value> outputs;
};

extern "C" OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base);

namespace driver {
namespace {

constexpr int64_t MOST_ELEMENTS = int64_t{1} << 28;  // of an output: more is a mistake in these tests

int runs = 0, refusals = 0;

size_t size_of(OrtElement element) {
  switch (element) {
    case ORT_FLOAT:
    case ORT_INT32: return 4;
    case ORT_INT64: return 8;
    case ORT_INT16:
    case ORT_FLOAT16: return 2;
    default: return 1;
  }
}

// --- the entries of OrtApi

OrtStatus* create_status(OrtErrorCode code, const char* message) { return new OrtStatus{code, message}; }
const char* error_message(const OrtStatus* status) { return status->message.c_str(); }
void release_status(OrtStatus* status) { delete status; }
OrtStatus* failure(const std::string& text) { return new OrtStatus{ORT_FAIL, text}; }

OrtStatus* create_domain(const char* name, OrtCustomOpDomain** domain) {
  *domain = new OrtCustomOpDomain{name, {}};
  return nullptr;
}
OrtStatus* add_to_domain(OrtCustomOpDomain* domain, const OrtCustomOp* op) {
  domain->ops.push_back(op);
  return nullptr;
}
OrtStatus* add_domain(OrtSessionOptions* options, OrtCustomOpDomain* domain) {
  options->domains.push_back(domain);
  return nullptr;
}

OrtStatus* tensor_data(OrtValue* value, void** data) {
  *data = value->block->data();
  return nullptr;
}
OrtStatus* tensor_info(const OrtValue* value, OrtTensorTypeAndShapeInfo** info) {
  *info = new OrtTensorTypeAndShapeInfo{value->element, value->dims};
  return nullptr;
}
void release_info(OrtTensorTypeAndShapeInfo* info) { delete info; }
OrtStatus* element_type(const OrtTensorTypeAndShapeInfo* info, OrtElement* element) {
  *element = info->element;
  return nullptr;
}
OrtStatus* dims_count(const OrtTensorTypeAndShapeInfo* info, size_t* count) {
  *count = info->dims.size();
  return nullptr;
}
OrtStatus* dims(const OrtTensorTypeAndShapeInfo* info, int64_t* out, size_t count) {
  std::copy_n(info->dims.begin(), std::min(count, info->dims.size()), out);
  return nullptr;
}

// Texts are asked for twice: for their size, then for themselves.
OrtStatus* copy_text(const std::string& text, char* out, size_t* size) {
  const size_t needed = text.size() + 1, room = *size;
  *size = needed;
  if (out == nullptr) return nullptr;
  if (room < needed) return failure("the buffer for a text is too small");
  std::memcpy(out, text.c_str(), needed);
  return nullptr;
}

template <typename T>
const T* attribute(const OrtKernelInfo* info, const char* name) {
  const auto found = info->node->attributes.find(name);
  return found == info->node->attributes.end() ? nullptr : std::get_if<T>(&found->second);
}
template <typename T>
OrtStatus* get_attribute(const OrtKernelInfo* info, const char* name, T* out) {
  const T* value = attribute<T>(info, name);
  if (value == nullptr) return failure(std::string("no such attribute: ") + name);
  *out = *value;
  return nullptr;
}
OrtStatus* get_text(const OrtKernelInfo* info, const char* name, char* out, size_t* size) {
  const std::string* value = attribute<std::string>(info, name);
  if (value == nullptr) return failure(std::string("no such attribute: ") + name);
  return copy_text(*value, out, size);
}

OrtStatus* info_input_count(const OrtKernelInfo* info, size_t* count) {
  *count = info->node->inputs.size();
  return nullptr;
}
OrtStatus* input_name(const OrtKernelInfo* info, size_t index, char* out, size_t* size) {
  if (index >= info->node->inputs.size()) return failure("no such input");
  return copy_text(info->node->inputs[index] ? "input" : "", out, size);
}
OrtStatus* constant_input(const OrtKernelInfo* info, size_t index, int* is_constant, const OrtValue** value) {
  if (index >= info->node->inputs.size()) return failure("no such input");
  *is_constant = index < info->node->constant.size() && info->node->constant[index] && info->node->inputs[index];
  *value = *is_constant ? info->node->inputs[index].get() : nullptr;
  return nullptr;
}

OrtStatus* input_count(const OrtKernelContext* context, size_t* count) {
  *count = context->node->inputs.size();
  return nullptr;
}
OrtStatus* output_count(const OrtKernelContext* context, size_t* count) {
  *count = context->node->outputs.size();
  return nullptr;
}
OrtStatus* get_input(const OrtKernelContext* context, size_t index, const OrtValue** value) {
  if (index >= context->node->inputs.size()) return failure("no such input");
  *value = context->node->inputs[index].get();
  return nullptr;
}
OrtStatus* get_output(OrtKernelContext* context, size_t index, const int64_t* sizes, size_t rank, OrtValue** value) {
  *value = nullptr;
  if (index >= context->outputs.size()) return failure("no such output");
  if (!context->node->outputs[index]) return nullptr;
  const Dims shape(sizes, sizes + rank);
  int64_t elements = 1;
  for (int64_t size : shape) {
    if (size < 0 || __builtin_mul_overflow(elements, size, &elements) || elements > MOST_ELEMENTS)
      return failure("an output of impossible size");
  }
  if (!context->outputs[index])
    context->outputs[index] = empty_tensor(context->op->GetOutputType(context->op, index), shape, context->placement);
  if (context->outputs[index]->dims != shape) return failure("an output is asked for in two shapes");
  *value = context->outputs[index].get();
  return nullptr;
}

OrtStatus* parallel_for(const OrtKernelContext* context, void (*body)(void*, size_t), size_t total, size_t,
                        void* argument) {
  std::atomic<size_t> next{0};
  auto work = [&] {
    for (size_t task; (task = next++) < total;) body(argument, task);
  };
  std::vector<std::thread> others;
  for (int i = 1; i < context->threads; ++i) others.emplace_back(work);
  work();
  for (std::thread& other : others) other.join();
  return nullptr;
}

void unused() {
  std::fprintf(stderr, "an entry of OrtApi was called that the library is not known to use\n");
  std::abort();
}

// --- the tables

constexpr size_t ENTRIES = 300;
const void* entries[ENTRIES];

template <typename Entry>
struct Position;
template <size_t POSITION, typename Signature>
struct Position<ryzen::ort::Entry<POSITION, Signature>> {
  static constexpr size_t VALUE = POSITION;
  using Function = Signature*;
};

// The signature that the library calls through is the one that `function` must have.
template <typename Entry>
void put(typename Position<Entry>::Function function) {
  entries[Position<Entry>::VALUE] = reinterpret_cast<const void*>(function);
}

const OrtApi* api() {
  static const bool filled = [] {
    for (const void*& entry : entries) entry = reinterpret_cast<const void*>(&unused);
    using namespace ryzen::ort;
    put<CreateStatus>(create_status);
    put<GetErrorMessage>(error_message);
    put<ReleaseStatus>(release_status);
    put<CreateCustomOpDomain>(create_domain);
    put<CustomOpDomain_Add>(add_to_domain);
    put<AddCustomOpDomain>(add_domain);
    put<GetTensorMutableData>(tensor_data);
    put<GetTensorTypeAndShape>(tensor_info);
    put<ReleaseTensorTypeAndShapeInfo>(release_info);
    put<GetTensorElementType>(element_type);
    put<GetDimensionsCount>(dims_count);
    put<GetDimensions>(dims);
    put<KernelInfoGetAttribute_int64>(get_attribute<int64_t>);
    put<KernelInfoGetAttribute_float>(get_attribute<float>);
    put<KernelInfoGetAttribute_string>(get_text);
    put<KernelInfo_GetInputCount>(info_input_count);
    put<KernelInfo_GetInputName>(input_name);
    put<KernelInfoGetConstantInput_tensor>(constant_input);
    put<KernelContext_GetInputCount>(input_count);
    put<KernelContext_GetOutputCount>(output_count);
    put<KernelContext_GetInput>(get_input);
    put<KernelContext_GetOutput>(get_output);
    put<KernelContext_ParallelFor>(parallel_for);
    return true;
  }();
  static_cast<void>(filled);
  return reinterpret_cast<const OrtApi*>(entries);
}

OrtSessionOptions options;

bool takes(const OrtCustomOp* op, const Node& node) {
  for (size_t i = 0; i < std::min(node.inputs.size(), op->GetInputTypeCount(op)); ++i) {
    const OrtElement wanted = op->GetInputType(op, i);
    if (node.inputs[i] && wanted != ORT_UNDEFINED && wanted != node.inputs[i]->element) return false;
  }
  return true;
}

// An operator of the node's name: the one for the types of its inputs, where there is one.
const OrtCustomOp* operator_for(const Node& node) {
  const OrtCustomOp* found = nullptr;
  for (const OrtCustomOp* op : options.domains.at(0)->ops) {
    if (node.op != op->GetName(op)) continue;
    if (takes(op, node)) return op;
    if (found == nullptr) found = op;
  }
  if (found == nullptr) fail("the library has no operator " + node.op);
  return found;
}

std::string message_of(OrtStatus* status) {
  const std::string text = status == nullptr ? "" : status->message;
  delete status;
  return text;
}

std::vector<std::string> isas_here() {
  std::vector<std::string> names;
  for (ryzen::Isa isa : {ryzen::Isa::SCALAR, ryzen::Isa::AVX2, ryzen::Isa::AVX2_VNNI, ryzen::Isa::AVX512_VNNI}) {
    if (ryzen::has(isa)) names.push_back(ryzen::isa_name(isa));
  }
  return names;
}

bool same_bits(const Value& a, const Value& b) {
  if (!a || !b) return !a && !b;
  return a->dims == b->dims && std::memcmp(a->block->data(), b->block->data(), a->block->size()) == 0;
}

void expect_same(const std::vector<Value>& a, const std::vector<Value>& b, const std::string& what) {
  for (size_t i = 0; i < a.size(); ++i) {
    if (!same_bits(a[i], b[i])) fail(what + ": output " + std::to_string(i) + " differs");
  }
}

}  // namespace

Block::Block(size_t size, Placement placement) : size_(size) {
  if (placement == Placement::HEAP) {
    data_ = static_cast<uint8_t*>(::operator new(size));
  } else {
    const size_t page = size_t(sysconf(_SC_PAGESIZE)), whole = (size + page - 1) / page * page;
    mapped_ = whole + page;
    void* mapping = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapping == MAP_FAILED) fail("no memory for a tensor");
    mapping_ = static_cast<uint8_t*>(mapping);
    if (mprotect(mapping_ + whole, page, PROT_NONE) != 0) fail("a page could not be guarded");
    data_ = mapping_ + whole - size;
  }
  std::memset(data_, 0xff, size);
}

Block::~Block() {
  if (mapping_ != nullptr) {
    munmap(mapping_, mapped_);
  } else {
    ::operator delete(data_);
  }
}

int64_t count(const Dims& dims) {
  int64_t product = 1;
  for (int64_t size : dims) {
    if (size < 0 || __builtin_mul_overflow(product, size, &product)) return 0;
  }
  return product;
}

Value empty_tensor(OrtElement element, const Dims& dims, Placement placement) {
  const size_t size = size_t(count(dims)) * size_of(element);
  return std::make_shared<OrtValue>(OrtValue{element, dims, std::make_shared<Block>(size, placement)});
}

double half_value(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const double size = exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24);
  return bits >> 15 ? -size : size;
}

Value with_dims(const Value& value, const Dims& dims) {
  return std::make_shared<OrtValue>(OrtValue{value->element, dims, value->block});
}

Node Node::with(const std::string& name, Attribute value) const {
  Node node = *this;
  node.attributes[name] = std::move(value);
  return node;
}

Node Node::without(const std::string& name) const {
  Node node = *this;
  node.attributes.erase(name);
  return node;
}

Node Node::with_input(size_t index, Value value) const {
  Node node = *this;
  node.inputs.at(index) = std::move(value);
  return node;
}

Outcome run(const Node& given, int threads, Placement placement) {
  Node node = given;
  for (Value& input : node.inputs) {
    if (!input) continue;
    auto block = std::make_shared<Block>(input->block->size(), placement);
    std::memcpy(block->data(), input->block->data(), block->size());
    input = std::make_shared<OrtValue>(OrtValue{input->element, input->dims, std::move(block)});
  }
  const OrtCustomOp* op = operator_for(node);
  const OrtKernelInfo info{&node};
  void* kernel = nullptr;
  Outcome outcome;
  outcome.error = message_of(op->CreateKernelV2(op, api(), &info, &kernel));
  if (!outcome.error.empty()) return outcome;
  OrtKernelContext context{&node, op, threads, placement, std::vector<Value>(node.outputs.size())};
  outcome.error = message_of(op->KernelComputeV2(kernel, &context));
  op->KernelDestroy(kernel);
  outcome.outputs = std::move(context.outputs);
  for (size_t i = 0; i < node.inputs.size(); ++i) {
    const Value &before = given.inputs[i], &after = node.inputs[i];
    if (before && std::memcmp(before->block->data(), after->block->data(), before->block->size()) != 0)
      fail(node.op + " wrote into its input " + std::to_string(i));
  }
  return outcome;
}

void run_everywhere(const Node& node, const std::string& what, Across across, const Check& check) {
  std::vector<Value> scalar;
  for (const std::string& isa : isas_here()) {
    const Node forced = node.with("isa", isa);
    const std::string name = node.op + " " + what + " " + isa;
    std::vector<Value> first;
    for (int threads : {1, 3}) {
      for (Placement placement : {Placement::HEAP, Placement::BEFORE_A_GUARD}) {
        const Outcome outcome = run(forced, threads, placement);
        if (!outcome.error.empty()) fail(name + ": " + outcome.error);
        for (size_t i = 0; i < node.outputs.size(); ++i) {
          if (node.outputs[i] && !outcome.outputs[i]) fail(name + ": output " + std::to_string(i) + " was not made");
        }
        if (first.empty()) first = outcome.outputs;
        expect_same(first, outcome.outputs, name + " with " + std::to_string(threads) + " threads");
        ++runs;
      }
    }
    if (scalar.empty()) scalar = first;
    if (across == Across::SAME_BITS) expect_same(scalar, first, name + " beside scalar");
    check(first, name);
  }
}

void expect_refused(const Node& node, const std::string& part) {
  std::vector<Node> cases = {node};
  if (node.attributes.count("isa") == 0) {
    for (const std::string& isa : isas_here()) cases.push_back(node.with("isa", isa));
  }
  for (const Node& one : cases) {
    for (Placement placement : {Placement::HEAP, Placement::BEFORE_A_GUARD}) {
      const Outcome outcome = run(one, 1, placement);
      if (outcome.error.empty()) fail(node.op + " was accepted where an error about '" + part + "' was expected");
      if (outcome.error.find(part) == std::string::npos)
        fail(node.op + " says '" + outcome.error + "', expected something about '" + part + "'");
      ++refusals;
    }
  }
}

void fail(const std::string& text) {
  std::fprintf(stderr, "FAILED: %s\n", text.c_str());
  std::exit(1);
}

void expect_near(const float* got, const std::vector<double>& wanted, double tolerance, const std::string& what) {
  for (size_t i = 0; i < wanted.size(); ++i) {
    if (!(std::fabs(double(got[i]) - wanted[i]) <= tolerance))
      fail(what + ": number " + std::to_string(i) + " is " + std::to_string(got[i]) + ", expected " +
           std::to_string(wanted[i]) + " within " + std::to_string(tolerance));
  }
}

std::string tally() {
  const std::string text = std::to_string(runs) + " runs, " + std::to_string(refusals) + " refusals";
  runs = refusals = 0;
  return text;
}

Value Random::normals(const Dims& dims, float scale) {
  std::vector<float> values(size_t(count(dims)));
  for (float& value : values) value = normal() * scale;
  return tensor<float>(dims, values);
}

Value Random::halves(const Dims& dims) {
  Value value = empty_tensor(ORT_FLOAT16, dims, Placement::HEAP);
  auto* bits = reinterpret_cast<uint16_t*>(value->block->data());
  // Ten random bits behind the exponent of 1.
  for (int64_t i = 0; i < count(dims); ++i) bits[i] = uint16_t(0x3c00 | below(1024) | below(2) << 15);
  return value;
}

void register_operators() {
  static const OrtApiBase base = {
      [](uint32_t version) -> const OrtApi* { return version == ryzen::ort::API_VERSION ? api() : nullptr; },
      []() -> const char* { return "1.18.0"; }};
  OrtSessionOptions second;
  for (OrtSessionOptions* each : {&options, &second}) {
    const std::string error = message_of(RegisterCustomOps(each, &base));
    if (!error.empty()) fail("the library did not register: " + error);
    if (each->domains.size() != 1 || each->domains[0]->name != "ryzen") fail("the domain is not ryzen alone");
  }
  if (options.domains != second.domains) fail("one runtime was given two domains");
  static const void* others[ENTRIES];  // those of another runtime in the process
  std::copy_n(entries, ENTRIES, others);
  static const OrtApiBase other = {[](uint32_t) { return reinterpret_cast<const OrtApi*>(others); },
                                   base.GetVersionString};
  OrtSessionOptions third;
  const std::string error = message_of(RegisterCustomOps(&third, &other));
  if (!error.empty()) fail("the library did not register with a second runtime: " + error);
  if (options.domains == third.domains) fail("a runtime was given another one's domain");
  std::set<std::string> signatures;
  for (const OrtCustomOp* op : options.domains[0]->ops) {
    std::string signature = op->GetName(op);
    for (size_t i = 0; i < op->GetInputTypeCount(op); ++i) signature += " " + std::to_string(op->GetInputType(op, i));
    if (!signatures.insert(signature).second) fail("twice in the library: " + signature);
  }
}

void check_a_failing_task() {
  OrtKernelContext context{nullptr, nullptr, 3, Placement::HEAP, {}};
  const ryzen::Context run(api(), &context);
  std::atomic<int> done{0};
  try {
    run.parallel(50, [&](size_t task) {
      if (task % 10 == 3) throw std::bad_alloc();
      ++done;
    });
    fail("tasks failed, and nobody was told");
  } catch (const std::bad_alloc&) {
    if (done != 45) fail("a failing task kept others from being done");
  }
}

void check_refusal_of_an_old_runtime() {
  static const OrtApiBase base = {
      [](uint32_t version) -> const OrtApi* { return version == ryzen::ort::FIRST_VERSION ? api() : nullptr; },
      []() -> const char* { return "1.16.3"; }};
  OrtSessionOptions untouched;
  const std::string error = message_of(RegisterCustomOps(&untouched, &base));
  if (error.find("1.16.3") == std::string::npos || error.find("1.18") == std::string::npos)
    fail("an old runtime is told '" + error + "', expected its version and the one that is needed");
  if (!untouched.domains.empty()) fail("the library registered with a runtime that is too old");
}

}  // namespace driver
