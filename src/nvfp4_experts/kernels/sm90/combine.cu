// SPDX-License-Identifier: Apache-2.0
// Each token's rows added up, in the order of its slots; row_of_slot is -1 where the slot has none.
//
//   y[t] = ((0 + row of slot 0) + row of slot 1) + ... [+ addend[t]]        fp32, rounded once
//
// Floor: rows and addend read once, y written once.
// Compiled with -D: RESULT (of y: 0 bf16, 1 fp16, 2 fp32).

#include "common.cuh"
#include "async.cuh"
#include "slots.cuh"

constexpr int THREADS = 256;

// rows (.., hidden), addend (tokens, hidden) or null; four columns a thread, gridDim.x / tokens blocks a token.
extern "C" __global__ void __launch_bounds__(THREADS)
    add_slots(const float4* __restrict__ rows, const int* __restrict__ row_of_slot, const float4* __restrict__ addend,
              int top_k, int hidden, Result* __restrict__ y) {
    let_next_launch_begin();
    const int pieces = hidden / 4, along = (pieces + THREADS - 1) / THREADS;
    const int token = blockIdx.x / along, i = blockIdx.x % along * THREADS + threadIdx.x;
    wait_for_launch_before();
    if (i >= pieces) return;
    float4 sum = {0, 0, 0, 0};
    auto add = [&](float4 more) { sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w; };
    slots_of(row_of_slot, top_k, token).each_few([&](const int(&found)[FEW_SLOTS]) {
        float4 of_slot[FEW_SLOTS];
#pragma unroll
        for (int n = 0; n < FEW_SLOTS; n++)
            if (found[n] >= 0) of_slot[n] = __ldcg(rows + (size_t)found[n] * pieces + i);
#pragma unroll
        for (int n = 0; n < FEW_SLOTS; n++)
            if (found[n] >= 0) add(of_slot[n]);
    });
    if (addend) add(__ldcg(addend + (size_t)token * pieces + i));
    Result* to = y + ((size_t)token * pieces + i) * 4;
    store(to, sum.x), store(to + 1, sum.y), store(to + 2, sum.z), store(to + 3, sum.w);
}
