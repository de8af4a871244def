// SPDX-License-Identifier: Apache-2.0
// Each token's rows added up, in the order of its slots; row_of_slot is -1 where the slot has none.
//
//   y[t] = ((0 + row of slot 0) + row of slot 1) + ... [+ addend[t]]        fp32, rounded once
//
// Floor: rows and addend read once, y written once.
// Compiled with -D: RESULT (of y: 0 bf16, 1 fp16, 2 fp32).

#include "common.cuh"
#include "async.cuh"

constexpr int THREADS = 256;

// rows (.., hidden), addend (tokens, hidden) or null; four columns a thread.
extern "C" __global__ void __launch_bounds__(THREADS)
    add_slots(const float4* __restrict__ rows, const int* __restrict__ row_of_slot, const float4* __restrict__ addend,
              int top_k, int hidden, Result* __restrict__ y) {
    let_next_launch_begin();
    const int token = blockIdx.x, pieces = hidden / 4, i = blockIdx.y * THREADS + threadIdx.x;
    wait_for_launch_before();
    if (i >= pieces) return;
    float4 sum = {0, 0, 0, 0};
    auto add = [&](const float4* from) {
        const float4 more = __ldcg(from + i);
        sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
    };
#pragma unroll 4
    for (int slot = 0; slot < top_k; slot++) {
        const int row = __ldcg(row_of_slot + token * top_k + slot);
        if (row >= 0) add(rows + (size_t)row * pieces);
    }
    if (addend) add(addend + (size_t)token * pieces);
    Result* to = y + ((size_t)token * pieces + i) * 4;
    store(to, sum.x), store(to + 1, sum.y), store(to + 2, sum.z), store(to + 3, sum.w);
}
