// The library's one entry point: registers every operator in the domain `ryzen`.
#include <map>
#include <mutex>
#include <string>

#include "codebook_embedding.h"
#include "group_query_attention.h"
#include "isa.h"
#include "matmul_nbits.h"
#include "matmul_sparse.h"
#include "matmul_ternary.h"
#include "norm.h"
#include "op.h"

namespace {

constexpr const char* DOMAIN = "ryzen";

const OrtCustomOp* const OPERATORS[] = {
    ryzen::custom_op<ryzen::MatMulNBits>(),
    ryzen::custom_op<ryzen::GroupQueryAttentionOf<ORT_FLOAT>>(),
    ryzen::custom_op<ryzen::GroupQueryAttentionOf<ORT_FLOAT16>>(),
    ryzen::custom_op<ryzen::GroupQueryAttentionOf<ORT_INT8>>(),
    ryzen::custom_op<ryzen::GroupQueryAttentionOf<ORT_UINT8>>(),
    ryzen::custom_op<ryzen::SkipRMSNorm>(),
    ryzen::custom_op<ryzen::SkipLayerNorm>(),
    ryzen::custom_op<ryzen::CodebookEmbedding>(),
    ryzen::custom_op<ryzen::MatMulTernary>(),
    ryzen::custom_op<ryzen::SparseMatMulNBits>(),
};

OrtCustomOpDomain* make_domain(const OrtApi* api) {
  OrtCustomOpDomain* domain = nullptr;
  ryzen::check(api, ryzen::ort::CreateCustomOpDomain::call(api, DOMAIN, &domain));
  for (const OrtCustomOp* op : OPERATORS) ryzen::check(api, ryzen::ort::CustomOpDomain_Add::call(api, domain, op));
  return domain;
}

}  // namespace

extern "C" {

#define RYZEN_EXPORT __attribute__((visibility("default")))

// The symbol that ONNX Runtime looks for. A runtime without the API version that we need gets a status that says so.
RYZEN_EXPORT OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(ryzen::ort::API_VERSION);
  if (api == nullptr) {
    const std::string text = std::string("the ryzen operators need ONNX Runtime 1.") +
                             std::to_string(ryzen::ort::API_VERSION) + " or newer, this is " + base->GetVersionString();
    return ryzen::ort::CreateStatus::call(base->GetApi(ryzen::ort::FIRST_VERSION), ORT_NOT_IMPLEMENTED, text.c_str());
  }
  return ryzen::guarded(api, "RegisterCustomOps", [&] {
    // One for each runtime in the process (onnxruntime's Python module has its own, onnxruntime-genai loads another): a
    // domain is an object of the runtime that made it. Neither they nor the table are ever released: sessions refer to
    // them, and nothing tells us when the last one is gone.
    static std::mutex guard;
    static auto& domains = *new std::map<const OrtApi*, OrtCustomOpDomain*>;
    const std::lock_guard<std::mutex> lock(guard);
    OrtCustomOpDomain*& domain = domains[api];
    if (domain == nullptr) domain = make_domain(api);
    ryzen::check(api, ryzen::ort::AddCustomOpDomain::call(api, options, domain));
  });
}

// The best instruction set here, for `doctor`.
RYZEN_EXPORT const char* RyzenBestIsa() { return ryzen::isa_name(ryzen::best_isa()); }
}
