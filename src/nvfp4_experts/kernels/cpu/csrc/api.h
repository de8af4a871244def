// SPDX-License-Identifier: Apache-2.0
// The library's plain C interface, and what the parts of the library say to each other.
//
//   nvfp4_shared_expert(call)    one shared expert, x (T, H) to y (T, H): kernels/reference.py says what is computed
//   nvfp4_routed_experts(call)   routed experts, likewise, with the experts of each token and their weights
//   nvfp4_scratch_bytes(call)    how many bytes of scratch a call needs; nvfp4_routed_scratch_bytes for the other
//   nvfp4_exact(product)         a matrix product as Blackwell's FP4 tensor core sums it: exact.h
//   nvfp4_tier_*                 the instruction sets it was built for, and why one cannot run here
//
// kernels/native.py mirrors `Call`, `RoutedCall` and `Exact` field by field; their size is checked when the library is loaded.
#pragma once

#include <cstddef>
#include <cstdint>

#define NVFP4_EXPORT extern "C" __attribute__((visibility("default")))

namespace nvfp4 {

enum Activations : int32_t { kBf16 = 0, kFp8 = 1, kNvfp4 = 2 };
enum ScaleMode : int32_t { kStatic = 0, kDynamic = 1, kPerToken = 2 };
enum Element : int32_t { kElementBf16 = 0, kElementFp16 = 1, kElementFp32 = 2 };

// One call; the fields that are pointers first. Weights are in the layout of layouts/rows.py, tiles of gate and of up
// alternating. Row amax are the bits of a bf16 and serve kFp8 alone. Nothing needs an alignment but that of its elements.
struct Call {
  const void* x;
  void* y;
  const uint8_t* gate_up;
  const float* gate_up_global_scales;
  const uint16_t* gate_up_row_amax;  // gate's rows, then up's
  const uint8_t* down;
  const float* down_global_scale;
  const uint16_t* down_row_amax;
  const float* input_scale;   // kStatic alone
  const float* hidden_scale;  // kStatic alone
  void* scratch;
  int64_t tokens;
  int64_t hidden;
  int64_t intermediate;
  float clamp;  // L, or infinity where it is off
  int32_t element;
  int32_t activations;
  int32_t scale_mode;
  int32_t threads;
  int32_t tier;
};

// Routed experts: what `Call` says of one expert is here said of the first; those of the others follow it in memory. Of
// `shared` only that which belongs to an expert is read; its sizes and its format are those of the layer.
struct RoutedCall {
  Call layer;
  const void* indices;   // (T, k) of index_bytes each; outside [0, experts): not here
  const float* weights;  // (T, k)
  const Call* shared;    // an expert that every token goes to, unweighted, after its slots; or null
  int64_t top_k;
  int64_t experts;
  int32_t index_bytes;        // 4 or 8
  int32_t out_element;        // of y; layer.element is that of x
  int32_t weigh_after_down;   // what weights multiply: 0: h, in front of its quantisation; 1: what down makes of it
};

// Block of 16 values of a token, on its way into an exact product.
struct ExactBlock {
  int8_t twice[16];  // 2 * e2m1
  int32_t start;     // of dot products with it, where weights have a bias: dot.h
  float scale;
  float power;  // of two, of that scale: exact.h
};

// out (T, N) = a (T, K) x b (N, K), both in NVFP4 without their global scales, codes and scales by rows.
struct Exact {
  const uint8_t* a_codes;
  const uint8_t* a_scales;
  const uint8_t* b_codes;
  const uint8_t* b_scales;
  float* out;
  ExactBlock* entered;  // kStepBlocks * steps(K) * T of them: scratch, in the order of exact.h
  int64_t tokens;
  int64_t rows;     // N
  int64_t columns;  // K, a multiple of 16
  int32_t threads;
  int32_t tier;
};

// Hidden states on their way into a GEMM: rows of x or of h in, `values` in the tier's own form and `scales` (T,) out.
struct Entry {
  const void* x;
  const int64_t* rows;  // (T,), which row of x a token is; null: its own number
  int64_t tokens;
  int64_t columns;
  int32_t element;
  int32_t activations;
  int32_t scale_mode;
  const float* static_scale;
  const uint32_t* amax_bits;  // kDynamic: of the whole batch; null: to be looked for
  uint8_t* values;
  float* scales;
};

// One GEMM of the layer with what follows it. Tiles are pairs: gate and up of 16 channels, or 32 rows of down.
struct Half {
  const uint8_t* weights;
  int64_t rows;  // of one of gate and up, or of down
  int64_t columns;
  const uint16_t* row_amax;
  const float* global_scales;
  const uint8_t* values;
  const float* scales;
  const float* factors;  // of h; or null
  int64_t tokens;
  int32_t activations;
  int32_t element;
  float clamp;
  void* out;           // h (T, rows) fp32; or what down makes, from row to row
  int64_t out_stride;  // that many elements,
  int64_t out_first;   // from this of its rows on
};

// The sum of each token's slots, for `width` columns of y.
struct Sum {
  const float* rows;      // (rows, width)
  const int64_t* row_of;  // (T, k), the row of a slot; below 0: not here
  const float* factors;   // (rows,); or null
  int64_t tokens;
  int64_t top_k;
  int64_t width;
  void* y;  // (T, hidden)
  int32_t element;
  int64_t hidden;
};

// The functions of one tier; each may run on several threads at once, on other parts.
struct Kernels {
  int64_t group_tokens;  // tokens whose values are interleaved
  int64_t (*value_bytes)(int32_t activations, int64_t columns);  // of one token
  uint32_t (*row_amax)(const void* x, int32_t element, int64_t row, int64_t columns);
  void (*enter)(const Entry& entry, int64_t group);
  void (*gate_up)(const Half& half, int64_t first_token, int64_t pair);
  void (*down)(const Half& half, int64_t first_token, int64_t pair);
  void (*add_slots)(const Sum& sum, int64_t first_column);
  void (*exact_enter)(const Exact& product, int64_t token);
  void (*exact_multiply)(const Exact& product, int64_t first_token, int64_t tile);
};

constexpr int64_t kRows = 16;        // of a tile
constexpr int64_t kBlock = 16;       // columns under one scale
constexpr int64_t kStepBlocks = 4;   // of an exact product: 64 columns are summed at a time
constexpr int64_t kTokenBlock = 128;  // tokens that meet a pair of tiles in one piece of work

struct Tier {
  const char* name;
  const char* needs;
  const Kernels* kernels;
  bool (*present)();
};

}  // namespace nvfp4
