// SPDX-License-Identifier: Apache-2.0
// The work of one tier: compiled once for each, with NVFP4_TIER its name and the flags of its instructions.
//
//   gate_up(pair p)   tiles p of gate and of up:  h = silu(min(gate, L)) * clamp(up, -L, L)      16 channels
//   down(pair p)      tiles 2p and 2p + 1 of down                                               32 rows, or 16
//
// each for a block of kTokenBlock tokens, from values that enter.h made;
//
//   add_slots      y[t] = ((0 + row of slot 0) + row of slot 1) + ...      a few columns, every token
#include "enter.h"
#include "exact.h"
#include "multiply.h"

namespace nvfp4 {
namespace NVFP4_TIER {

template <int N>
struct Count {
  static constexpr int value = N;
};

// f(Count<n>) for a run-time n in 1 .. N.
template <int N, class Function>
NVFP4_INLINE void with_count(int64_t n, const Function& f) {
  if constexpr (N > 0) {
    if (n == N) return f(Count<N>{});
    with_count<N - 1>(n, f);
  }
}

// f(first tile, Count<tiles at a time>) until `tiles` tiles are done.
template <class Function>
NVFP4_INLINE void for_tiles(int tiles, const Function& f) {
  int tile = 0;
  if constexpr (kTilesAtOnce == 2)
    if (tiles == 2) return f(0, Count<2>{});
  for (; tile < tiles; ++tile) f(tile, Count<1>{});
}

// Tokens [first, first + tokens) against one or two tiles.
struct Piece {
  const Half& half;
  int64_t first, tokens;
  Tile tile[2];
  const uint16_t* row_amax[2];
  int tiles;
};

// f(values of the group, its tokens, its sums)
template <class Function>
NVFP4_INLINE void for_groups(const Piece& piece, int64_t token_bytes, Sums* sums, const Function& f) {
  const uint8_t* values = piece.half.values + piece.first * token_bytes;
  for (int64_t t = 0; t < piece.tokens; t += kGroup) {
    int64_t n = piece.tokens - t < kGroup ? piece.tokens - t : kGroup;
    f(values + t * token_bytes, n, sums + t);
  }
}

#if defined(__AVX512F__)
NVFP4_INLINE void load_panel(PanelBlock& block, const uint8_t* codes, const uint8_t* scales, uint32_t& nan_rows) {
  nan_rows |= block.load(codes, scales);
}
#else
NVFP4_INLINE void load_panel(IntegerBlock& block, const uint8_t* codes, const uint8_t* scales, uint32_t&) {
  block.load(codes, scales);
}
#endif

static void integer_sums(const Piece& piece, Sums* sums) {
  const int64_t blocks = piece.half.columns / kBlock, token_bytes = value_bytes(kNvfp4, piece.half.columns);
  auto run = [&](const auto& from, int64_t first, int64_t count) {
    for_groups(piece, token_bytes, sums, [&](const uint8_t* values, int64_t tokens, Sums* group_sums) {
      with_count<kGroup>(tokens, [&](auto n) {
        for_tiles(piece.tiles, [&](int tile, auto r) {
          multiply_integer<r.value, n.value>(from, tile, values + first * 24 * n.value, count, group_sums);
        });
      });
    });
  };
  if (piece.tokens <= kGroup) return run(FromTiles{{piece.tile[0], piece.tile[1]}, blocks}, 0, blocks);
  constexpr int64_t kRun = 16;
  FromPanel::Block panel[kRun][2];
  uint32_t nan_rows[2] = {0, 0};
  for (int64_t first = 0; first < blocks; first += kRun) {
    const int64_t count = blocks - first < kRun ? blocks - first : kRun;
    for (int64_t b = first; b < first + count; ++b)
      for (int r = 0; r < piece.tiles; ++r) {
        prefetch_block(piece.tile[r], b + kRun);
        load_panel(panel[b - first][r], piece.tile[r].codes + b * kCodeBytes, piece.tile[r].scales + b * kRows, nan_rows[r]);
      }
    run(FromPanel{panel}, first, count);
  }
  for (int r = 0; r < piece.tiles; ++r)
    for (int lane = 0; nan_rows[r] >> lane; ++lane)
      for (int64_t t = 0; (nan_rows[r] >> lane & 1) && t < piece.tokens; ++t) sums[t][r][lane] = float_of(kNaN);
}

NVFP4_INLINE F row_amax_values(const uint16_t* row_amax, int v) {
  F amax = (F)(__builtin_convertvector(load<H>(row_amax + v * kLanes), U) << 16);
  return amax < kAmaxFloor ? splat(kAmaxFloor) : amax;
}

// One block of a tile into a panel: e2m1 * e4m3, exact in bf16; for fp8 then e4m3(that * 448 / row amax).
template <bool kIsFp8>
static void decode_floats(const Piece& piece, int tile, int64_t b, FloatPanel& panel, int64_t run_column) {
  for (int v = 0; v < kVectors; ++v) {
    const F scale = load_scales(piece.tile[tile].scales + b * kRows, v) * splat(1 / kScaleUnit);
    const F factor = kIsFp8 ? splat(448.0f) / row_amax_values(piece.row_amax[tile], v) : F{};
    auto scaled = [&](F code) { return kIsFp8 ? round_e4m3(code * scale * factor) : code * scale; };
    for (int j = 0; j < 2; ++j) {
      const uint8_t* codes = piece.tile[tile].codes + b * kCodeBytes + 64 * j + 4 * kLanes * v;
#if defined(__AVX512BF16__)
      __m512i pairs[4];
      load_pairs(codes, pairs);
      for (int pair = 0; pair < 4; ++pair) {
        U first = (U)scaled((F)((U)pairs[pair] << 16)), second = (U)scaled((F)((U)pairs[pair] & 0xFFFF0000u));
        store(panel.at[run_column / 2 + 4 * j + pair][tile], first >> 16 | second);
      }
#else
      U four = load<U>(codes);
      for (int k = 0; k < 8; ++k)
        store(panel.at[run_column + 8 * j + k][tile] + v * kLanes, scaled(decode_code(four >> (k % 4 * 8 + k / 4 * 4))));
#endif
    }
  }
}

static void float_sums(const Piece& piece, Sums* sums) {
  const int64_t columns = piece.half.columns, token_bytes = value_bytes(kBf16, columns);
#if defined(__AVX512BF16__)
  // Decoding into a panel costs what it saves at about this many tokens.
  constexpr int64_t kPanelTokens = 16;
  if (piece.half.activations == kBf16 && piece.tokens <= kPanelTokens) {
    for (int tile = 0; tile < piece.tiles; ++tile)
      for_groups(piece, token_bytes, sums, [&](const uint8_t* values, int64_t tokens, Sums* group_sums) {
        with_count<kGroup>(tokens, [&](auto n) {
          multiply_pairs<n.value>(piece.tile[tile], tile, values, columns / kBlock, group_sums);
        });
      });
    return;
  }
#elif defined(__AVX2__)
  if (piece.half.activations == kBf16 && piece.tokens <= kCodeTokens) {
    const uint8_t* values = piece.half.values + piece.first * token_bytes;
    with_count<kCodeTokens>(piece.tokens, [&](auto n) {
      for_tiles(piece.tiles, [&](int tile, auto r) {
        multiply_codes<r.value, n.value>(piece.tile + tile, tile, values, columns / kBlock, sums);
      });
    });
    return;
  }
#endif
  FloatPanel panel;
  for (int64_t first = 0; first < columns; first += kRunColumns) {
    const int64_t count = columns - first < kRunColumns ? columns - first : kRunColumns;
    for (int64_t k = 0; k < count; k += kBlock)
      for (int tile = 0; tile < piece.tiles; ++tile) {
        prefetch_block(piece.tile[tile], (first + k + kRunColumns) / kBlock);
        auto decode = piece.half.activations == kFp8 ? decode_floats<true> : decode_floats<false>;
        decode(piece, tile, (first + k) / kBlock, panel, k);
      }
    for_groups(piece, token_bytes, sums, [&](const uint8_t* values, int64_t tokens, Sums* group_sums) {
      with_count<kGroup>(tokens, [&](auto n) {
        const uint8_t* run = values + first * (token_bytes / columns) * n.value;
        for_tiles(piece.tiles, [&](int tile, auto r) {
          multiply_float<r.value, n.value>(panel, tile, run, count, group_sums);
        });
      });
    });
  }
}

static void sums_of(const Piece& piece, Sums* sums) {
  memset(sums, 0, sizeof(Sums) * piece.tokens);
  piece.half.activations == kNvfp4 ? integer_sums(piece, sums) : float_sums(piece, sums);
}

// The scale of each row of a tile: the global one, for fp8 times that of the row.
NVFP4_INLINE F weight_scale(const Piece& piece, int tile, int v, float global_scale) {
  if (piece.half.activations != kFp8) return splat(global_scale);
  return row_amax_values(piece.row_amax[tile], v) / splat(448.0f) * splat(global_scale);
}

NVFP4_INLINE int64_t tokens_from(const Half& half, int64_t first) {
  return half.tokens - first < kTokenBlock ? half.tokens - first : kTokenBlock;
}

static void gate_up(const Half& half, int64_t first, int64_t pair) {
  Piece piece{half, first, tokens_from(half, first), {}, {}, 2};
  for (int r = 0; r < 2; ++r) {
    piece.tile[r] = tile_at(half.weights, half.columns, 2 * pair + r);
    piece.row_amax[r] = half.row_amax + r * half.rows + pair * kRows;
  }
  alignas(64) Sums sums[kTokenBlock];
  sums_of(piece, sums);
  for (int v = 0; v < kVectors; ++v) {
    F scale[2];
    for (int r = 0; r < 2; ++r) scale[r] = weight_scale(piece, r, v, half.global_scales[r]);
    for (int64_t t = 0; t < piece.tokens; ++t) {
      F x = splat(half.scales[first + t]);
      F gate = load<F>(sums[t][0] + v * kLanes) * (x * scale[0]);
      F up = load<F>(sums[t][1] + v * kLanes) * (x * scale[1]);
      float* h = static_cast<float*>(half.out) + (first + t) * half.rows + pair * kRows + v * kLanes;
      F value = swiglu(gate, up, half.clamp);
      store(h, half.factors ? value * splat(half.factors[first + t]) : value);
    }
  }
}

static void down(const Half& half, int64_t first, int64_t pair) {
  const int tiles = (2 * pair + 1) * kRows < half.rows ? 2 : 1;
  Piece piece{half, first, tokens_from(half, first), {}, {}, tiles};
  for (int r = 0; r < tiles; ++r) {
    piece.tile[r] = tile_at(half.weights, half.columns, 2 * pair + r);
    piece.row_amax[r] = half.row_amax + (2 * pair + r) * kRows;
  }
  alignas(64) Sums sums[kTokenBlock];
  sums_of(piece, sums);
  for (int r = 0; r < tiles; ++r)
    for (int v = 0; v < kVectors; ++v) {
      F scale = weight_scale(piece, r, v, half.global_scales[0]);
      for (int64_t t = 0; t < piece.tokens; ++t) {
        F y = load<F>(sums[t][r] + v * kLanes) * (splat(half.scales[first + t]) * scale);
        int64_t column = (2 * pair + r) * kRows + v * kLanes - half.out_first;
        store_elements(half.out, half.element, (first + t) * half.out_stride + column, y);
      }
    }
}

static void add_slots(const Sum& sum, int64_t first_column) {
  const int64_t columns = sum.hidden - first_column < sum.width ? sum.hidden - first_column : sum.width;
  for (int64_t t = 0; t < sum.tokens; ++t)
    for (int64_t column = 0; column < columns; column += kLanes) {
      F total{};
      for (int64_t slot = t * sum.top_k; slot < (t + 1) * sum.top_k; ++slot) {
        const int64_t at = sum.row_of[slot];
        if (at < 0) continue;
        F row = load<F>(sum.rows + at * sum.width + column);
        total += sum.factors ? row * splat(sum.factors[at]) : row;
      }
      store_elements(sum.y, sum.element, t * sum.hidden + first_column + column, total);
    }
}

extern const Kernels kKernels;
const Kernels kKernels = {kGroup, value_bytes, row_amax, enter, gate_up, down, add_slots, exact_enter, exact_multiply};

}  // namespace NVFP4_TIER
}  // namespace nvfp4
