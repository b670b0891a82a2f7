// The part of ONNX Runtime's C ABI that a custom-op library needs, declared by hand: no package ships the header.
//
// ONNX Runtime hands out one table of function pointers, OrtApi. The table only ever grows at its end, so a function's
// position is its name; the positions below were read off the public header (onnxruntime_c_api.h) and are tried against
// the oldest and the newest supported runtime by the tests. A runtime older than API_VERSION gives no table, and the
// library then refuses to register.
#pragma once

#include <cstddef>
#include <cstdint>

extern "C" {

struct OrtStatus;
struct OrtValue;
struct OrtTensorTypeAndShapeInfo;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtShapeInferContext;

// OrtApi: opaque here, read by position.
struct OrtApi {
  const void* entries[1];
};

struct OrtApiBase {
  const OrtApi* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

enum OrtErrorCode : int {
  ORT_FAIL = 1,
  ORT_INVALID_ARGUMENT = 2,
  ORT_NOT_IMPLEMENTED = 9,
};

// ONNXTensorElementDataType, numbered as in ONNX's TensorProto. UNDEFINED as the type of an input admits any.
enum OrtElement : int {
  ORT_UNDEFINED = 0,
  ORT_FLOAT = 1,
  ORT_UINT8 = 2,
  ORT_INT8 = 3,
  ORT_INT16 = 5,
  ORT_INT32 = 6,
  ORT_INT64 = 7,
  ORT_FLOAT16 = 10,
};

enum OrtCharacteristic : int { ORT_REQUIRED = 0, ORT_OPTIONAL = 1, ORT_VARIADIC = 2 };

enum OrtMemory : int { ORT_MEMORY_DEFAULT = 0 };

// What one operator looks like to ONNX Runtime. Fields after the ones that `version` covers are never read.
struct OrtCustomOp {
  uint32_t version;
  void* (*CreateKernel)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*);
  const char* (*GetName)(const OrtCustomOp*);
  const char* (*GetExecutionProviderType)(const OrtCustomOp*);
  OrtElement (*GetInputType)(const OrtCustomOp*, size_t index);
  size_t (*GetInputTypeCount)(const OrtCustomOp*);
  OrtElement (*GetOutputType)(const OrtCustomOp*, size_t index);
  size_t (*GetOutputTypeCount)(const OrtCustomOp*);
  void (*KernelCompute)(void* kernel, OrtKernelContext*);
  void (*KernelDestroy)(void* kernel);
  OrtCharacteristic (*GetInputCharacteristic)(const OrtCustomOp*, size_t index);
  OrtCharacteristic (*GetOutputCharacteristic)(const OrtCustomOp*, size_t index);
  OrtMemory (*GetInputMemoryType)(const OrtCustomOp*, size_t index);
  int (*GetVariadicInputMinArity)(const OrtCustomOp*);
  int (*GetVariadicInputHomogeneity)(const OrtCustomOp*);
  int (*GetVariadicOutputMinArity)(const OrtCustomOp*);
  int (*GetVariadicOutputHomogeneity)(const OrtCustomOp*);
  OrtStatus* (*CreateKernelV2)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*, void** kernel);
  OrtStatus* (*KernelComputeV2)(void* kernel, OrtKernelContext*);
  OrtStatus* (*InferOutputShapeFn)(const OrtCustomOp*, OrtShapeInferContext*);
  int (*GetStartVersion)(const OrtCustomOp*);
  int (*GetEndVersion)(const OrtCustomOp*);
  size_t (*GetMayInplace)(int** inputs, int** outputs);
  void (*ReleaseMayInplace)(int* inputs, int* outputs);
  size_t (*GetAliasMap)(int** inputs, int** outputs);
  void (*ReleaseAliasMap)(int* inputs, int* outputs);
};

}  // extern "C"

namespace ryzen::ort {

constexpr uint32_t API_VERSION = 18;   // the first with every function below (ONNX Runtime 1.18)
constexpr uint32_t FIRST_VERSION = 1;  // always served: what a refusal is reported through

// One entry of OrtApi: its position in the table and its signature.
template <size_t POSITION, typename Signature>
struct Entry;

template <size_t POSITION, typename Result, typename... Arguments>
struct Entry<POSITION, Result(Arguments...)> {
  static Result call(const OrtApi* api, Arguments... arguments) {
    return reinterpret_cast<Result (*)(Arguments...)>(const_cast<void*>(api->entries[POSITION]))(arguments...);
  }
};

using CreateStatus = Entry<0, OrtStatus*(OrtErrorCode, const char*)>;
using GetErrorMessage = Entry<2, const char*(const OrtStatus*)>;
using CreateCustomOpDomain = Entry<26, OrtStatus*(const char*, OrtCustomOpDomain**)>;
using CustomOpDomain_Add = Entry<27, OrtStatus*(OrtCustomOpDomain*, const OrtCustomOp*)>;
using AddCustomOpDomain = Entry<28, OrtStatus*(OrtSessionOptions*, OrtCustomOpDomain*)>;
using GetTensorMutableData = Entry<51, OrtStatus*(OrtValue*, void**)>;
using GetTensorElementType = Entry<60, OrtStatus*(const OrtTensorTypeAndShapeInfo*, OrtElement*)>;
using GetDimensionsCount = Entry<61, OrtStatus*(const OrtTensorTypeAndShapeInfo*, size_t*)>;
using GetDimensions = Entry<62, OrtStatus*(const OrtTensorTypeAndShapeInfo*, int64_t*, size_t)>;
using GetTensorTypeAndShape = Entry<65, OrtStatus*(const OrtValue*, OrtTensorTypeAndShapeInfo**)>;
using KernelInfoGetAttribute_float = Entry<85, OrtStatus*(const OrtKernelInfo*, const char*, float*)>;
using KernelInfoGetAttribute_int64 = Entry<86, OrtStatus*(const OrtKernelInfo*, const char*, int64_t*)>;
using KernelInfoGetAttribute_string = Entry<87, OrtStatus*(const OrtKernelInfo*, const char*, char*, size_t*)>;
using KernelContext_GetInputCount = Entry<88, OrtStatus*(const OrtKernelContext*, size_t*)>;
using KernelContext_GetOutputCount = Entry<89, OrtStatus*(const OrtKernelContext*, size_t*)>;
using KernelContext_GetInput = Entry<90, OrtStatus*(const OrtKernelContext*, size_t, const OrtValue**)>;
using KernelContext_GetOutput = Entry<91, OrtStatus*(OrtKernelContext*, size_t, const int64_t*, size_t, OrtValue**)>;
using ReleaseStatus = Entry<93, void(OrtStatus*)>;
using ReleaseTensorTypeAndShapeInfo = Entry<99, void(OrtTensorTypeAndShapeInfo*)>;
using KernelInfo_GetInputCount = Entry<230, OrtStatus*(const OrtKernelInfo*, size_t*)>;
using KernelInfo_GetInputName = Entry<232, OrtStatus*(const OrtKernelInfo*, size_t, char*, size_t*)>;
using KernelInfoGetConstantInput_tensor = Entry<249, OrtStatus*(const OrtKernelInfo*, size_t, int*, const OrtValue**)>;
using KernelContext_ParallelFor =
    Entry<274, OrtStatus*(const OrtKernelContext*, void (*)(void*, size_t), size_t, size_t, void*)>;

}  // namespace ryzen::ort
