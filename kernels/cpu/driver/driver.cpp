// Runs every operator of the library under a runtime of our own, over awkward shapes and hostile graphs, with every
// instruction set of this processor. Meant to be built with -fsanitize=address,undefined; says what it did, and exits
// with 0 when all was as it should be.
#include <cstdio>

#include "checks.h"
#include "runtime.h"

int main() {
  driver::check_refusal_of_an_old_runtime();
  driver::register_operators();
  driver::check_a_failing_task();
  const struct {
    const char* op;
    void (*check)();
  } checks[] = {
      {"SkipRMSNorm and SkipLayerNorm", driver::check_norm},
      {"CodebookEmbedding", driver::check_codebook_embedding},
      {"MatMulNBits", driver::check_matmul_nbits},
      {"SparseMatMulNBits", driver::check_matmul_sparse},
      {"GroupQueryAttention", driver::check_group_query_attention},
      {"MatMulTernary", driver::check_matmul_ternary},
  };
  for (const auto& each : checks) {
    each.check();
    std::printf("%s: %s\n", each.op, driver::tally().c_str());
  }
  return 0;
}
