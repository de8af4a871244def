// SPDX-License-Identifier: Apache-2.0
// Routed experts in one call. A row is a slot that is here; rows of one expert lie together, in the order of slots, and a
// block is up to kTokenBlock rows of one expert. A shared expert is one more expert, and every token's last slot.
//
//   1  enter     x -> values            by groups of rows, gathered
//   2  gate_up   values -> h (fp32)     by blocks x tiles of 16 channels
//   3  enter     h -> values            by groups of rows
//   4  down      values -> y            by bands of columns of y: all blocks meet the tiles of a band, then the rows of each
//                                       token are added
//
// So a thread waits for others three times, whatever the number of experts, and each weight is read once a block. Steps 1
// to 3 take kBatchRows rows at a time, which bounds x and h; but all at once for kDynamic, whose scale needs h of all
// rows of an expert. In step 4 a thread keeps what down makes of all rows for its band alone.
#include <cstring>

#include <atomic>

#include "api.h"
#include "steps.h"
#include "team.h"
#include "tiers.h"

namespace nvfp4 {
namespace {

constexpr int64_t kBatchRows = 4096;
constexpr int64_t kPairRows = 2 * kRows;          // columns of y of a pair of tiles
constexpr int64_t kMostBandRows = 8 * kPairRows;  // of a band: what a thread takes of every expert before it adds
constexpr int64_t kBandBytes = 1 << 18;           // of down's rows for a band: what the second-level cache has room for

struct Block {
  int64_t expert, first, rows;
};

// A call, and where each part of its scratch begins. Sizes are those of a call whose slots are all here.
struct Routed : Layout {
  const RoutedCall& given;
  const Call& call;
  const Kernels& kernels;
  int64_t experts, slots_of_token, slots, batch_rows, band_rows, workers;  // a shared expert counted
  int64_t values, h, h_values, scales, amax, expert_amax, factors, token_of, row_of, first_of, blocks, down_rows;

  explicit Routed(const RoutedCall& routed)
      : given(routed), call(routed.layer), kernels(*tier_at(routed.layer.tier)->kernels) {
    experts = given.experts + (given.shared ? 1 : 0);
    slots_of_token = given.top_k + (given.shared ? 1 : 0);
    slots = call.tokens * slots_of_token;
    batch_rows = dynamic() || slots < kBatchRows ? slots : kBatchRows;
    band_rows = kMostBandRows;  // the wider, the longer a thread reads on where it is
    while (band_rows > kPairRows && (band_rows * slots * 4 > kBandBytes || band_rows * call.threads * 4 > call.hidden))
      band_rows /= 2;
    workers = pieces(call.hidden, band_rows);
    if (call.threads < workers) workers = call.threads;
    const int64_t most_blocks = (slots < experts ? slots : experts) + slots / kTokenBlock;
    values = take(batch_rows * x_bytes());
    h = take(batch_rows * call.intermediate * 4);
    h_values = take(slots * h_bytes());
    scales = take(slots * 4);
    amax = take(slots * 4);
    expert_amax = take(experts * 4);
    factors = take(slots * 4);
    token_of = take(slots * 8);
    row_of = take(slots * 8);
    first_of = take((experts + 1) * 8);
    blocks = take(most_blocks * sizeof(Block));
    down_rows = take(workers * slots * band_rows * 4);
  }

  bool dynamic() const { return call.activations == kNvfp4 && call.scale_mode == kDynamic; }
  int64_t x_bytes() const { return kernels.value_bytes(call.activations, call.hidden); }
  int64_t h_bytes() const { return kernels.value_bytes(call.activations, call.intermediate); }

  template <class T>
  T* part(int64_t at) const {
    return reinterpret_cast<T*>(begin_of(call.scratch) + at);
  }
};

// Where an expert's weights and scales are: in which call, as which of its experts.
struct Place {
  const Call& call;
  int64_t number;
};

Place place_of(const Routed& r, int64_t expert) {
  return expert < r.given.experts ? Place{r.call, expert} : Place{*r.given.shared, 0};
}

// The expert of a slot; -1 if it is not here.
int64_t expert_of(const Routed& r, int64_t token, int64_t slot) {
  if (slot == r.given.top_k) return r.given.experts;
  const int64_t at = token * r.given.top_k + slot;
  const int64_t expert = r.given.index_bytes == 8 ? static_cast<const int64_t*>(r.given.indices)[at]
                                                  : static_cast<const int32_t*>(r.given.indices)[at];
  return expert >= 0 && expert < r.given.experts ? expert : -1;
}

// Rows in the order of experts, and of slots within one; returns how many blocks they make.
int64_t group_slots(const Routed& r) {
  int64_t* first_of = r.part<int64_t>(r.first_of);
  memset(first_of, 0, (r.experts + 1) * 8);
  for (int64_t token = 0; token < r.call.tokens; ++token)
    for (int64_t slot = 0; slot < r.slots_of_token; ++slot)
      if (const int64_t expert = expert_of(r, token, slot); expert >= 0) ++first_of[expert + 1];
  Block* blocks = r.part<Block>(r.blocks);
  int64_t count = 0;
  for (int64_t expert = 0; expert < r.experts; ++expert) {
    const int64_t rows = first_of[expert + 1], first = first_of[expert];
    for (int64_t done = 0; done < rows; done += kTokenBlock)
      blocks[count++] = {expert, first + done, rows - done < kTokenBlock ? rows - done : kTokenBlock};
    first_of[expert + 1] += first;
  }
  int64_t *token_of = r.part<int64_t>(r.token_of), *row_of = r.part<int64_t>(r.row_of);
  float* factors = r.part<float>(r.factors);
  for (int64_t token = 0; token < r.call.tokens; ++token)
    for (int64_t slot = 0; slot < r.slots_of_token; ++slot) {
      const int64_t expert = expert_of(r, token, slot);
      int64_t& row = row_of[token * r.slots_of_token + slot] = expert < 0 ? -1 : first_of[expert]++;
      if (row < 0) continue;
      token_of[row] = token;
      factors[row] = slot < r.given.top_k ? r.given.weights[token * r.given.top_k + slot] : 1.0f;
    }
  return count;
}

int threads_for(const Routed& r, int64_t values) { return values < kValuesAlone ? 1 : r.call.threads; }

uint32_t amax_of_x(const Routed& r) {
  uint32_t* amax = r.part<uint32_t>(r.amax);
  const Call& call = r.call;
  run(threads_for(r, call.tokens * call.hidden), call.tokens,
      [&](int64_t t) { amax[t] = r.kernels.row_amax(call.x, call.element, t, call.hidden); });
  uint32_t largest = 0;
  for (int64_t t = 0; t < call.tokens; ++t) largest = amax[t] > largest ? amax[t] : largest;
  return largest;
}

// Of h (rows, I), the largest magnitude of each expert's rows.
void amax_of_h(const Routed& r, const Block* blocks, int64_t count, const float* h) {
  uint32_t *amax = r.part<uint32_t>(r.amax), *of_expert = r.part<uint32_t>(r.expert_amax);
  const int64_t rows = blocks[count - 1].first + blocks[count - 1].rows, columns = r.call.intermediate;
  run(threads_for(r, rows * columns), rows,
      [&](int64_t row) { amax[row] = r.kernels.row_amax(h, kElementFp32, row, columns); });
  memset(of_expert, 0, r.experts * 4);
  for (const Block* block = blocks; block < blocks + count; ++block)
    for (int64_t row = block->first; row < block->first + block->rows; ++row)
      of_expert[block->expert] = amax[row] > of_expert[block->expert] ? amax[row] : of_expert[block->expert];
}

// `entry_of(block)` says what enters; groups of all blocks are pieces of work.
template <class EntryOf>
void enter(const Routed& r, const Block* blocks, int64_t count, int64_t values, const EntryOf& entry_of) {
  const int64_t groups = kTokenBlock / r.kernels.group_tokens;
  run(threads_for(r, values), count * groups, [&](int64_t index) {
    const Block& block = blocks[index / groups];
    if (index % groups * r.kernels.group_tokens < block.rows) r.kernels.enter(entry_of(block), index % groups);
  });
}

// Steps 1 to 3 for some blocks, the rows of which follow each other.
void enter_to_h(const Routed& r, const Block* blocks, int64_t count, const uint32_t& x_amax) {
  const Call& call = r.call;
  const int64_t first = blocks[0].first, rows = blocks[count - 1].first + blocks[count - 1].rows - first;
  uint8_t *values = r.part<uint8_t>(r.values), *h_values = r.part<uint8_t>(r.h_values);
  float *h = r.part<float>(r.h), *scales = r.part<float>(r.scales);
  const float* factors = r.given.weigh_after_down ? nullptr : r.part<float>(r.factors);
  const uint32_t* h_amax = r.part<uint32_t>(r.expert_amax);
  auto scale_of = [](const float* of_all, int64_t expert) { return of_all ? of_all + expert : nullptr; };

  enter(r, blocks, count, rows * call.hidden, [&](const Block& b) {
    const auto& [of, number] = place_of(r, b.expert);
    return Entry{call.x, r.part<int64_t>(r.token_of) + b.first, b.rows, call.hidden, call.element, call.activations,
                 call.scale_mode, scale_of(of.input_scale, number), &x_amax,
                 values + (b.first - first) * r.x_bytes(), scales + b.first};
  });
  const int64_t channels = call.intermediate / kRows;
  run(call.threads, count * channels, [&](int64_t index) {
    const Block& b = blocks[index / channels];
    const auto& [of, number] = place_of(r, b.expert);
    const int64_t gate_up_rows = 2 * call.intermediate;
    const Half half{of.gate_up + number * weight_bytes(gate_up_rows, call.hidden), call.intermediate, call.hidden,
                    of.gate_up_row_amax + number * gate_up_rows, of.gate_up_global_scales + 2 * number,
                    values + (b.first - first) * r.x_bytes(), scales + b.first, factors ? factors + b.first : nullptr,
                    b.rows, call.activations, kElementFp32, call.clamp, h + (b.first - first) * call.intermediate, 0, 0};
    r.kernels.gate_up(half, 0, index % channels);
  });
  if (r.dynamic()) amax_of_h(r, blocks, count, h);
  enter(r, blocks, count, rows * call.intermediate, [&](const Block& b) {
    const auto& [of, number] = place_of(r, b.expert);
    return Entry{h + (b.first - first) * call.intermediate, nullptr, b.rows, call.intermediate, kElementFp32,
                 call.activations, call.scale_mode, scale_of(of.hidden_scale, number), h_amax + b.expert,
                 h_values + b.first * r.h_bytes(), scales + b.first};
  });
}

// Step 4.
void down_and_add(const Routed& r, const Block* blocks, int64_t count) {
  const Call& call = r.call;
  const float* factors = r.given.weigh_after_down ? r.part<float>(r.factors) : nullptr;
  std::atomic<int64_t> next{0};
  run(static_cast<int>(r.workers), r.workers, [&](int64_t worker) {
    float* rows = r.part<float>(r.down_rows) + worker * r.slots * r.band_rows;
    for (int64_t band; (band = next.fetch_add(r.band_rows, std::memory_order_relaxed)) < call.hidden;) {
      const int64_t end = band + r.band_rows < call.hidden ? band + r.band_rows : call.hidden;
      for (const Block* b = blocks; b < blocks + count; ++b) {
        const auto& [of, number] = place_of(r, b->expert);
        const Half half{of.down + number * weight_bytes(call.hidden, call.intermediate), call.hidden,
                        call.intermediate, of.down_row_amax + number * call.hidden,
                        of.down_global_scale + number, r.part<uint8_t>(r.h_values) + b->first * r.h_bytes(),
                        r.part<float>(r.scales) + b->first, nullptr, b->rows, call.activations, kElementFp32, call.clamp,
                        rows + b->first * r.band_rows, r.band_rows, band};
        for (int64_t row = band; row < end; row += kPairRows) r.kernels.down(half, 0, row / kPairRows);
      }
      r.kernels.add_slots({rows, r.part<int64_t>(r.row_of), factors, call.tokens, r.slots_of_token, r.band_rows, call.y,
                           r.given.out_element, call.hidden},
                          band);
    }
  });
}

}  // namespace

NVFP4_EXPORT int64_t nvfp4_routed_scratch_bytes(const RoutedCall* call) { return Routed(*call).size(); }

NVFP4_EXPORT void nvfp4_routed_experts(const RoutedCall* call) {
  const Routed r(*call);
  const int64_t count = group_slots(r);
  const Block* blocks = r.part<Block>(r.blocks);
  const uint32_t x_amax = r.dynamic() ? amax_of_x(r) : 0;
  for (int64_t block = 0; block < count;) {
    const int64_t from = block, first = blocks[from].first;
    while (block < count && blocks[block].first + blocks[block].rows - first <= r.batch_rows) ++block;
    enter_to_h(r, blocks + from, block - from, x_amax);
  }
  down_and_add(r, blocks, count);
}

}  // namespace nvfp4
