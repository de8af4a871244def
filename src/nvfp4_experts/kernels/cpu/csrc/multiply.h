// SPDX-License-Identifier: Apache-2.0
// The inner loops: a pair of tiles times a group of tokens, over a run of K.
//
//   sums[t][r][lane] += values of token t . row `lane` of tile r        r = 0, 1: gate and up, or two tiles of down
//
// R tiles and N tokens are held in registers at a time. Weights come decoded as they are read (few tokens), or from a
// panel, a run of K decoded once for all tokens of the block, which stays in the first-level cache.
#pragma once

#include "dot.h"

namespace nvfp4 {
namespace NVFP4_TIER {

#if defined(__AVX512F__)
constexpr int kGroup = 8;       // tokens at a time
constexpr int kTilesAtOnce = 2;  // 2 x 8 sums and 2 x 5 operands in 32 registers
#else
constexpr int kGroup = 4;
constexpr int kTilesAtOnce = 1;
#endif

// Where a tile lies: codes and scales of its first block.
struct Tile {
  const uint8_t* codes;
  const uint8_t* scales;
};

NVFP4_INLINE Tile tile_at(const uint8_t* weights, int64_t columns, int64_t tile) {
  const uint8_t* codes = weights + tile * columns * 9;
  return {codes, codes + columns * 8};
}

// Asks for a block that will be decoded later: decoding comes in bursts, which the processor does not foresee. It comes as
// far as the second-level cache, which can wait for more lines at a time than the first.
NVFP4_INLINE void prefetch_block(const Tile& tile, int64_t b) {
  __builtin_prefetch(tile.codes + b * kCodeBytes, 0, 2);
  __builtin_prefetch(tile.codes + b * kCodeBytes + 64, 0, 2);
  __builtin_prefetch(tile.scales + b * kRows, 0, 2);
}

constexpr int64_t kAhead = 48;  // blocks, of all tiles that are decoded side by side as they are read: 7 KB

// Asks for what of this tile is read kAhead blocks later; behind its end, of the tile that follows those read side by side.
template <int kTiles>
NVFP4_INLINE void prefetch_ahead(const Tile& tile, int64_t b, int64_t blocks) {
  const int64_t ahead = b + kAhead / kTiles, next = kTiles * blocks * (kCodeBytes + kRows);
  if (ahead < blocks) return prefetch_block(tile, ahead);
  prefetch_block({tile.codes + next, tile.scales + next}, ahead - blocks);
}

typedef float Sums[2][kRows];  // of one token

template <int R, int N>
NVFP4_INLINE void load_sums(const Sums* sums, int first_tile, F (&sum)[N][R][kVectors]) {
  for (int t = 0; t < N; ++t)
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < kVectors; ++v) sum[t][r][v] = load<F>(sums[t][first_tile + r] + v * kLanes);
}

template <int R, int N>
NVFP4_INLINE void store_sums(Sums* sums, int first_tile, const F (&sum)[N][R][kVectors]) {
  for (int t = 0; t < N; ++t)
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < kVectors; ++v) store(sums[t][first_tile + r] + v * kLanes, sum[t][r][v]);
}

// ---- NVFP4 activations -------------------------------------------------------------------------------------------------

struct FromTiles {
  using Block = IntegerBlock;
  Tile tiles[2];
  int64_t blocks;
  NVFP4_MEMBER void load(int tile, int64_t b, Block& block) const {
    prefetch_ahead<kTilesAtOnce>(tiles[tile], b, blocks);
    block.load(tiles[tile].codes + b * kCodeBytes, tiles[tile].scales + b * kRows);
  }
};

struct FromPanel {
#if defined(__AVX512F__)
  using Block = PanelBlock;
#else
  using Block = IntegerBlock;
#endif
  const Block (*blocks)[2];  // (run, tile)
  NVFP4_MEMBER void load(int tile, int64_t b, Block& block) const { block = blocks[b][tile]; }
};

template <int R, int N, class From>
static void multiply_integer(const From& from, int tile, const uint8_t* x, int64_t blocks, Sums* sums) {
  F sum[N][R][kVectors];
  load_sums<R, N>(sums, tile, sum);
  for (int64_t b = 0; b < blocks; ++b, x += 24 * N) {
    typename From::Block block[R];
    for (int r = 0; r < R; ++r) from.load(tile + r, b, block[r]);
    for (int t = 0; t < N; ++t) {
      int32_t start;
      float scale;
      memcpy(&start, x + 16 * N + 4 * t, 4);
      memcpy(&scale, x + 20 * N + 4 * t, 4);
      for (int r = 0; r < R; ++r)
        for (int v = 0; v < kVectors; ++v) {
          F product = __builtin_convertvector(dot(block[r].codes, v, x + 16 * t, start), F);
          sum[t][r][v] = exact_product_add(product, block[r].scale_with(scale, v), sum[t][r][v]);
        }
    }
  }
  store_sums<R, N>(sums, tile, sum);
}

// ---- bf16 and fp8 activations ------------------------------------------------------------------------------------------

// Weights of a run of K as the multiplication takes them: fp32 (column, tile, row), or bf16 pairs (pair, tile, row).
constexpr int64_t kRunColumns = 256;
struct alignas(64) FloatPanel {
#if defined(__AVX512BF16__)
  uint32_t at[kRunColumns / 2][2][kRows];
#else
  float at[kRunColumns][2][kRows];
#endif
};

template <int R, int N>
static void multiply_float(const FloatPanel& panel, int tile, const uint8_t* x, int64_t columns, Sums* sums) {
  F sum[N][R][kVectors];
  load_sums<R, N>(sums, tile, sum);
#if defined(__AVX512BF16__)
  for (int64_t pair = 0; pair < columns / 2; ++pair, x += 4 * N) {
    __m512bh w[R];
    for (int r = 0; r < R; ++r) w[r] = (__m512bh)_mm512_load_si512(panel.at[pair][tile + r]);
    for (int t = 0; t < N; ++t) {
      int32_t both;
      memcpy(&both, x + 4 * t, 4);
      for (int r = 0; r < R; ++r)
        sum[t][r][0] = _mm512_dpbf16_ps(sum[t][r][0], w[r], (__m512bh)_mm512_set1_epi32(both));
    }
  }
#else
  for (int64_t k = 0; k < columns; ++k, x += 4 * N)
    for (int t = 0; t < N; ++t) {
      float value;
      memcpy(&value, x + 4 * t, 4);
      for (int r = 0; r < R; ++r)
        for (int v = 0; v < kVectors; ++v) {
          F w = load<F>(panel.at[k][tile + r] + v * kLanes);
          // bf16 x (e2m1 * e4m3), or e4m3 x e4m3: 14 bits, exact.
          sum[t][r][v] = exact_product_add(w, splat(value), sum[t][r][v]);
        }
    }
#endif
  store_sums<R, N>(sums, tile, sum);
}

#if !defined(__AVX512BF16__)
#if defined(__AVX2__)
struct alignas(64) FloatTable {
  float of[16];
  constexpr FloatTable() : of{} {
    for (int code = 0; code < 16; ++code) of[code] = static_cast<float>(twice_e2m1(code)) / 2;
    of[8] = -0.0f;
  }
};
constexpr FloatTable kFloats;
#endif

// e2m1 as fp32 of the lowest four bits of each lane.
NVFP4_INLINE F decode_code(U code) {
#if defined(__AVX512F__)
  return _mm512_permutexvar_ps((__m512i)code, _mm512_load_ps(kFloats.of));
#elif defined(__AVX2__)
  return (F)((U)_mm256_permutevar8x32_ps(_mm256_load_ps(kFloats.of), (__m256i)code) | (code & 8u) << 28);
#else
  // Its fields moved, 0 and 0.5 apart.
  U magnitude = code & 7u;
  U small = (0u - magnitude) & 0x3F000000u;
  return (F)((magnitude < 2u ? small : (magnitude << 22) + 0x3F000000u) | (code & 8u) << 28);
#endif
}

#if defined(__AVX2__)
constexpr int kCodeTokens = kTilesAtOnce == 2 ? kGroup : kGroup / 2;  // whose sums and operands the registers hold

// bf16 activations of few tokens: weights decoded as they are read; what a panel would give, in the same order.
template <int R, int N>
static void multiply_codes(const Tile* tiles, int which, const uint8_t* x, int64_t blocks, Sums* sums) {
  F sum[N][R][kVectors];
  load_sums<R, N>(sums, which, sum);
  for (int64_t b = 0; b < blocks; ++b) {
    F scale[R][kVectors];
    for (int r = 0; r < R; ++r) {
      prefetch_ahead<kTilesAtOnce>(tiles[r], b, blocks);
      for (int v = 0; v < kVectors; ++v) scale[r][v] = load_scales(tiles[r].scales + b * kRows, v) * splat(1 / kScaleUnit);
    }
    for (int j = 0; j < 2; ++j) {
      U codes[R][kVectors];
      for (int r = 0; r < R; ++r)
        for (int v = 0; v < kVectors; ++v) codes[r][v] = load<U>(tiles[r].codes + b * kCodeBytes + 64 * j + 4 * kLanes * v);
      for (int k = 0; k < 8; ++k, x += 4 * N)
        for (int r = 0; r < R; ++r)
          for (int v = 0; v < kVectors; ++v) {
            const F w = decode_code(codes[r][v] >> (k % 4 * 8 + k / 4 * 4)) * scale[r][v];
            for (int t = 0; t < N; ++t) {
              float value;
              memcpy(&value, x + 4 * t, 4);
              sum[t][r][v] = exact_product_add(w, splat(value), sum[t][r][v]);
            }
          }
    }
  }
  store_sums<R, N>(sums, which, sum);
}
#endif
#else
// bf16 bits of e2m1(code), from code / 2: the fields of e2m1 in those of bf16, but for the subnormal 0.5 and zero.
constexpr uint16_t bf16_of_e2m1(int code) {
  return static_cast<uint16_t>((code & 8) << 12 | ((code & 7) < 2 ? (code & 7) * 0x3F00 : ((code & 7) << 6) + 0x3F00));
}

struct alignas(64) PairTable {
  uint16_t of[32];  // twice, because vpermw looks at five bits of its index and a code has four
  constexpr PairTable() : of{} {
    for (int i = 0; i < 32; ++i) of[i] = bf16_of_e2m1(i & 15);
  }
};
constexpr PairTable kPairs;

// 8 columns of a tile, without their scales, as four registers of bf16 pairs: columns (0,2) (4,6) (1,3) (5,7).
NVFP4_INLINE void load_pairs(const uint8_t* codes, __m512i (&pairs)[4]) {
  const __m512i table = _mm512_load_si512(kPairs.of);
  __m512i four = _mm512_loadu_si512(codes);
  pairs[0] = _mm512_permutexvar_epi16(four, table);
  pairs[1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(four, 4), table);
  pairs[2] = _mm512_permutexvar_epi16(_mm512_srli_epi16(four, 8), table);
  pairs[3] = _mm512_permutexvar_epi16(_mm512_srli_epi16(four, 12), table);
}

// bf16 activations, weights decoded as they are read; the block scale multiplies the block's fp32 sum.
template <int N>
static void multiply_pairs(Tile tile, int which, const uint8_t* x, int64_t blocks, Sums* sums) {
  F sum[N][1][1];
  load_sums<1, N>(sums, which, sum);
  for (int64_t b = 0; b < blocks; ++b, x += 32 * N) {
    prefetch_ahead<1>(tile, b, blocks);
    __m512i w[2][4];
    for (int j = 0; j < 2; ++j) load_pairs(tile.codes + b * kCodeBytes + 64 * j, w[j]);
    F scale = load_scales(tile.scales + b * kRows, 0) * splat(1 / kScaleUnit);
    for (int t = 0; t < N; ++t) {
      F part{};
      for (int pair = 0; pair < 8; ++pair) {
        int32_t both;
        memcpy(&both, x + 4 * (pair * N + t), 4);
        part = _mm512_dpbf16_ps(part, (__m512bh)w[pair / 4][pair % 4], (__m512bh)_mm512_set1_epi32(both));
      }
      sum[t][0][0] = _mm512_fmadd_ps(part, scale, sum[t][0][0]);
    }
  }
  store_sums<1, N>(sums, which, sum);
}
#endif

}  // namespace NVFP4_TIER
}  // namespace nvfp4
