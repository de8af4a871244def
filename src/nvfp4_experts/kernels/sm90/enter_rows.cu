// SPDX-License-Identifier: Apache-2.0
// Activations of routed experts in front of gemm.cu: row r, of the expert expert_of_row[r], is row gather[r] of x, or r
// where there is no such list; counts[1] of them. As bf16, or as NVFP4 values a = e2m1(x / scales) * block scale, exact in
// bf16; formats/activations.py says how, bit for bit.
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

// static_scale (experts,): STATIC; amax: (THREADS,) partials of OF_ALL, (experts,) of OF_EXPERT. scales: what values are in
// units of: (), (rows,) or (experts,); STATIC: not written.
extern "C" __global__ void __launch_bounds__(THREADS)
    enter_rows(const Element* __restrict__ x, int columns, const int* __restrict__ counts,
               const int* __restrict__ expert_of_row, const int* __restrict__ gather, const float* __restrict__ static_scale,
               const u32* __restrict__ amax, float* __restrict__ scales, uint4* __restrict__ values) {
    let_next_launch_begin();
    wait_for_launch_before();
    const int row = blockIdx.x, pieces = columns / VALUES, i = blockIdx.y * THREADS + threadIdx.x;
    if (row >= __ldcg(counts + 1)) return;
    const Element* from = x + (size_t)(gather ? __ldcg(gather + row) : row) * columns;
    uint4* to = values + (size_t)row * pieces;
    float v[VALUES] = {};
    if (i < pieces) load8(from + i * VALUES, v);  // while the scales are on their way
#if SCALE == NONE
    if (i < pieces)
        to[i] = make_uint4(bf16_pair(v[0], v[1]), bf16_pair(v[2], v[3]), bf16_pair(v[4], v[5]), bf16_pair(v[6], v[7]));
#else
    float g, s;
    const bool writes = blockIdx.y == 0 && threadIdx.x == 0;
#if SCALE == STATIC
    s = __ldcg(static_scale + __ldcg(expert_of_row + row)), g = __frcp_rn(s);
#elif SCALE == OF_ALL
    global_scales_of_amax(largest_of_block(__ldcg(amax + threadIdx.x)), g, s);
    if (row == 0 && writes) *scales = s;
#elif SCALE == OF_ROW
    global_scales_of_amax(largest_of_block(largest_of(from, pieces, threadIdx.x, THREADS)), g, s);
    if (writes) scales[row] = s;
#else
    const int expert = __ldcg(expert_of_row + row);
    global_scales_of_amax(__ldcg(amax + expert), g, s);
    if (writes) scales[expert] = s;  // all rows of an expert write the same
#endif
    write_quantized(from, v, pieces, g, s, to);
#endif
}
