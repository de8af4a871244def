// SPDX-License-Identifier: Apache-2.0
// NVFP4 x NVFP4, exactly: the dot product of a block of 16 in integers, one multiplication by the two scales, one sum.
//
//   sum[t, n] = ((0 + term_0) + term_1) + ...      fp32, in the order of K, one rounding a block
//   term_b    = dot_b * (sw_b * sx_b) / 4          dot_b = sum over 16 of (2 w) (2 x)
//
// Why every tier gives the same bits: 2 * e2m1 is an integer of magnitude 12 at most, so |dot_b| <= 16 * 12 * 12 = 2304
// in 12 bits, exact however it is summed; e4m3 has 4 significant bits, so sw * sx has 8 and the term 20: exact in fp32
// (24 bits; its magnitude is 2^-20 to 2^29), fused or not. What is left is a chain of additions, each rounded once,
// whose order is that of K, whatever the tier, the number of threads and the other tokens are.
//
// Where the instruction multiplies unsigned by signed bytes, weights are stored as w + 12 (kWeightBias) and the sum
// starts at -12 * sum(x): still exact, |12 * 16 * 12| + 24 * 12 * 16 is far inside int32 (and int16).
#pragma once

#include "vector.h"

namespace nvfp4 {
namespace NVFP4_TIER {

// 2 * e2m1(code): codes 0 1 are subnormal (m), the others (2 + m) << (e - 1).
constexpr int twice_e2m1(int code) {
  return (code & 8 ? -1 : 1) * ((code & 7) < 2 ? code & 7 : (2 + (code & 1)) << ((code >> 1 & 3) - 1));
}

struct alignas(16) CodeTable {
  int8_t of[16];
  constexpr explicit CodeTable(int bias) : of{} {
    for (int code = 0; code < 16; ++code) of[code] = static_cast<int8_t>(twice_e2m1(code) + bias);
  }
};

constexpr int64_t kCodeBytes = kRows * kBlock / 2;  // of a block of a tile
constexpr float kLeastScale = 1.0f / 512;            // the smallest e4m3 above zero

#if defined(__AVX512F__)
// ---- AVX-512 VNNI: one register is 16 rows x 4 columns ----------------------------------------------------------------
constexpr int kWeightBias = 12;
constexpr float kScaleUnit = 1.0f / 256;  // scales are read as fp16 bits, whose exponent is 8 more than e4m3's
constexpr CodeTable kTable(kWeightBias);
typedef __m512i Codes;

// e4m3 bytes to fp32 * kScaleUnit: the byte is fp16 with one exponent bit less. 0x7F is no NaN there, so it is put in.
NVFP4_INLINE F load_scales(const uint8_t* scales, int) {
  __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(scales));
  __mmask16 nan = _mm_cmpeq_epi8_mask(_mm_or_si128(bytes, _mm_set1_epi8(-128)), _mm_set1_epi8(-1));
  __m256i half = _mm256_slli_epi16(_mm256_cvtepi8_epi16(bytes), 7);
  F scale = _mm512_cvtph_ps(_mm256_and_si256(half, _mm256_set1_epi16(static_cast<int16_t>(0xBFFF))));
  return _mm512_mask_blend_ps(nan, scale, splat(float_of(kNaN)));
}

NVFP4_INLINE void load_codes(const uint8_t* codes, Codes (*w)[kVectors]) {
  const __m512i low = _mm512_set1_epi8(15);
  const __m512i table = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(kTable.of)));
  for (int j = 0; j < 2; ++j) {
    __m512i both = _mm512_loadu_si512(codes + 64 * j);
    w[2 * j][0] = _mm512_shuffle_epi8(table, _mm512_and_si512(both, low));
    w[2 * j + 1][0] = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(both, 4), low));
  }
}

NVFP4_INLINE I dot(const Codes (*w)[kVectors], int v, const uint8_t* x, int32_t start) {
  __m512i sum = _mm512_set1_epi32(start);
  for (int j = 0; j < 4; ++j) {
    int32_t four;
    memcpy(&four, x + 4 * j, 4);
    sum = _mm512_dpbusd_epi32(sum, w[j][v], _mm512_set1_epi32(four));
  }
  return (I)sum;
}

#elif defined(__AVX2__)
// ---- AVX2, with or without VNNI: one register is 8 rows x 4 columns ----------------------------------------------------
constexpr int kWeightBias = 12;
constexpr float kScaleUnit = 1.0f / 256;  // as above
constexpr CodeTable kTable(kWeightBias);
typedef __m256i Codes;

NVFP4_INLINE F load_scales(const uint8_t* scales, int v) {
  __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(scales + 8 * v));
  __m128i half = _mm_slli_epi16(_mm_cvtepi8_epi16(bytes), 7);
  F scale = _mm256_cvtph_ps(_mm_and_si128(half, _mm_set1_epi16(static_cast<int16_t>(0xBFFF))));
  __m128i nan = _mm_cmpeq_epi8(_mm_or_si128(bytes, _mm_set1_epi8(-128)), _mm_set1_epi8(-1));
  return _mm256_blendv_ps(scale, splat(float_of(kNaN)), _mm256_castsi256_ps(_mm256_cvtepi8_epi32(nan)));
}

NVFP4_INLINE void load_codes(const uint8_t* codes, Codes (*w)[kVectors]) {
  const __m256i low = _mm256_set1_epi8(15);
  const __m256i table = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(kTable.of)));
  for (int j = 0; j < 2; ++j)
    for (int v = 0; v < kVectors; ++v) {
      __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + 64 * j + 32 * v));
      w[2 * j][v] = _mm256_shuffle_epi8(table, _mm256_and_si256(both, low));
      w[2 * j + 1][v] = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(both, 4), low));
    }
}

NVFP4_INLINE I dot(const Codes (*w)[kVectors], int v, const uint8_t* x, int32_t start) {
#if defined(__AVXVNNI__)
  __m256i sum = _mm256_set1_epi32(start);
#else
  __m256i pairs = _mm256_setzero_si256();
#endif
  for (int j = 0; j < 4; ++j) {
    int32_t four;
    memcpy(&four, x + 4 * j, 4);
#if defined(__AVXVNNI__)
    sum = _mm256_dpbusd_avx_epi32(sum, w[j][v], _mm256_set1_epi32(four));
#else
    pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(w[j][v], _mm256_set1_epi32(four)));
#endif
  }
#if defined(__AVXVNNI__)
  return (I)sum;
#else
  return (I)_mm256_add_epi32(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)), _mm256_set1_epi32(start));
#endif
}

#else
// ---- scales for everybody else: integers to the exponent field, subnormals apart ---------------------------------------
constexpr float kScaleUnit = 1.0f;

NVFP4_INLINE F load_scales(const uint8_t* scales, int v) {
  U byte = __builtin_convertvector(load<B>(scales + kLanes * v), U);
  F subnormal = __builtin_convertvector((I)(byte & 7u), F) * splat(1.0f / 512);
  U normal = ((byte & 0x7Fu) << 20) + (120u << 23);
  U bits = (byte & 0x78u) == 0u ? (U)subnormal : normal;
  bits = (byte & 0x7Fu) == 0x7Fu ? splat_bits(kNaN) : bits;
  return (F)(bits | (byte & 0x80u) << 24);
}

constexpr int kWeightBias = 0;
constexpr CodeTable kTable(kWeightBias);

#if defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD)
// ---- NEON dot product: one register is 4 rows x 4 columns --------------------------------------------------------------
typedef int8x16_t Codes;

NVFP4_INLINE void load_codes(const uint8_t* codes, Codes (*w)[kVectors]) {
  const int8x16_t table = vld1q_s8(kTable.of);
  for (int j = 0; j < 2; ++j)
    for (int v = 0; v < kVectors; ++v) {
      uint8x16_t both = vld1q_u8(codes + 64 * j + 16 * v);
      w[2 * j][v] = vqtbl1q_s8(table, vandq_u8(both, vdupq_n_u8(15)));
      w[2 * j + 1][v] = vqtbl1q_s8(table, vshrq_n_u8(both, 4));
    }
}

NVFP4_INLINE I dot(const Codes (*w)[kVectors], int v, const uint8_t* x, int32_t) {
  int8x16_t columns = vld1q_s8(reinterpret_cast<const int8_t*>(x));
  int32x4_t sum = vdupq_n_s32(0);
  sum = vdotq_laneq_s32(sum, w[0][v], columns, 0);
  sum = vdotq_laneq_s32(sum, w[1][v], columns, 1);
  sum = vdotq_laneq_s32(sum, w[2][v], columns, 2);
  sum = vdotq_laneq_s32(sum, w[3][v], columns, 3);
  return (I)sum;
}

#else
// ---- portable C++: 4 rows x 4 columns of bytes --------------------------------------------------------------------------
struct Codes {
  int8_t of[4 * kLanes];
};

NVFP4_INLINE void load_codes(const uint8_t* codes, Codes (*w)[kVectors]) {
  for (int j = 0; j < 2; ++j)
    for (int v = 0; v < kVectors; ++v)
      for (int i = 0; i < 4 * kLanes; ++i) {
        uint8_t both = codes[64 * j + 4 * kLanes * v + i];
        w[2 * j][v].of[i] = kTable.of[both & 15];
        w[2 * j + 1][v].of[i] = kTable.of[both >> 4];
      }
}

NVFP4_INLINE I dot(const Codes (*w)[kVectors], int v, const uint8_t* x, int32_t) {
  const int8_t* columns = reinterpret_cast<const int8_t*>(x);
  I sum{};
  for (int lane = 0; lane < kLanes; ++lane)
    for (int k = 0; k < kBlock; ++k) sum[lane] += w[k / 4][v].of[4 * lane + k % 4] * columns[k];
  return sum;
}
#endif
#endif

// What one block of a tile multiplies by, and its scale times that of a block of x.
struct IntegerBlock {
  Codes codes[4][kVectors];
  F scale[kVectors];

  NVFP4_MEMBER void load(const uint8_t* code_bytes, const uint8_t* scale_bytes) {
    load_codes(code_bytes, codes);
    for (int v = 0; v < kVectors; ++v) scale[v] = load_scales(scale_bytes, v);
  }
  NVFP4_MEMBER F scale_with(float x_scale, int v) const { return scale[v] * splat(x_scale); }
};

#if defined(__AVX512F__)
// Multiplying the scales takes a sixth of the multiplier's time, and the multiplier is the limit. There are few scales:
// a row of the table holds one scale of x times 1, 1.125, ... 1.875, and twice that. A permutation, which runs on another
// port, picks the product by the lowest four bits of the weight's e4m3 byte (the significand and the last bit of the
// exponent); an integer addition puts in the rest of the exponent and the sign.
constexpr int kFirstRow = (127 - 9 - 2 + 8) << 3;  // bits >> 20 of kLeastScale * 0.25 / kScaleUnit
constexpr int kScaleRows = 18 << 3;                // e4m3 has 18 powers of two, subnormals counted

struct alignas(64) ScaleTable {
  float of[kScaleRows][16];
  constexpr ScaleTable() : of{} {
    float power = kLeastScale * 0.25f / kScaleUnit;
    for (int row = 0; row < kScaleRows; ++row) {
      for (int i = 0; i < 16; ++i) of[row][i] = power * (1 + row % 8 / 8.0f) * (1 + i % 8 / 8.0f) * (i < 8 ? 1 : 2);
      if (row % 8 == 7) power *= 2;
    }
  }
};
constexpr ScaleTable kScales;

// IntegerBlock for a panel, its scales taken apart. There is no exponent for zero: codes under it become zero instead.
// Nor for NaN: load returns the rows that have such a scale.
struct PanelBlock {
  Codes codes[4][1];
  __m512i significand, exponent;

  NVFP4_MEMBER __mmask16 load(const uint8_t* code_bytes, const uint8_t* scale_bytes) {
    const __m512i bias = _mm512_set1_epi32((7 + 8) << 23);  // of e4m3, and of kScaleUnit
    load_codes(code_bytes, codes);
    __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(scale_bytes));
    __mmask16 nan = _mm_cmpeq_epi8_mask(_mm_or_si128(bytes, _mm_set1_epi8(-128)), _mm_set1_epi8(-1));
    __mmask16 small = _mm_testn_epi8_mask(bytes, _mm_set1_epi8(0x78));  // zero or subnormal
    significand = _mm512_cvtepu8_epi32(bytes);
    __m512i sign = _mm512_slli_epi32(_mm512_srli_epi32(significand, 7), 31);
    exponent = _mm512_slli_epi32(_mm512_and_si512(significand, _mm512_set1_epi32(0x70)), 20);
    exponent = _mm512_sub_epi32(_mm512_add_epi32(exponent, sign), bias);
    if (__builtin_expect(small != 0, 0)) {
      __m512i scale = (__m512i)load_scales(scale_bytes, 0);  // normalised
      __mmask16 zero = _mm512_testn_epi32_mask(scale, _mm512_set1_epi32(0x7FFFFFFF));
      for (int j = 0; j < 4; ++j)
        codes[j][0] = _mm512_mask_mov_epi32(codes[j][0], zero, _mm512_set1_epi8(kWeightBias));
      significand = _mm512_mask_srli_epi32(significand, small, _mm512_slli_epi32(scale, 9), 29);
      // Zero keeps exponent 0: with its own the product could be infinite, and infinity times the zero dot product NaN.
      __m512i power = _mm512_andnot_si512(_mm512_set1_epi32(0x007FFFFF), scale);
      power = _mm512_mask_sub_epi32(_mm512_setzero_si512(), _knot_mask16(zero), power, _mm512_set1_epi32(127 << 23));
      exponent = _mm512_mask_mov_epi32(exponent, small, power);
    }
    return nan;
  }
  NVFP4_MEMBER F scale_with(float x_scale, int) const {
    // x_scale is 2^e * m / 8: its upper 12 bits number the row, whose 64 bytes are 6 bits more.
    const char* row = reinterpret_cast<const char*>(kScales.of) + ((bits_of(x_scale) >> 14) - (kFirstRow << 6));
    __m512i product = _mm512_permutexvar_epi32(significand, _mm512_load_si512(row));
    return (F)_mm512_add_epi32(product, exponent);
  }
};
#endif

}  // namespace NVFP4_TIER
}  // namespace nvfp4
