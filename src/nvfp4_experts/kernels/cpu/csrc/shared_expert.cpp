// SPDX-License-Identifier: Apache-2.0
// The calls of api.h, but for routed experts. One shared expert is four steps, each cut into pieces that threads take:
//
//   1  enter     x -> values           by groups of tokens
//   2  gate_up   values -> h (fp32)    by blocks of tokens x tiles of 16 channels
//   3  enter     h -> values           by groups of tokens
//   4  down      values -> y           by blocks of tokens x 32 rows
//
// kDynamic looks for the largest magnitude of all x, and of all h, in front of steps 1 and 3. An exact product is an enter
// by tokens and one multiplication, by blocks of tokens x tiles of 16 rows.
#include "api.h"
#include "steps.h"
#include "team.h"
#include "tiers.h"

namespace nvfp4 {
namespace {

// Where each part of a call's scratch begins.
struct Scratch : Layout {
  int64_t values, h, h_values, scales, amax;

  Scratch(const Call& call, const Kernels& kernels) {
    values = take(call.tokens * kernels.value_bytes(call.activations, call.hidden));
    h = take(call.tokens * call.intermediate * 4);
    h_values = take(call.tokens * kernels.value_bytes(call.activations, call.intermediate));
    scales = take(call.tokens * 4);
    amax = take(call.tokens * 4);
  }
};

void enter(const Call& call, const Kernels& kernels, Entry entry, uint32_t* amax) {
  const int threads = entry.tokens * entry.columns < kValuesAlone ? 1 : call.threads;
  if (entry.activations == kNvfp4 && entry.scale_mode == kDynamic) {
    run(threads, entry.tokens, [&](int64_t t) { amax[t] = kernels.row_amax(entry.x, entry.element, t, entry.columns); });
    for (int64_t t = 1; t < entry.tokens; ++t) amax[0] = amax[t] > amax[0] ? amax[t] : amax[0];
    entry.amax_bits = amax;
  }
  run(threads, pieces(entry.tokens, kernels.group_tokens), [&](int64_t group) { kernels.enter(entry, group); });
}

void multiply(const Call& call, const Half& half, int64_t pairs, void (*kernel)(const Half&, int64_t, int64_t)) {
  // A block of tokens meets all weights before the next one does: it stays in the second-level cache.
  run(call.threads, pieces(half.tokens, kTokenBlock) * pairs,
      [&](int64_t index) { kernel(half, index / pairs * kTokenBlock, index % pairs); });
}

}  // namespace

NVFP4_EXPORT int64_t nvfp4_scratch_bytes(const Call* call) {
  const Tier* tier = tier_at(call->tier);
  return tier ? Scratch(*call, *tier->kernels).size() : -1;
}

NVFP4_EXPORT void nvfp4_shared_expert(const Call* given) {
  const Call& call = *given;
  const Kernels& kernels = *tier_at(call.tier)->kernels;
  const Scratch at(call, kernels);
  uint8_t* scratch = begin_of(call.scratch);
  float* h = reinterpret_cast<float*>(scratch + at.h);
  float* scales = reinterpret_cast<float*>(scratch + at.scales);
  uint32_t* amax = reinterpret_cast<uint32_t*>(scratch + at.amax);

  enter(call, kernels,
        {call.x, nullptr, call.tokens, call.hidden, call.element, call.activations, call.scale_mode, call.input_scale, nullptr,
         scratch + at.values, scales},
        amax);
  multiply(call,
           {call.gate_up, call.intermediate, call.hidden, call.gate_up_row_amax, call.gate_up_global_scales,
            scratch + at.values, scales, nullptr, call.tokens, call.activations, kElementFp32, call.clamp, h, 0, 0},
           call.intermediate / kRows, kernels.gate_up);
  enter(call, kernels,
        {h, nullptr, call.tokens, call.intermediate, kElementFp32, call.activations, call.scale_mode, call.hidden_scale, nullptr,
         scratch + at.h_values, scales},
        amax);
  multiply(call,
           {call.down, call.hidden, call.intermediate, call.down_row_amax, call.down_global_scale,
            scratch + at.h_values, scales, nullptr, call.tokens, call.activations, call.element, call.clamp, call.y, call.hidden, 0},
           pieces(call.hidden, 2 * kRows), kernels.down);
}

NVFP4_EXPORT int64_t nvfp4_exact_entered_bytes(int64_t tokens, int64_t columns) {
  return pieces(columns, kStepBlocks * kBlock) * kStepBlocks * tokens * static_cast<int64_t>(sizeof(ExactBlock));
}

NVFP4_EXPORT void nvfp4_exact(const Exact* given) {
  const Exact& product = *given;
  const Kernels& kernels = *tier_at(product.tier)->kernels;
  run(product.tokens * product.columns < kValuesAlone ? 1 : product.threads, product.tokens,
      [&](int64_t token) { kernels.exact_enter(product, token); });
  const int64_t tiles = pieces(product.rows, kRows);
  run(product.threads, pieces(product.tokens, kTokenBlock) * tiles,
      [&](int64_t index) { kernels.exact_multiply(product, index / tiles * kTokenBlock, index % tiles); });
}

NVFP4_EXPORT int64_t nvfp4_call_bytes() { return sizeof(Call) + sizeof(RoutedCall) + sizeof(Exact); }
NVFP4_EXPORT int nvfp4_tier_count() { return tier_count(); }
NVFP4_EXPORT const char* nvfp4_tier_name(int tier) { return tier_at(tier)->name; }
NVFP4_EXPORT const char* nvfp4_tier_needs(int tier) { return tier_at(tier)->needs; }
NVFP4_EXPORT int nvfp4_tier_present(int tier) { return tier_at(tier)->present(); }
NVFP4_EXPORT const char* nvfp4_threads() { return whose_threads(); }
NVFP4_EXPORT const char* nvfp4_source_digest() { return NVFP4_SOURCE_DIGEST; }

}  // namespace nvfp4
