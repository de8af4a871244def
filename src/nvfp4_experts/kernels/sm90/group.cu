// SPDX-License-Identifier: Apache-2.0
// Slots of routed experts by expert. A slot is one of the top_k choices of a token; rows are slots, expert by expert; a
// tile is `tile_rows` rows of one expert at most, and an expert's tiles are as long as one another, to the next 8 (the step
// of wgmma's widths). In which order an expert's rows lie is left to chance: they do not know of each other. Every block
// counts all slots and places those of its experts: nobody waits for another.
//
// Floor: latency, of the indices asked for twice and a scan over the experts.
// Compiled with -D: INDEX (0 int32, 1 int64).

#include "common.cuh"
#include "async.cuh"

#if INDEX == 1
typedef long long Index;
#else
typedef int Index;
#endif

constexpr int THREADS = 1024, EACH = 8;

// This thread's value and those of all before it; `all` is the sum.
__device__ __forceinline__ int2 sum_up_to(int2 value, int2& all) {
    __shared__ int2 of_warp[THREADS / 32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    auto scan = [&](int2 v) {
#pragma unroll
        for (int i = 1; i < 32; i *= 2) {
            const int x = __shfl_up_sync(~0u, v.x, i), y = __shfl_up_sync(~0u, v.y, i);
            if (lane >= i) v.x += x, v.y += y;
        }
        return v;
    };
    value = scan(value);
    if (lane == 31) of_warp[warp] = value;
    __syncthreads();
    if (warp == 0) of_warp[lane] = scan(of_warp[lane]);
    __syncthreads();
    all = of_warp[THREADS / 32 - 1];
    if (warp > 0) value.x += of_warp[warp - 1].x, value.y += of_warp[warp - 1].y;
    return value;
}

// Calls visit(slot, expert) for each slot of an expert that is here, and skip(slot) for the others.
template <class Visit, class Skip>
__device__ __forceinline__ void each_slot(const Index* indices, int slots, int experts, Visit visit, Skip skip) {
    for (int first = 0; first < slots; first += THREADS * EACH) {
        Index found[EACH];
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int slot = first + i * THREADS + threadIdx.x;
            found[i] = slot < slots ? __ldcg(indices + slot) : -1;
        }
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int slot = first + i * THREADS + threadIdx.x;
            if (found[i] >= 0 && found[i] < experts)
                visit(slot, (int)found[i]);
            else if (slot < slots)
                skip(slot);
        }
    }
}

// counts: [0] tiles, [1] rows. weights: of slots. amax (experts,): set to zero; or null.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    group_slots(const Index* __restrict__ indices, const float* __restrict__ weights, int slots, int experts,
                int tile_rows, int* __restrict__ counts, int4* __restrict__ tiles, int* __restrict__ row_of_slot,
                int* __restrict__ expert_of_row, float* __restrict__ weight_of_row, u32* __restrict__ amax) {
    extern __shared__ int next_row[];  // of each expert; first, how many rows it has
    let_next_launch_begin();
    for (int i = threadIdx.x; i < experts; i += THREADS) next_row[i] = 0;
    __syncthreads();
    wait_for_launch_before();
    each_slot(indices, slots, experts, [&](int, int expert) { atomicAdd(&next_row[expert], 1); }, [](int) {});
    __syncthreads();
    int2 before = {0, 0};
    for (int first = 0; first < experts; first += THREADS) {
        const int expert = first + threadIdx.x, count = expert < experts ? next_row[expert] : 0;
        const int blocks = (count + tile_rows - 1) / tile_rows, even = (count + 8 * blocks - 1) / max(8 * blocks, 1) * 8;
        int2 all;
        const int2 sums = sum_up_to(make_int2(count, blocks), all);
        const int row = before.x + sums.x - count, tile = before.y + sums.y - blocks;
        const bool is_mine = expert % gridDim.x == blockIdx.x;
        for (int i = 0; i < blocks && is_mine; i++)
            tiles[tile + i] = make_int4(expert, row + i * even, min(row + count, row + (i + 1) * even), 0);
        if (expert < experts) {
            next_row[expert] = row;
            if (amax && is_mine) amax[expert] = 0;
        }
        before.x += all.x, before.y += all.y;
        __syncthreads();
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) counts[0] = before.y, counts[1] = before.x;
    each_slot(
        indices, slots, experts,
        [&](int slot, int expert) {
            if (expert % gridDim.x != blockIdx.x) return;
            const int row = atomicAdd(&next_row[expert], 1);
            row_of_slot[slot] = row;
            expert_of_row[row] = expert, weight_of_row[row] = __ldcg(weights + slot);
        },
        [&](int slot) {
            if (blockIdx.x == 0) row_of_slot[slot] = -1;
        });
}
