// SPDX-License-Identifier: Apache-2.0
// NVFP4 x NVFP4 as Blackwell's tensor core sums it; kernels/exact/rule.py states the rule and where it is from.
//
//   term_g = dot_g * sx_g * sw_g                    of four groups of 16 columns, exact
//   P      = max(power(sum), px_g * pw_g)           p = power(s): the power of two at or below |s|
//   sum    = fp32(sum' + term'_0 + ... + term'_3)   ': cut toward zero to multiples of P * 2^-35; so is fp32(): cut
//
// Why double holds it: a group's term is below 16 * 36 * 2 * 2 = 2^11.2 of its power (exactly, 20 bits: dot.h), so what is
// cut to the grid P * 2^-35 has 47 bits and a sum of five 50, of 53.
//
// Columns beyond K and rows beyond N are zero codes under zero scales: terms of zero with no power.
//
// A tile of 16 rows meets one token at a time.
#pragma once

#include "enter.h"

namespace nvfp4 {
namespace NVFP4_TIER {

constexpr int64_t kStepColumns = kStepBlocks * kBlock;
constexpr uint8_t kMagnitudeByte = 0x7F;  // of an e4m3 scale: its sign does not count

NVFP4_INLINE F power(F v) { return (F)((U)v & kInfinity); }

// The four blocks of a step, with powers: tile of 16 rows.
struct ExactTile {
  IntegerBlock block[kStepBlocks];
  F power[kStepBlocks][kVectors];
};

// Bytes (1 0) (3 2) (5 4) (7 6), where 7 is the code of column 7, to (4 0) (5 1) (6 2) (7 3), as layouts/rows.py has them.
NVFP4_INLINE uint32_t columns_to_halves(uint32_t w) {
  w = (w & 0xFF0000FFu) | (w & 0x00FF0000u) >> 8 | (w & 0x0000FF00u) << 8;
  return (w & 0xF00FF00Fu) | (w & 0x0F000F00u) >> 4 | (w & 0x00F000F0u) << 4;
}

NVFP4_INLINE void load_exact_tile(const Exact& product, int64_t first_row, int64_t first_block, ExactTile& tile) {
  const int64_t blocks = product.columns / kBlock;
  const int64_t rows = product.rows - first_row < kRows ? product.rows - first_row : kRows;
  for (int64_t g = 0; g < kStepBlocks; ++g) {
    uint32_t codes[2][kRows] = {};
    uint8_t scales[kRows] = {};
    if (first_block + g < blocks)
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t at = (first_row + r) * blocks + first_block + g;
        for (int j = 0; j < 2; ++j) {
          memcpy(&codes[j][r], product.b_codes + 8 * at + 4 * j, 4);
          codes[j][r] = columns_to_halves(codes[j][r]);
        }
        scales[r] = product.b_scales[at] & kMagnitudeByte;
      }
    tile.block[g].load(reinterpret_cast<const uint8_t*>(codes), scales);
    for (int v = 0; v < kVectors; ++v) tile.power[g][v] = power(tile.block[g].scale[v]);
  }
}

// Blocks in the order they are read: step, token, block of the step.
NVFP4_INLINE ExactBlock* entered_step(const Exact& product, int64_t step, int64_t token) {
  return product.entered + (step * product.tokens + token) * kStepBlocks;
}

static void exact_enter(const Exact& product, int64_t token) {
  const int64_t blocks = product.columns / kBlock;
  for (int64_t b = 0; b < (blocks + kStepBlocks - 1) / kStepBlocks * kStepBlocks; ++b) {
    ExactBlock& block = entered_step(product, b / kStepBlocks, token)[b % kStepBlocks];
    block = {};
    if (b >= blocks) continue;
    const int64_t at = token * blocks + b;
    for (int k = 0; k < kBlock; ++k)
      block.twice[k] = static_cast<int8_t>(twice_e2m1(product.a_codes[8 * at + k / 2] >> k % 2 * 4 & 15));
    block.start = start_of_block(reinterpret_cast<const uint8_t*>(block.twice));
    const uint8_t scales[kRows] = {static_cast<uint8_t>(product.a_scales[at] & kMagnitudeByte)};
    const F scale = load_scales(scales, 0);
    // The factors of 2 of both codes, and the unit of the other operand's scale, are taken back here.
    block.scale = (scale * splat(0.25f / kScaleUnit / kScaleUnit))[0];
    block.power = (power(scale) * splat(1 / kScaleUnit / kScaleUnit))[0];
  }
}

// Half a vector of fp32, and as doubles a whole one.
constexpr int kHalf = kLanes / 2;
typedef float Narrow __attribute__((vector_size(4 * kHalf)));
typedef uint32_t NarrowBits __attribute__((vector_size(4 * kHalf)));
typedef double Wide __attribute__((vector_size(8 * kHalf)));
typedef uint64_t WideBits __attribute__((vector_size(8 * kHalf)));

NVFP4_INLINE Narrow half_of(F v, int half) { return load<Narrow>(reinterpret_cast<const char*>(&v) + half * sizeof(Narrow)); }

NVFP4_INLINE Wide cut(Narrow narrow, Wide anchor, Wide grid) {
  const Wide value = __builtin_convertvector(narrow, Wide);
  const WideBits sign = (WideBits)value & (uint64_t{1} << 63);
  const Wide magnitude = (Wide)((WideBits)value ^ sign);
  const Wide nearest = (magnitude + anchor) - anchor;  // the anchor's last place is the grid
  const Wide below = nearest > magnitude ? nearest - grid : nearest;
  return (Wide)((WideBits)below | sign);
}

NVFP4_INLINE Narrow cut_to_fp32(Wide value) {
  return __builtin_convertvector((Wide)((WideBits)value & ~uint64_t{0x1FFFFFFF}), Narrow);  // 52 - 23 bits
}

// One step of kHalf sums of one token.
NVFP4_INLINE Narrow exact_step(const Narrow (&term)[kStepBlocks], const Narrow (&power)[kStepBlocks], Narrow sum) {
  Narrow largest = (Narrow)((NarrowBits)sum & kInfinity);
  for (int g = 0; g < kStepBlocks; ++g) largest = power[g] > largest ? power[g] : largest;
  const Wide anchor = __builtin_convertvector(largest, Wide) * 131072.0;  // 2^(52 - 35)
  const Wide grid = anchor * (1.0 / (1ll << 52));
  Wide total{};  // from +0, so that no result is -0
  total += cut(sum, anchor, grid);
  for (int g = 0; g < kStepBlocks; ++g) total += cut(term[g], anchor, grid);
  return cut_to_fp32(total);
}

static void exact_multiply(const Exact& product, int64_t first_token, int64_t tile_number) {
  const int64_t first_row = tile_number * kRows;
  const int64_t tokens = product.tokens - first_token < kTokenBlock ? product.tokens - first_token : kTokenBlock;
  alignas(64) float sums[kTokenBlock][kRows] = {};
  for (int64_t column = 0; column < product.columns; column += kStepColumns) {
    ExactTile tile;
    load_exact_tile(product, first_row, column / kBlock, tile);
    for (int64_t t = 0; t < tokens; ++t) {
      const ExactBlock* x = entered_step(product, column / kStepColumns, first_token + t);
      for (int v = 0; v < kVectors; ++v) {
        F term[kStepBlocks], power[kStepBlocks];
        for (int g = 0; g < kStepBlocks; ++g) {
          I sum = dot(tile.block[g].codes, v, reinterpret_cast<const uint8_t*>(x[g].twice), x[g].start);
          term[g] = __builtin_convertvector(sum, F) * tile.block[g].scale_with(x[g].scale, v);
          power[g] = tile.power[g][v] * splat(x[g].power);
        }
        for (int half = 0; half < 2; ++half) {
          Narrow terms[kStepBlocks], powers[kStepBlocks];
          for (int g = 0; g < kStepBlocks; ++g) {
            terms[g] = half_of(term[g], half);
            powers[g] = half_of(power[g], half);
          }
          float* sum = sums[t] + v * kLanes + half * kHalf;
          store(sum, exact_step(terms, powers, load<Narrow>(sum)));
        }
      }
    }
  }
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t r = 0; r < kRows && first_row + r < product.rows; ++r) {
      const float sum = sums[t][r] == sums[t][r] ? sums[t][r] : float_of(kMagnitude);  // NaN is 0x7FFFFFFF
      product.out[(first_token + t) * product.rows + first_row + r] = sum;
    }
}

}  // namespace NVFP4_TIER
}  // namespace nvfp4
