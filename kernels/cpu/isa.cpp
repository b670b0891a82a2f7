#include "isa.h"

#include <cpuid.h>

#include <array>
#include <cstdint>

#include "op.h"

namespace ryzen {
namespace {

constexpr std::array<const char*, 4> NAMES = {"scalar", "avx2", "avx2_vnni", "avx512_vnni"};

// Bits of CPUID and XCR0 by the names of Intel's manual (volume 2, CPUID; volume 1, 13.3).
struct Features {
  bool avx2 = false, avx2_vnni = false, avx512_vnni = false;

  Features() {
    uint32_t a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return;
    constexpr uint32_t FMA = 1u << 12, OSXSAVE = 1u << 27, F16C = 1u << 29;
    if ((c & (FMA | OSXSAVE | F16C)) != (FMA | OSXSAVE | F16C)) return;
    uint32_t low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    constexpr uint32_t YMM = 0x6, ZMM = 0xe6;  // which registers the system saves on a switch
    if ((low & YMM) != YMM) return;
    uint32_t b7, c7, a71 = 0, unused;
    if (!__get_cpuid_count(7, 0, &a, &b7, &c7, &d)) return;
    if (a >= 1) __get_cpuid_count(7, 1, &a71, &unused, &unused, &unused);
    avx2 = b7 & (1u << 5);
    avx2_vnni = avx2 && (a71 & (1u << 4));
    constexpr uint32_t F = 1u << 16, DQ = 1u << 17, BW = 1u << 30, VL = 1u << 31;
    constexpr uint32_t VBMI = 1u << 1, VNNI = 1u << 11;
    avx512_vnni = avx2 && (low & ZMM) == ZMM && (b7 & (F | DQ | BW | VL)) == (F | DQ | BW | VL) &&
                  (c7 & (VBMI | VNNI)) == (VBMI | VNNI);
  }
};

const Features& features() {
  static const Features found;
  return found;
}

}  // namespace

bool has(Isa isa) {
  switch (isa) {
    case Isa::SCALAR: return true;
    case Isa::AVX2: return features().avx2;
    case Isa::AVX2_VNNI: return features().avx2_vnni;
    case Isa::AVX512_VNNI: return features().avx512_vnni;
  }
  return false;
}

Isa best_isa() {
  for (int level = int(NAMES.size()) - 1; level > 0; --level) {
    if (has(Isa(level))) return Isa(level);
  }
  return Isa::SCALAR;
}

Isa chosen_isa(const std::string& name) {
  if (name == "auto") return best_isa();
  for (size_t level = 0; level < NAMES.size(); ++level) {
    if (name != NAMES[level]) continue;
    if (!has(Isa(level))) refuse("isa is ", name, ", which this processor does not have");
    return Isa(level);
  }
  refuse("isa is '", name, "', expected auto, scalar, avx2, avx2_vnni or avx512_vnni");
}

const char* isa_name(Isa isa) { return NAMES[size_t(isa)]; }

}  // namespace ryzen
