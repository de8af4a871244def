// SPDX-License-Identifier: Apache-2.0
// Hidden states into the form a GEMM reads: formats/activations.py, bit for bit, and the order of the values in memory.
//
//   nvfp4   block of 16: 2 * e2m1 as int8, the fp32 block scale over 4 (the two factors of 2 taken back), and for
//           instructions that take unsigned weights w + 12 what that adds to a dot product: -12 * sum of the block
//   others  bf16 values, or e4m3 values with a scale per token; in fp32, or as pairs of bf16 where a tier multiplies such
//
// The tokens of a group (the last one may be smaller, n tokens) are interleaved, so that a kernel reads one stream:
//
//   nvfp4   block b: n x 16 bytes of codes, n x int32, n x fp32         at b * 24 n
//   fp32    column k: n values                                         at k * 4 n
//   bf16    pair p: n pairs, columns pair_column(p) and that + 2       at p * 4 n
#pragma once

#include "multiply.h"

namespace nvfp4 {
namespace NVFP4_TIER {

// Columns that share a 32-bit lane of bf16 weights: those whose codes are 16 bits apart in the packed form.
NVFP4_INLINE int64_t pair_column(int64_t pair) { return pair / 4 * 8 + pair % 2 * 4 + pair % 4 / 2; }

NVFP4_INLINE uint32_t largest_lane(U v) {
  uint32_t largest = 0;
  for (int lane = 0; lane < kLanes; ++lane) largest = v[lane] > largest ? v[lane] : largest;
  return largest;
}

// As integers magnitudes sort like the numbers, and NaN above infinity: a NaN is never lost.
NVFP4_INLINE U larger(U a, U b) { return a > b ? a : b; }

static uint32_t row_amax(const void* x, int32_t element, int64_t row, int64_t columns) {
  U largest{};
  for (int64_t k = 0; k < columns; k += kLanes)
    largest = larger(largest, (U)load_elements(x, element, row * columns + k) & kMagnitude);
  return largest_lane(largest);
}

constexpr float kAmaxFloor = 1.0f / (1 << 30) / (1 << 30) / (1 << 30) / (1 << 10);  // 2^-100
constexpr float kNvfp4Max = 6.0f * 448.0f;

struct GlobalScales {
  float encode, decode;
};

static GlobalScales global_scales(const Entry& entry, uint32_t amax_bits) {
  const float nan = float_of(kNaN);
  if (entry.scale_mode == kStatic) {
    float s = *entry.static_scale;
    bool usable = s >= kAmaxFloor / kNvfp4Max && s <= float_of(0x7F7FFFFF) / kNvfp4Max;
    s = usable ? s : nan;
    return {1.0f / s, s};
  }
  if (amax_bits >= kInfinity) return {nan, nan};
  float amax = float_of(amax_bits);
  if (amax < kAmaxFloor) return {1.0f, 1.0f};
  float g = kNvfp4Max / amax;
  return {g, 1.0f / g};
}

// The largest of a block's 16 magnitudes.
NVFP4_INLINE uint32_t largest_of_block(const U (&v)[kVectors]) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_epu32((__m512i)v[0]);
#else
  U largest = v[0];
  for (int i = 1; i < kVectors; ++i) largest = larger(largest, v[i]);
  return largest_lane(largest);
#endif
}

// What a block's dot products start from; see dot.h.
NVFP4_INLINE int32_t start_of_block(const uint8_t* codes) {
#if defined(__AVX2__)
  __m128i unsigned_codes = _mm_add_epi8(load<__m128i>(codes), _mm_set1_epi8(12));
  __m128i halves = _mm_sad_epu8(unsigned_codes, _mm_setzero_si128());
  return -kWeightBias * (_mm_cvtsi128_si32(halves) + _mm_extract_epi16(halves, 4) - 16 * 12);
#else
  static_assert(kWeightBias == 0, "the sum of the block would be needed");
  return codes ? 0 : 0;
#endif
}

// One row to NVFP4; returns whether some block is NaN. Scales are computed for kLanes blocks at a time. What is stored
// as the scale of a block is always finite and positive: under a zero scale all codes are zero, so any scale will do,
// and a NaN block makes the whole row of results NaN, for which the caller has the row's scale.
template <int32_t kElement>
static bool enter_nvfp4_row(const Entry& entry, int64_t source, GlobalScales scale, uint8_t* values, int64_t n, int64_t i) {
  const int64_t blocks = entry.columns / kBlock, row = source * entry.columns;
  U any_nan{};
  for (int64_t first = 0; first < blocks; first += kLanes) {
    const int count = static_cast<int>(blocks - first < kLanes ? blocks - first : kLanes);
    uint32_t amax[kLanes] = {};
    for (int b = 0; b < count; ++b) {
      U magnitude[kVectors];
      for (int v = 0; v < kVectors; ++v)
        magnitude[v] = (U)load_elements(entry.x, kElement, row + (first + b) * kBlock + v * kLanes) & kMagnitude;
      amax[b] = largest_of_block(magnitude);
    }
    F stored = round_e4m3(splat(scale.encode) * (load<F>(amax) * splat(1.0f / 6.0f)));
    any_nan |= (U)(stored != stored);
    float inverse[kLanes], held[kLanes];
    store(inverse, stored == 0.0f ? F{} : splat(1.0f) / (stored * splat(scale.decode)));
    store(held, (stored > kLeastScale ? stored : splat(kLeastScale)) * splat(0.25f / kScaleUnit));
    for (int b = 0; b < count; ++b) {
      uint8_t* block = values + (first + b) * 24 * n;
      for (int v = 0; v < kVectors; ++v) {
        F x = load_elements(entry.x, kElement, row + (first + b) * kBlock + v * kLanes);
        I twice = round_twice_e2m1(x * splat(inverse[b]));
        store(block + 16 * i + v * kLanes, __builtin_convertvector((U)twice, B));
      }
      int32_t start = start_of_block(block + 16 * i);
      memcpy(block + 16 * n + 4 * i, &start, 4);
      memcpy(block + 20 * n + 4 * i, held + b, 4);
    }
  }
  return largest_lane(any_nan) != 0;
}

static void enter_float_row(const Entry& entry, int64_t source, float factor, uint8_t* values, int64_t n, int64_t i) {
  for (int64_t k = 0; k < entry.columns; k += kBlock) {
    float row[kBlock];
    for (int v = 0; v < kVectors; ++v) {
      F x = load_elements(entry.x, entry.element, source * entry.columns + k + v * kLanes);
      x = entry.activations == kFp8 ? round_e4m3(x * splat(factor)) : (F)(round_bf16(x) << 16);
      store(row + v * kLanes, x);
    }
#if defined(__AVX512BF16__)
    for (int64_t pair = 0; pair < kBlock / 2; ++pair) {
      int64_t column = pair_column(pair);
      uint32_t both = bits_of(row[column]) >> 16 | (bits_of(row[column + 2]) & 0xFFFF0000u);
      memcpy(values + 4 * ((k / 2 + pair) * n + i), &both, 4);
    }
#else
    for (int64_t j = 0; j < kBlock; ++j) memcpy(values + 4 * ((k + j) * n + i), row + j, 4);
#endif
  }
}

static int64_t value_bytes(int32_t activations, int64_t columns) {
  if (activations == kNvfp4) return columns / kBlock * 24;
#if defined(__AVX512BF16__)
  return columns * 2;
#else
  return columns * 4;
#endif
}

static void enter(const Entry& entry, int64_t group) {
  const int64_t first = group * kGroup;
  const int64_t n = entry.tokens - first < kGroup ? entry.tokens - first : kGroup;
  uint8_t* values = entry.values + first * value_bytes(entry.activations, entry.columns);
  for (int64_t i = 0; i < n; ++i) {
    const int64_t token = first + i, source = entry.rows ? entry.rows[token] : token;
    float scale = 1.0f, factor = 1.0f;
    if (entry.activations == kNvfp4) {
      uint32_t amax = entry.scale_mode == kDynamic ? *entry.amax_bits : 0;
      if (entry.scale_mode == kPerToken) amax = row_amax(entry.x, entry.element, source, entry.columns);
      GlobalScales both = global_scales(entry, amax);
      auto row = entry.element == kElementBf16   ? enter_nvfp4_row<kElementBf16>
                 : entry.element == kElementFp16 ? enter_nvfp4_row<kElementFp16>
                                                 : enter_nvfp4_row<kElementFp32>;
      scale = row(entry, source, both, values, n, i) ? float_of(kNaN) : both.decode;
    } else {
      if (entry.activations == kFp8) {
        float amax = float_of(row_amax(entry.x, entry.element, source, entry.columns));
        amax = amax < kAmaxFloor ? kAmaxFloor : amax;
        factor = 448.0f / amax;
        scale = amax / 448.0f;
      }
      enter_float_row(entry, source, factor, values, n, i);
    }
    entry.scales[token] = scale;
  }
}

}  // namespace NVFP4_TIER
}  // namespace nvfp4
