// SPDX-License-Identifier: Apache-2.0
// Activations into NVFP4 values in front of gemm.cu: a = e2m1(x / scales) * block scale as bf16, exact;
// formats/activations.py says how, bit for bit.
//
// Floor: x read once (per token: twice, the second time from cache), 2 bytes written per value.
// Compiled with -D: ACTIVATIONS (1 static, 2 dynamic, 3 per token), ELEMENT (0 bf16, 1 fp16, 2 fp32).

#include "common.cuh"
#include "async.cuh"

#define STATIC 1
#define DYNAMIC 2

#include "enter.cuh"

// One value a block of threads, for enter_nvfp4 to take the largest of.
extern "C" __global__ void __launch_bounds__(THREADS) amax_partials(const Element* __restrict__ x, long long pieces,
                                                                    u32* __restrict__ partials) {
    let_next_launch_begin();
    wait_for_launch_before();
    const long long first = (long long)blockIdx.x * THREADS + threadIdx.x, step = (long long)gridDim.x * THREADS;
    const u32 largest = largest_of_block(largest_of(x, pieces, first, step));
    if (threadIdx.x == 0) partials[blockIdx.x] = largest;
}

// static_scale: (), for STATIC; partials (THREADS,): for DYNAMIC. scales: what the values are in units of, () or (rows,).
extern "C" __global__ void __launch_bounds__(THREADS)
    enter_nvfp4(const Element* __restrict__ x, int columns, const float* __restrict__ static_scale,
                const u32* __restrict__ partials, float* __restrict__ scales, uint4* __restrict__ values) {
    let_next_launch_begin();
    wait_for_launch_before();
    const int row = blockIdx.x, pieces = columns / VALUES;
    const Element* from = x + (size_t)row * columns;
    const int i = blockIdx.y * THREADS + threadIdx.x;
    float v[VALUES] = {}, g, s;
    if (i < pieces) load8(from + i * VALUES, v);  // while the scales are on their way
#if ACTIVATIONS == STATIC
    s = __ldcg(static_scale), g = __frcp_rn(s);
#elif ACTIVATIONS == DYNAMIC
    global_scales_of_amax(largest_of_block(__ldcg(partials + threadIdx.x)), g, s);
    if (row == 0 && blockIdx.y == 0 && threadIdx.x == 0) *scales = s;
#else
    global_scales_of_amax(largest_of_block(largest_of(from, pieces, threadIdx.x, THREADS)), g, s);
    if (blockIdx.y == 0 && threadIdx.x == 0) scales[row] = s;
#endif
    uint4* to = values + (size_t)row * pieces;
    quantize_pieces(from, v, pieces, g, s, [=](int i, uint4 piece) { to[i] = piece; });
}
