// Compiles RYZEN_VECTOR_CODE (a file name) once for every instruction set, each time into a namespace of its own.
//
// One translation unit then holds all versions, and the compiler is told per function what it may use: nothing but the
// chosen version runs. Included after every other header, so that none of those is compiled for more than the baseline.
#ifdef __clang__
#error "compile with g++: clang ignores #pragma GCC target, which says per function what may be used"
#endif

#include <immintrin.h>

#define INLINE static inline __attribute__((always_inline))

// GCC 12 takes the don't-care operand of its own AVX-512 intrinsics for a variable that somebody forgot to set.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define RYZEN_WIDE 0
#define RYZEN_VNNI 0
namespace ryzen::avx2 {
#include "tiles_256.h"
#include RYZEN_VECTOR_CODE
}  // namespace ryzen::avx2
#undef RYZEN_VNNI
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avxvnni")
#define RYZEN_VNNI 1
namespace ryzen::avx2_vnni {
#include "tiles_256.h"
#include RYZEN_VECTOR_CODE
}  // namespace ryzen::avx2_vnni
#undef RYZEN_WIDE
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512dq,avx512bw,avx512vl,avx512vbmi,avx512vnni")
#define RYZEN_WIDE 1
namespace ryzen::avx512_vnni {
#include "tiles_512.h"
#include RYZEN_VECTOR_CODE
}  // namespace ryzen::avx512_vnni
#undef RYZEN_WIDE
#undef RYZEN_VNNI
#pragma GCC pop_options

#pragma GCC diagnostic pop

#undef INLINE
#undef RYZEN_VECTOR_CODE
