// SPDX-License-Identifier: Apache-2.0
// Routed experts for up to 8 tokens in one launch, and a shared expert beside them. A group is an expert and the tokens
// that chose it; the shared expert and all tokens are the first group, where there is one.
//
//   h of group g    = silu(min(x @ W1.T, L)) * clamp(x @ W3.T, -L, L), times the routing weight
//   rows of group g = h @ W2.T
//   y[t]            = ((0 + row of slot 0) + row of slot 1) + ... + row of the shared expert
//
// The tokens are the 8 columns of every product, whoever chose the expert: columns cost nothing, and x stays in registers
// from one expert to the next. All blocks go through the groups in one order, L1 of all, then L2 of all: when the first
// group's h is asked for, it has long been there. A block keeps the rows of its tiles in shared memory until the last.
//
// With NVFP4 activations x and h become NVFP4 values on the way, with FP8 e4m3, as routed_entering.cuh says; sums are
// multiplied by their scales too. FP8: weights are as layouts/e4m3_fragments.py packs them and become e4m3 in units of their
// row's amax / 448; both are multiplied as fp16, which holds them exactly.
//
// Floor: 0.5625 bytes * 3 HI read for each group.
// Compiled with -D: HIDDEN, INTERMEDIATE, ACTIVATIONS (0 bf16, 1 nvfp4 static, 2 dynamic, 3 per token, 4 e4m3), ELEMENT (of x),
// RESULT (of y; 0 bf16, 1 fp16, 2 fp32), INDEX (0 int32, 1 int64), TILES (of L2, of a block, at most), STAGES, SHARED_BYTES,
// MAILBOX_BYTES.

#include "common.cuh"
#include "async.cuh"
#include "tile.cuh"

#if INDEX == 1
typedef long long Index;
#else
typedef int Index;
#endif

using L1 = Gemm<2 * INTERMEDIATE, HIDDEN>;
using L2 = Gemm<HIDDEN, INTERMEDIATE>;

constexpr int CHOICES = 64, SLOTS = CHOICES + TOKENS, GROUPS = CHOICES + 1;  // the shared expert's slots come last
constexpr int X_STRIDE = (HIDDEN + 63) / 64 * 64, H_STRIDE = (INTERMEDIATE + 63) / 64 * 64;
constexpr int AMAX_STRIDE = (L1::tiles + 3) / 4 * 4;
constexpr unsigned char NOBODY = 255;

struct Box {
    u32 h[SLOTS][H_STRIDE / 2];  // bf16 pairs, in the order of fragments
#if ACTIVATIONS != BF16
#if ACTIVATIONS != E4M3
    u32 x[ACTIVATIONS == STATIC ? SLOTS : TOKENS][X_STRIDE / 2];  // the same
#endif
    alignas(16) u32 whole_h[SLOTS][INTERMEDIATE];  // fp32, in the order of channels
#if ACTIVATIONS != STATIC
    alignas(16) u32 amax[SLOTS][AMAX_STRIDE];  // of the 8 channels of a tile
#endif
    alignas(16) u32 blocks_with_x;  // STATIC: that have posted their share, less one
#endif
};
#include "mailbox.cuh"

struct Expert {
    const unsigned char *gate_up, *down;
    const float *gate_up_scales, *down_scale;
    const float *input_scale, *hidden_scale;     // STATIC
    const BFloat16 *gate_up_amax, *down_amax;    // E4M3: of rows of gate and then of up; of down
};

struct Arguments {
    const Element* x;
    const Index* indices;  // (tokens, top_k)
    const float* weights;  // (tokens, top_k)
    Expert routed;         // of the first; those of the others follow
    Expert shared;         // null where there is none
    Mailbox* mailbox;
    Result* y;
    int tokens, top_k, experts, before_down;
    float limit;
};

// Where an expert's weights are.
struct Place {
    const unsigned char *gate_up, *down;
#if ACTIVATIONS == E4M3
    const BFloat16 *gate_up_amax, *down_amax;
    __device__ explicit Place(const Expert& expert)
        : gate_up(expert.gate_up), down(expert.down), gate_up_amax(expert.gate_up_amax), down_amax(expert.down_amax) {}
    __device__ TileAmax of_l1(int tile) const { return amax_of_l1(gate_up_amax, INTERMEDIATE, tile); }
    __device__ TileAmax of_l2(int tile) const { return amax_of_l2(down_amax, tile); }
#else
    __device__ explicit Place(const Expert& expert) : gate_up(expert.gate_up), down(expert.down) {}
    __device__ TileAmax of_l1(int) const { return {}; }
    __device__ TileAmax of_l2(int) const { return {}; }
#endif
    Place() = default;
};

struct Group {
    Place place;
    float gate_scale, up_scale, down_scale;
    int asker;                     // a token that is in it
    unsigned char slots[TOKENS];   // NOBODY: the token is not in it
};

struct Shared {
    Pipeline pipeline;
    float rows[TILES][SLOTS][16];
    Group groups[GROUPS];
    int group_count, box, rows_before;  // box: of the mailbox, this launch's; rows_before: with words, of the other one
    int expert_of_slot[CHOICES], key_of_slot[CHOICES];  // expert -1: not here
    float weight_of_slot[SLOTS], weight_after[CHOICES];  // of h; of a row
    u64 has_groups, has_scales;
#if ACTIVATIONS != BF16
    float x_scale[SLOTS], h_scale[SLOTS];  // global scales of activations; x's: STATIC
    float token_scale[1][TOKENS];          // the others' of x
    u32 amax[1][TOKENS];                   // of x: bits of |.|, whose order is that of the values, NaN above all
    u32 groups_with_scales;                // whose h has its scale; not with STATIC
    u32 has_all_x;                         // STATIC: of all slots
#endif
};
static_assert(sizeof(Shared) <= SHARED_BYTES, "routed_decode.py allocates as much");

__device__ __forceinline__ Expert expert_at(const Expert& first, size_t index) {
    return {first.gate_up + index * (L1::tiles * L1::tile_bytes), first.down + index * (L2::tiles * L2::tile_bytes),
            first.gate_up_scales + index * 2, first.down_scale + index, first.input_scale + index, first.hidden_scale + index,
            first.gate_up_amax + index * (2 * INTERMEDIATE), first.down_amax + index * HIDDEN};
}

// Slots to groups, by one warp. Who names an expert twice has it in two groups. Weights can come as soon as it is known where
// they are; scales, which queue behind them in memory, are said later.
__device__ __forceinline__ void find_groups(const Arguments& arguments, Shared& shared) {
    const int lane = threadIdx.x % 32, top_k = arguments.top_k, slots = arguments.tokens * top_k;
    const int routed = arguments.shared.gate_up ? 1 : 0;  // the first group of a routed expert
    const u32 number = launch_number(*arguments.mailbox);
    constexpr int EACH = CHOICES / 32;
    int key[EACH], first[EACH];
#pragma unroll
    for (int n = 0; n < EACH; n++) {
        const int slot = n * 32 + lane;
        const Index found = slot < slots ? __ldcg(arguments.indices + slot) : -1;
        shared.expert_of_slot[slot] = found >= 0 && found < arguments.experts ? (int)found : -1;
        if (slot < slots) {
            const float weight = __ldcg(arguments.weights + slot);
            shared.weight_of_slot[slot] = arguments.before_down ? weight : 1.0f;
            shared.weight_after[slot] = arguments.before_down ? 1.0f : weight;
        }
        if (slot < TOKENS) shared.weight_of_slot[slots + slot] = 1.0f;
    }
    for (int i = lane; i < GROUPS * TOKENS; i += 32) shared.groups[i / TOKENS].slots[i % TOKENS] = NOBODY;
    __syncwarp();
#pragma unroll
    for (int n = 0; n < EACH; n++) {
        const int slot = n * 32 + lane, expert = shared.expert_of_slot[slot];
        key[n] = expert, first[n] = slot;
#pragma unroll 4
        for (int other = slot / top_k * top_k; other < slot; other++)
            if (shared.expert_of_slot[other] == expert && expert >= 0) key[n] += arguments.experts;
        shared.key_of_slot[slot] = key[n];
    }
    __syncwarp();
#pragma unroll 8
    for (int other = slots - 1; other >= 0; other--) {
        const int key_of_other = shared.key_of_slot[other];
#pragma unroll
        for (int n = 0; n < EACH; n++)
            if (other < n * 32 + lane && key_of_other == key[n]) first[n] = other;
    }
    Group* leads[EACH] = {};
    u32 leaders[EACH];
#pragma unroll
    for (int n = 0; n < EACH; n++) leaders[n] = __ballot_sync(~0u, key[n] >= 0 && first[n] == n * 32 + lane);
#pragma unroll
    for (int n = 0; n < EACH; n++) {
        const int slot = n * 32 + lane, leader = first[n];
        if (key[n] < 0) continue;
        const u32 before = (1u << leader % 32) - 1;
        const int group = routed + (leader < 32 ? __popc(leaders[0] & before) : __popc(leaders[0]) + __popc(leaders[1] & before));
        Group& mine = shared.groups[group];
        mine.slots[slot / top_k] = slot;
        if (leader != slot) continue;
        const Expert expert = expert_at(arguments.routed, shared.expert_of_slot[slot]);
        mine.place = Place(expert), mine.asker = slot / top_k;
        leads[n] = &mine;
    }
    if (routed) {
        Group& all = shared.groups[0];
        const Expert& expert = arguments.shared;
        if (lane < arguments.tokens) all.slots[lane] = slots + lane;
        if (lane == 0) all.place = Place(expert), all.asker = 0;
    }
    __syncwarp();
    if (lane == 0) {
        shared.group_count = routed + __popc(leaders[0]) + __popc(leaders[1]);
        shared.box = number % 2, shared.rows_before = __ldcg(arguments.mailbox->rows + 1 - number % 2);
    }
    barrier_arrive_warp(shared_address(&shared.has_groups));
    auto say_scales = [](Group& group, const Expert& expert) {
        group.gate_scale = expert.gate_up_scales[0], group.up_scale = expert.gate_up_scales[1];
        group.down_scale = *expert.down_scale;
    };
#pragma unroll
    for (int n = 0; n < EACH; n++)
        if (leads[n]) say_scales(*leads[n], expert_at(arguments.routed, shared.expert_of_slot[n * 32 + lane]));
    if (routed && lane == 0) say_scales(shared.groups[0], arguments.shared);
#if ACTIVATIONS == STATIC
    // Past the L1 cache: the launch before may have written them.
    auto say_static = [&](int slot, const Expert& expert) {
        shared.x_scale[slot] = __ldcg(expert.input_scale), shared.h_scale[slot] = __ldcg(expert.hidden_scale);
    };
#pragma unroll
    for (int n = 0; n < EACH; n++) {
        const int slot = n * 32 + lane;
        if (slot < slots) say_static(slot, expert_at(arguments.routed, max(shared.expert_of_slot[slot], 0)));
    }
    if (routed && lane < TOKENS) say_static(slots + lane, arguments.shared);
#endif
    barrier_arrive_warp(shared_address(&shared.has_scales));
}

// This block's share of what a launch with so many rows left in a box.
__device__ __forceinline__ void empty_rows(int rows, Box& box) {
    empty_share(box.h, rows * sizeof(box.h[0]));
#if ACTIVATIONS != BF16
#if ACTIVATIONS != E4M3
    empty_share(box.x, ACTIVATIONS == STATIC ? rows * sizeof(box.x[0]) : sizeof(box.x));
#endif
    empty_share(box.whole_h, rows * sizeof(box.whole_h[0]));
#if ACTIVATIONS != STATIC
    empty_share(box.amax, rows * sizeof(box.amax[0]));
#endif
    empty_share(&box.blocks_with_x, 16);
#endif
}

// The slot whose row a consumer's lane multiplies: a token that is not in the group has the asker's, and nobody asks for
// what becomes of it.
__device__ __forceinline__ int slot_read(const Group& group, int token) {
    const int slot = group.slots[token];
    return slot == NOBODY ? group.slots[group.asker] : slot;
}

// This block's tiles of L1, every gridDim.x-th of all groups' one after the other: visit(group, tile, next); next: the group
// of its next tile, or this one.
template <class Visit>
__device__ __forceinline__ void each_tile(int groups, Visit visit) {
    const int tiles = groups * L1::tiles;
    for (int i = blockIdx.x; i < tiles; i += gridDim.x) {
        const int next = i + (int)gridDim.x;
        visit(i / L1::tiles, i % L1::tiles, (next < tiles ? next : i) / L1::tiles);
    }
}

// h of a tile, rows g = lane / 4 and tokens 2 c, 2 c + 1, to the mailbox.
__device__ __forceinline__ void post_h(int tile, const unsigned char (&slots)[TOKENS], const float (&h)[2], Box& box) {
    const int lane = threadIdx.x % 32, g = lane / 4;
    // Whole words: lanes of even rows take token 2 c, of odd rows 2 c + 1, and give the other to their neighbour.
    const bool odd = g % 2;
    const float got = __shfl_xor_sync(~0u, odd ? h[0] : h[1], 4);
    const u32 pair = odd ? bf16_pair(got, h[1]) : bf16_pair(h[0], got);
    const int slot = slots[lane % 4 * 2 + odd];
    if (slot != NOBODY) post(&box.h[slot][pair_position(tile * 8 + g - odd)], pair);
}

#if ACTIVATIONS != BF16
#include "entering.cuh"
#include "routed_entering.cuh"
#endif

// What a group's sums of a token are multiplied by beside the weights' scale: the activations', of x or of h.
__device__ __forceinline__ float scale_of_x(const Shared& shared, int slot, int token) {
#if ACTIVATIONS == BF16
    return 1.0f;
#elif ACTIVATIONS == STATIC
    return slot == NOBODY ? 1.0f : shared.x_scale[slot];
#else
    return shared.token_scale[0][token];
#endif
}
__device__ __forceinline__ float scale_of_h(const Shared& shared, int slot) {
#if ACTIVATIONS == BF16
    return 1.0f;
#else
    return shared.h_scale[slot];
#endif
}

// A token's rows of this block's tiles, in the order of its slots. A lane has two tokens and two rows, whose slots it goes
// through side by side: this is what the launch ends with, and nothing else hides how long shared memory takes.
__device__ __forceinline__ void add_slots(const Arguments& arguments, const Shared& shared, int turn) {
    const int lane = threadIdx.x % 32, top_k = arguments.top_k, first = lane % 4 * 2;
    for (int i = turn, tile; (tile = blockIdx.x + i * gridDim.x) < L2::tiles; i += 2) {
        float sums[2][2] = {};
#pragma unroll 2
        for (int s = 0; s < top_k; s++)
#pragma unroll
            for (int t = 0; t < 2; t++) {
                const int slot = min(first + t, arguments.tokens - 1) * top_k + s;
                const bool is_here = shared.expert_of_slot[slot] >= 0;
                const float weight = shared.weight_after[slot];
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    const float weighted = __fmul_rn(shared.rows[i][slot][lane / 4 + 8 * h], weight);  // rounded first
                    sums[t][h] = is_here ? __fadd_rn(sums[t][h], weighted) : sums[t][h];
                }
            }
#pragma unroll
        for (int t = 0; t < 2; t++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int token = first + t, row = lane / 4 + 8 * h;
                if (token >= arguments.tokens) continue;
                if (arguments.shared.gate_up) sums[t][h] += shared.rows[i][arguments.tokens * top_k + token][row];
                store(arguments.y + (size_t)token * HIDDEN + tile * 16 + row, sums[t][h]);
            }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) routed_experts_decode(const __grid_constant__ Arguments arguments) {
    extern __shared__ __align__(128) unsigned char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;  // so the compiler knows it is one
    if (threadIdx.x == 0) {
        make_pipeline(shared.pipeline);
        barrier_init(shared_address(&shared.has_groups), WARP_ARRIVALS);
        barrier_init(shared_address(&shared.has_scales), WARP_ARRIVALS);
#if ACTIVATIONS != BF16
        shared.groups_with_scales = shared.has_all_x = 0;
        for (int i = 0; i < TOKENS; i++) shared.amax[0][i] = 0;
#endif
        barriers_are_made();
    }
    __syncthreads();
    let_next_launch_begin();
    if (warp != PRODUCER) wait_for_launch_before();
    auto group_count = [&] {
        barrier_wait(shared_address(&shared.has_groups), 0);
        return shared.group_count;
    };

    if (warp >= CONSUMERS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 64;");
        if (warp == PRODUCER && lane == 0) {
            Ring<STAGES> ring;
            const Place always(arguments.shared);  // does not depend on what ran before; all else may
            auto produce_l1 = [&](const Place& place, int tile) {
                produce_tile<L1>(place.gate_up + (size_t)tile * L1::tile_bytes, place.of_l1(tile), shared.pipeline, ring);
            };
            auto produce_l2 = [&](const Place& place, int tile) {
                produce_tile<L2>(place.down + (size_t)tile * L2::tile_bytes, place.of_l2(tile), shared.pipeline, ring);
            };
            for (int tile = blockIdx.x; always.gate_up && tile < L1::tiles; tile += gridDim.x) produce_l1(always, tile);
            const int groups = group_count();
            each_tile(groups, [&](int group, int tile, int) {
                if (!always.gate_up || group) produce_l1(shared.groups[group].place, tile);
            });
            for (int group = 0; group < groups; group++)
                for (int tile = blockIdx.x; tile < L2::tiles; tile += gridDim.x) produce_l2(shared.groups[group].place, tile);
        } else if (warp == REDUCER || warp == COPIER) {  // two, who take turns with tiles
            const int turn = warp == COPIER;
            if (turn) find_groups(arguments, shared);
            const int token = lane % 4 * 2, row = lane / 4, groups = group_count();
            Box& box = arguments.mailbox->boxes[shared.box];
            barrier_wait(shared_address(&shared.has_scales), 0);
            Ring<2> partial;
            each_tile(groups, [&](int group, int tile, int) {
                const Ring<2> this_one = partial;
                partial.next();
                if (this_one.slot != turn) return;
                const Group& of = shared.groups[group];
                const float2 units = units_of(of.place.of_l1(tile));
                const float4 sum = reduce_tile(shared.pipeline, this_one);
                float h[2];
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const int slot = of.slots[token + i];
                    const float gate = (i ? sum.y : sum.x) * units.x, up = (i ? sum.w : sum.z) * units.y;
                    const float scale = scale_of_x(shared, slot, token + i);
                    h[i] = swiglu(gate * (scale * of.gate_scale), up * (scale * of.up_scale), arguments.limit);
                    if (slot != NOBODY) h[i] *= shared.weight_of_slot[slot];
                }
#if ACTIVATIONS == BF16
                post_h(tile, of.slots, h, box);
#else
                post_whole_h(tile, of.slots, h, box);
#endif
            });
            for (int group = 0; group < groups; group++) {
                const Group& of = shared.groups[group];
#if ACTIVATIONS != BF16 && ACTIVATIONS != STATIC
                while ((int)load_acquire(shared_address(&shared.groups_with_scales)) <= group);
#endif
                for (int tile = blockIdx.x, n = 0; tile < L2::tiles; tile += gridDim.x, n++, partial.next()) {
                    if (partial.slot != turn) continue;
                    const float2 units = units_of(of.place.of_l2(tile));
                    const float4 sum = reduce_tile(shared.pipeline, partial);
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        const int slot = of.slots[token + i];
                        if (slot == NOBODY) continue;
                        const float scale = scale_of_h(shared, slot) * of.down_scale;
                        shared.rows[n][slot][row] = (i ? sum.y : sum.x) * units.x * scale;
                        shared.rows[n][slot][row + 8] = (i ? sum.w : sum.z) * units.y * scale;
                    }
                }
            }
            sync_threads(2, 64);  // the other one's rows are there
            add_slots(arguments, shared, turn);
            // This block has a word of each; with no group it has not, but then nothing was handed over.
            if (groups && blockIdx.x == 0 && lane == 0 && !turn) {
                arguments.mailbox->launches = 1 - shared.box;
                arguments.mailbox->rows[shared.box] = arguments.tokens * (arguments.top_k + 1);
            }
        } else if (warp == ENTERER) {
            const int groups = group_count();
            Box& box = arguments.mailbox->boxes[shared.box];
#if ACTIVATIONS == STATIC
            barrier_wait(shared_address(&shared.has_scales), 0);
            if (groups) post_x_of_slots(arguments, shared, box);
#endif
            if (groups) empty_rows(shared.rows_before, arguments.mailbox->boxes[1 - shared.box]);
#if ACTIVATIONS != BF16
            enter_h(groups, shared, box);
#endif
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 104;");
        Decoder decoder(shared.pipeline);
        Reader reader;
        Ring<2> partial;
        auto nothing = [](int) {};
#if ACTIVATIONS == BF16 || ACTIVATIONS == E4M3
        {
            Fragment fragments[L1::stages];
#if ACTIVATIONS == BF16
            enter_bf16<L1>(arguments.x, arguments.tokens, fragments);
#else
            enter_x(arguments, shared, fragments);
#endif
            each_tile(group_count(), [&](int, int, int) {
                consume_tile<L1>(warp, shared.pipeline, decoder, reader, partial, fragments, nothing);
            });
        }
#else
        {
            Box& box = arguments.mailbox->boxes[launch_number(*arguments.mailbox) % 2];
            post_x(arguments, shared, box, group_count);
            multiply_entered(group_count(), warp, arguments.tokens, shared, box, decoder, reader, partial);
        }
#endif
        const int groups = shared.group_count;
        const Box& box = arguments.mailbox->boxes[shared.box];
        auto inbox_of = [&](int group) { return Inbox<L2, true>(box.h[slot_read(shared.groups[group], lane / 4)]); };
        Fragment fragments[L2::stages], upcoming[L2::stages];
        if (groups) inbox_of(0).look_at_all(upcoming);
        for (int group = 0; group < groups; group++) {
#pragma unroll
            for (int stage = 0; stage < L2::stages; stage++) fragments[stage] = upcoming[stage];
            if (group + 1 < groups) inbox_of(group + 1).look_at_all(upcoming);
            inbox_of(group).await_all(fragments, shared.groups[group].asker);
            for (int tile = blockIdx.x; tile < L2::tiles; tile += gridDim.x)
                consume_tile<L2>(warp, shared.pipeline, decoder, reader, partial, fragments, nothing);
        }
    }
}
