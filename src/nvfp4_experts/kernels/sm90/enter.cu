// SPDX-License-Identifier: Apache-2.0
// Activations into NVFP4 values in front of gemm.cu: a = e2m1(x / scales) * block scale as bf16, exact;
// formats/activations.py says how, bit for bit. One block of threads a row; a thread takes 16 values at a time.
//
// Floor: x read once (per token: twice, the second time from cache), 2 bytes written per value.
// Compiled with -D: ACTIVATIONS (1 static, 2 dynamic, 3 per token), ELEMENT (0 bf16, 1 fp16, 2 fp32).

#include "common.cuh"
#include "async.cuh"

#define STATIC 1
#define DYNAMIC 2

constexpr int THREADS = 256;

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

__device__ __forceinline__ u32 largest_of(const Element* x, long long blocks, long long first, long long step) {
    u32 largest = 0;
    for (long long i = first; i < blocks; i += step) {
        float v[16];
        unpack16(load16(x + i * 16), v);
        largest = max(largest, amax16(v));
    }
    return largest;
}

// One value a block of threads, for enter_nvfp4 to take the largest of.
extern "C" __global__ void __launch_bounds__(THREADS) amax_partials(const Element* __restrict__ x, long long blocks,
                                                                    u32* __restrict__ partials) {
    let_next_launch_begin();
    wait_for_launch_before();
    const long long first = (long long)blockIdx.x * THREADS + threadIdx.x, step = (long long)gridDim.x * THREADS;
    const u32 largest = largest_of_block(largest_of(x, blocks, first, step));
    if (threadIdx.x == 0) partials[blockIdx.x] = largest;
}

// static_scale: (), for STATIC; partials (THREADS,): for DYNAMIC. scales: what the values are in units of, () or (rows,).
extern "C" __global__ void __launch_bounds__(THREADS)
    enter_nvfp4(const Element* __restrict__ x, int columns, const float* __restrict__ static_scale,
                const u32* __restrict__ partials, float* __restrict__ scales, uint4* __restrict__ values) {
    let_next_launch_begin();
    wait_for_launch_before();
    const int row = blockIdx.x, blocks = columns / 16;
    const Element* from = x + (size_t)row * columns;
    float g, s;
#if ACTIVATIONS == STATIC
    s = __ldcg(static_scale), g = __frcp_rn(s);
#elif ACTIVATIONS == DYNAMIC
    global_scales_of_amax(largest_of_block(__ldcg(partials + threadIdx.x)), g, s);
    if (row == 0 && threadIdx.x == 0) *scales = s;
#else
    global_scales_of_amax(largest_of_block(largest_of(from, blocks, threadIdx.x, THREADS)), g, s);
    if (threadIdx.x == 0) scales[row] = s;
#endif
    for (int i = threadIdx.x; i < blocks; i += THREADS) {
        float v[16];
        unpack16(load16(from + i * 16), v);
        quantize_block(v, g, s);
        uint4* to = values + ((size_t)row * blocks + i) * 2;
        to[0] = make_uint4(bf16_pair(v[0], v[1]), bf16_pair(v[2], v[3]), bf16_pair(v[4], v[5]), bf16_pair(v[6], v[7]));
        to[1] = make_uint4(bf16_pair(v[8], v[9]), bf16_pair(v[10], v[11]), bf16_pair(v[12], v[13]), bf16_pair(v[14], v[15]));
    }
}
