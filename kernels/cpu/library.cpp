// The library's one entry point: registers every operator in the domain `ryzen`.
#include <string>

#include "codebook_embedding.h"
#include "group_query_attention.h"
#include "isa.h"
#include "matmul_nbits.h"
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
};

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
  // Lives as long as the process: sessions refer to it, and nothing tells us when the last one is gone.
  static OrtCustomOpDomain* domain = nullptr;
  return ryzen::guarded(api, "RegisterCustomOps", [&] {
    static const bool made = [&] {
      ryzen::check(api, ryzen::ort::CreateCustomOpDomain::call(api, DOMAIN, &domain));
      for (const OrtCustomOp* op : OPERATORS) ryzen::check(api, ryzen::ort::CustomOpDomain_Add::call(api, domain, op));
      return true;
    }();
    static_cast<void>(made);
    ryzen::check(api, ryzen::ort::AddCustomOpDomain::call(api, options, domain));
  });
}

// The best instruction set here, for `doctor`.
RYZEN_EXPORT const char* RyzenBestIsa() { return ryzen::isa_name(ryzen::best_isa()); }
}
