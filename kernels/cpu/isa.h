// Which instruction sets this processor has, and which of them a kernel is to use.
#pragma once

#include <string>

namespace ryzen {

// In ascending order of preference. AVX2_VNNI is an extension of its own: processors with AVX-512 may lack it.
enum class Isa : int { SCALAR = 0, AVX2 = 1, AVX2_VNNI = 2, AVX512_VNNI = 3 };

// Whether this processor and its operating system run `isa`.
bool has(Isa isa);

// The best instruction set that this processor has.
Isa best_isa();

// `auto`, or one of scalar, avx2, avx2_vnni, avx512_vnni. Throws Refused for an unknown name and for one
// that this processor does not have.
Isa chosen_isa(const std::string& name);

const char* isa_name(Isa isa);

}  // namespace ryzen
