// SPDX-License-Identifier: Apache-2.0
// Vectors of the width a tier computes in, and the arithmetic that must give the same bits in all of them.
//
// The element-wise part of the layer (quantisation, SwiGLU, rounding) is written once, in the compiler's vector
// extension, from +, -, * and / (each rounded once, to nearest even), comparisons and integer operations. The build
// forbids contraction and reassociation, so a tier may change how many lanes work at once and no result.
//
// Everything here is in a namespace of the tier's own: two tiers' versions of one inline function must never be merged
// by the linker. For the same reason no template of the standard library is used.
#pragma once

#include <cstdint>
#include <cstring>

#include "api.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define NVFP4_MEMBER inline __attribute__((always_inline))
#define NVFP4_INLINE static NVFP4_MEMBER

namespace nvfp4 {
namespace NVFP4_TIER {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr int kVectors = 16 / kLanes;  // of a tile's 16 rows, or of a block's 16 columns

typedef float F __attribute__((vector_size(4 * kLanes)));
typedef int32_t I __attribute__((vector_size(4 * kLanes)));
typedef uint32_t U __attribute__((vector_size(4 * kLanes)));
typedef uint16_t H __attribute__((vector_size(2 * kLanes)));
typedef uint8_t B __attribute__((vector_size(kLanes)));

NVFP4_INLINE F splat(float value) { return value - F{}; }
NVFP4_INLINE U splat_bits(uint32_t value) { return value - U{}; }
template <class V>
NVFP4_INLINE V load(const void* from) {
  V v;
  memcpy(&v, from, sizeof v);
  return v;
}
template <class V>
NVFP4_INLINE void store(void* to, V v) {
  memcpy(to, &v, sizeof v);
}
NVFP4_INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}
NVFP4_INLINE float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

// a * b + c where a * b is exact in fp32: one rounding, with or without a fused instruction.
NVFP4_INLINE F exact_product_add(F a, F b, F c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
  return vfmaq_f32(c, a, b);
#else
  return a * b + c;
#endif
}

constexpr uint32_t kMagnitude = 0x7FFFFFFF, kSign = 0x80000000, kInfinity = 0x7F800000, kNaN = 0x7FC00000;

// |v| rounded to a grid of `step` below each power of two p it lies under (p held to [least, infinity)): to nearest,
// ties to even. C = p * 2^23 * step has that grid as its last place, so the adder rounds: (|v| + C) - C.
NVFP4_INLINE F round_magnitude(F magnitude, uint32_t least_power, float steps) {
  U power = (U)magnitude & kInfinity;
  power = power < least_power ? splat_bits(least_power) : power;
  F anchor = (F)power * splat(steps);
  return (magnitude + anchor) - anchor;
}

// 2 * e2m1(v), an integer in -12 .. 12: p >= 1 and steps of p / 2; saturates at 6 (formats/codes.py, encode_e2m1).
NVFP4_INLINE I round_twice_e2m1(F v) {
  U magnitude = (U)v & kMagnitude;
  magnitude = magnitude > 0x40C00000u ? splat_bits(0x40C00000u) : magnitude;
  F rounded = round_magnitude((F)magnitude, 0x3F800000u, 4194304.0f /* 2^22 */);
  I twice = __builtin_convertvector(rounded + rounded, I);
  I negative = (I)v >> 31;
  return (twice ^ negative) - negative;
}

// e4m3(clamp(v, -448, 448)) as fp32: p >= 2^-6 and steps of p / 8; NaN stays NaN (formats/codes.py, encode_e4m3).
NVFP4_INLINE F round_e4m3(F v) {
  U magnitude = (U)v & kMagnitude;
  U held = magnitude > 0x43E00000u ? splat_bits(0x43E00000u) : magnitude;
  F rounded = round_magnitude((F)held, 0x3C800000u, 1048576.0f /* 2^20 */);
  return (F)(magnitude > kInfinity ? splat_bits(kNaN) : (U)rounded | ((U)v & kSign));
}

// The bits of bf16(v) in the low half of each lane: to nearest even, NaN to 0x7FC0 as torch has it.
NVFP4_INLINE U round_bf16(F v) {
  U bits = (U)v;
  U rounded = (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
  return (bits & kMagnitude) > kInfinity ? splat_bits(kNaN >> 16) : rounded;
}

// The bits of fp16(v): overflow to infinity; below 2^-14 the grid of 2^-24 is the last place of 0.5.
NVFP4_INLINE U round_fp16(F v) {
  U magnitude = (U)v & kMagnitude, sign = ((U)v & kSign) >> 16;
  U normal = ((magnitude + 0xFFFu + (magnitude >> 13 & 1u)) >> 13) - (112u << 10);
  U subnormal = (U)((F)magnitude + splat(0.5f)) - 0x3F000000u;
  U rounded = magnitude < 0x38800000u ? subnormal : normal;
  rounded = magnitude >= 0x47800000u ? splat_bits(0x7C00u) : rounded;
  return magnitude > kInfinity ? splat_bits(0x7E00u) : rounded | sign;
}

// fp32 of fp16 bits, exact: the exponent field is 112 short of fp32's; 31 is infinity or NaN.
NVFP4_INLINE F widen_fp16(U half) {
  F value = (F)((half & 0x7FFFu) << 13) * splat(float_of(0x77800000u) /* 2^112 */);
  U bits = (U)value | ((half & 0x7C00u) == 0x7C00u ? splat_bits(kInfinity) : U{});
  return (F)(bits | (half & 0x8000u) << 16);
}

// Consecutive elements of hidden states as fp32, exact.
NVFP4_INLINE F load_elements(const void* x, int32_t element, int64_t index) {
  if (element == kElementFp32) return load<F>(static_cast<const char*>(x) + 4 * index);
  U half = __builtin_convertvector(load<H>(static_cast<const char*>(x) + 2 * index), U);
  return element == kElementBf16 ? (F)(half << 16) : widen_fp16(half);
}

// The inverse, rounded once. NaN has one pattern, so that results can be compared as bytes.
NVFP4_INLINE void store_elements(void* y, int32_t element, int64_t index, F v) {
  if (element == kElementFp32) {
    U bits = ((U)v & kMagnitude) > kInfinity ? splat_bits(kNaN) : (U)v;
    return store(static_cast<char*>(y) + 4 * index, bits);
  }
  U half = element == kElementBf16 ? round_bf16(v) : round_fp16(v);
  store(static_cast<char*>(y) + 2 * index, __builtin_convertvector(half, H));
}

// exp(v) for v held to [-87, 88]; NaN passes. v = n ln 2 + r with |r| <= 0.347, Taylor in r to r^7 / 7! (its
// remainder is 2^-27), times 2^n. ln 2 = 355/512 + the rest; n * 355/512 is exact. At most 2 units in the last place.
NVFP4_INLINE F exponential(F v) {
  v = v > 88.0f ? splat(88.0f) : v;
  v = v < -87.0f ? splat(-87.0f) : v;
  const F magic = splat(12582912.0f);  // 1.5 * 2^23: its last place is 1
  F shifted = v * splat(1.44269504f) + magic;
  F n = shifted - magic;
  F r = (v - n * splat(355.0f / 512.0f)) - n * splat(-2.12194440e-4f);
  F sum = splat(1.0f / 5040.0f);
  sum = sum * r + splat(1.0f / 720.0f);
  sum = sum * r + splat(1.0f / 120.0f);
  sum = sum * r + splat(1.0f / 24.0f);
  sum = sum * r + splat(1.0f / 6.0f);
  sum = sum * r + splat(0.5f);
  sum = sum * r + splat(1.0f);
  sum = sum * r + splat(1.0f);
  return sum * (F)(((U)shifted << 23) + 0x3F800000u);  // the low bits of `shifted` are those of n
}

// silu(min(gate, L)) * clamp(up, -L, L) with silu(g) = g / (1 + exp(-g)); NaN passes. Below gate = -88, where the true
// value is under 1e-36, it is of that size and sign and no more.
NVFP4_INLINE F swiglu(F gate, F up, float limit) {
  gate = gate > limit ? splat(limit) : gate;
  up = up > limit ? splat(limit) : up;
  up = up < -limit ? splat(-limit) : up;
  return gate / (splat(1.0f) + exponential(-gate)) * up;
}

}  // namespace NVFP4_TIER
}  // namespace nvfp4
