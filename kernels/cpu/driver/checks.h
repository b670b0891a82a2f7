// What the driver does with each operator; each stands in a file of the operator's name.
#pragma once

namespace driver {

void check_norm();
void check_codebook_embedding();
void check_group_query_attention();
void check_matmul_nbits();
void check_matmul_sparse();
void check_matmul_ternary();

}  // namespace driver
