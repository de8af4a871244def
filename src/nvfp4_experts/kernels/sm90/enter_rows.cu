// SPDX-License-Identifier: Apache-2.0
// Activations of routed experts in front of gemm.cu. Row t of x is read once and written for each of its slots, to the rows
// row_of_slot[t * top_k ..] (-1: of no expert here); without such a list, to row t, of counts[1] rows. As bf16, or as NVFP4
// values a = e2m1(x / scales) * block scale, exact in bf16; formats/activations.py says how, bit for bit.
//
// Why rows are copied, and not gathered on their way into the tensor cores: docs/decisions.md.
//
// Floor: x read once, 2 bytes written per value and row.
// Compiled with -D: SCALE (0: bf16 as it is; else whose global scale: 1 static, of each expert, 2 the amax of all of x, in
// partials, 3 that of the row, 4 that of each expert's rows), ELEMENT (0 bf16, 1 fp16, 2 fp32).

#include "common.cuh"
#include "async.cuh"

#define NONE 0
#define STATIC 1
#define OF_ALL 2
#define OF_ROW 3
#define OF_EXPERT 4

#include "enter.cuh"
#include "slots.cuh"

// amax (experts,): of the rows of each; zero at first.
extern "C" __global__ void __launch_bounds__(THREADS)
    amax_of_experts(const Element* __restrict__ x, int columns, const int* __restrict__ counts,
                    const int* __restrict__ expert_of_row, u32* __restrict__ amax) {
    let_next_launch_begin();
    wait_for_launch_before();
    const int row = blockIdx.x, pieces = columns / VALUES;
    if (row >= __ldcg(counts + 1)) return;
    const u32 largest = largest_of_block(largest_of(x + (size_t)row * columns, pieces, threadIdx.x, THREADS));
    if (threadIdx.x == 0) atomicMax(amax + __ldcg(expert_of_row + row), largest);
}

// static_scale (experts,): STATIC; amax: (THREADS,) partials of OF_ALL, (experts,) of OF_EXPERT, whose rows are x's own.
// scales: what values are in units of: (), (rows,) or (experts,); STATIC: not written. top_k: 1 without row_of_slot.
extern "C" __global__ void __launch_bounds__(THREADS)
    enter_rows(const Element* __restrict__ x, int columns, const int* __restrict__ counts,
               const int* __restrict__ expert_of_row, const int* __restrict__ row_of_slot, int top_k,
               const float* __restrict__ static_scale, const u32* __restrict__ amax, float* __restrict__ scales,
               uint4* __restrict__ values) {
    let_next_launch_begin();
    wait_for_launch_before();
    const int row = blockIdx.x, pieces = columns / VALUES, first = blockIdx.y * THREADS + threadIdx.x;
    if (!row_of_slot && row >= __ldcg(counts + 1)) return;
    const Element* from = x + (size_t)row * columns;
    const Slots slots(row_of_slot, top_k, row);
    auto write_all = [=](int i, uint4 piece) { slots.each([=](int to) { values[(size_t)to * pieces + i] = piece; }); };
    float v[VALUES] = {};
    if (first < pieces) load8(from + first * VALUES, v);  // while the scales are on their way
#if SCALE == NONE
    if (first < pieces) write_all(first, bf16_of(v));
#elif SCALE == STATIC
    slots.each_few([&](const int(&rows)[FEW_SLOTS]) {
        float s[FEW_SLOTS];
#pragma unroll
        for (int n = 0; n < FEW_SLOTS; n++) s[n] = rows[n] >= 0 ? __ldcg(static_scale + __ldcg(expert_of_row + rows[n])) : 0.0f;
#pragma unroll
        for (int n = 0; n < FEW_SLOTS; n++) {
            if (rows[n] < 0) continue;
            float copy[VALUES];
#pragma unroll
            for (int e = 0; e < VALUES; e++) copy[e] = v[e];
            uint4* to = values + (size_t)rows[n] * pieces;
            quantize_pieces(from, copy, pieces, __frcp_rn(s[n]), s[n], [=](int i, uint4 piece) { to[i] = piece; });
        }
    });
#else
    const bool writes = blockIdx.y == 0 && threadIdx.x == 0;
    float g, s;
#if SCALE == OF_ALL
    global_scales_of_amax(largest_of_block(__ldcg(amax + threadIdx.x)), g, s);
    if (row == 0 && writes) *scales = s;
#elif SCALE == OF_ROW
    global_scales_of_amax(largest_of_block(largest_of(from, pieces, threadIdx.x, THREADS)), g, s);
    if (writes) slots.each([=](int to) { scales[to] = s; });
#else
    const int expert = __ldcg(expert_of_row + row);
    global_scales_of_amax(__ldcg(amax + expert), g, s);
    if (writes) scales[expert] = s;  // all rows of an expert write the same
#endif
    quantize_pieces(from, v, pieces, g, s, write_all);
#endif
}
