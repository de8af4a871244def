// SPDX-License-Identifier: Apache-2.0
// Activations into NVFP4 values in front of gemm.cu: a = e2m1(x / scales) * block scale as bf16, exact;
// formats/activations.py says how, bit for bit. A thread takes 8 values at a time, half a block of 16; its neighbour has
// the other half. Blocks of threads lie along a row, gridDim.y of them.
//
// Floor: x read once (per token: twice, the second time from cache), 2 bytes written per value.
// Compiled with -D: ACTIVATIONS (1 static, 2 dynamic, 3 per token), ELEMENT (0 bf16, 1 fp16, 2 fp32).

#include "common.cuh"
#include "async.cuh"

#define STATIC 1
#define DYNAMIC 2

constexpr int THREADS = 256, VALUES = 8;

// The largest of all threads' values, in every thread.
__device__ __forceinline__ u32 largest_of_block(u32 largest) {
    __shared__ u32 of_warp[THREADS / 32];
#pragma unroll
    for (int i = 1; i < 32; i *= 2) largest = max(largest, __shfl_xor_sync(~0u, largest, i));
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = largest;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < THREADS / 32; i++) largest = max(largest, of_warp[i]);
    return largest;
}

__device__ __forceinline__ u32 amax_of(const float (&v)[VALUES]) {
    u32 largest = 0;
#pragma unroll
    for (int i = 0; i < VALUES; i++) largest = max(largest, __float_as_uint(v[i]) & 0x7FFFFFFFu);
    return largest;
}

__device__ __forceinline__ u32 largest_of(const Element* x, long long pieces, long long first, long long step) {
    u32 largest = 0;
    for (long long i = first; i < pieces; i += step) {
        float v[VALUES];
        load8(x + i * VALUES, v);
        largest = max(largest, amax_of(v));
    }
    return largest;
}

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
    const int lane = threadIdx.x % 32;
    int i = blockIdx.y * THREADS + threadIdx.x;
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
    while (i - lane < pieces) {  // the same for all of a warp
        const u32 mine = amax_of(v);
        const BlockScale block = block_scale(max(mine, __shfl_xor_sync(~0u, mine, 1)), g, s);
#pragma unroll
        for (int e = 0; e < VALUES; e++) v[e] = quantize_value(v[e], block);
        if (i < pieces)
            values[(size_t)row * pieces + i] =
                make_uint4(bf16_pair(v[0], v[1]), bf16_pair(v[2], v[3]), bf16_pair(v[4], v[5]), bf16_pair(v[6], v[7]));
        i += gridDim.y * THREADS;
        if (i < pieces) load8(from + i * VALUES, v);
    }
}
