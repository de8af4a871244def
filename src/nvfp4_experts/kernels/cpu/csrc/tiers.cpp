// SPDX-License-Identifier: Apache-2.0
// The tiers this library was built with, best first, and whether this machine (and its operating system, which must save
// the wide registers) can run each.
#include "tiers.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace nvfp4 {

#define NVFP4_DECLARE(tier) \
  namespace tier {          \
  extern const Kernels kKernels; \
  }
NVFP4_DECLARE(portable)
#if defined(NVFP4_X86_TIERS)
NVFP4_DECLARE(avx512bf16)
NVFP4_DECLARE(avx512vnni)
NVFP4_DECLARE(avxvnni)
NVFP4_DECLARE(avx2)
#elif defined(NVFP4_ARM_TIERS)
NVFP4_DECLARE(neon)
#endif

#if defined(__x86_64__)
static bool bit(uint32_t leaf, uint32_t subleaf, int reg, int number) {
  uint32_t r[4] = {0, 0, 0, 0};
  return __get_cpuid_count(leaf, subleaf, r, r + 1, r + 2, r + 3) != 0 && (r[reg] >> number & 1) != 0;
}

// The operating system saves all of these parts of the register file (XCR0).
static bool saved(uint32_t mask) {
  if (!bit(1, 0, 2, 27)) return false;  // OSXSAVE
  uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low & mask) == mask;
}

enum { kEax, kEbx, kEcx, kEdx };

static bool has_avx2() {
  return saved(0x6) && bit(7, 0, kEbx, 5) && bit(1, 0, kEcx, 12) && bit(1, 0, kEcx, 29);  // AVX2, FMA, F16C
}
static bool has_avxvnni() { return has_avx2() && bit(7, 1, kEax, 4); }
static bool has_avx512vnni() {
  return has_avx2() && saved(0xE6) && bit(7, 0, kEbx, 16) && bit(7, 0, kEbx, 17) && bit(7, 0, kEbx, 30) &&
         bit(7, 0, kEbx, 31) && bit(7, 0, kEcx, 11);  // F, DQ, BW, VL, VNNI
}
static bool has_avx512bf16() { return has_avx512vnni() && bit(7, 1, kEax, 5); }
#elif defined(__aarch64__) && defined(__linux__)
static bool has_neon() { return (getauxval(AT_HWCAP) & (1u << 20)) != 0; }  // ASIMDDP
#elif defined(__aarch64__)
static bool has_neon() { return true; }  // every Apple processor
#endif
static bool always() { return true; }

static const Tier kTiers[] = {
#if defined(NVFP4_X86_TIERS)
    {"avx512bf16", "AVX-512 F, DQ, BW, VL, VNNI and BF16", &avx512bf16::kKernels, has_avx512bf16},
    {"avx512vnni", "AVX-512 F, DQ, BW, VL and VNNI", &avx512vnni::kKernels, has_avx512vnni},
    {"avxvnni", "AVX2, FMA, F16C and AVX-VNNI", &avxvnni::kKernels, has_avxvnni},
    {"avx2", "AVX2, FMA and F16C", &avx2::kKernels, has_avx2},
#elif defined(NVFP4_ARM_TIERS)
    {"neon", "NEON with dot products (ASIMDDP)", &neon::kKernels, has_neon},
#endif
    {"portable", "nothing", &portable::kKernels, always},
};

int tier_count() { return static_cast<int>(sizeof kTiers / sizeof *kTiers); }
const Tier* tier_at(int index) { return index >= 0 && index < tier_count() ? kTiers + index : nullptr; }

}  // namespace nvfp4
