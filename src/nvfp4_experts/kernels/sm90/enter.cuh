// SPDX-License-Identifier: Apache-2.0
// What the kernels that bring activations into NVFP4 in front of gemm.cu share. A thread takes 8 values at a time, half a
// block of 16; its neighbour has the other half. Blocks of threads lie along a row, gridDim.y of them.

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

__device__ __forceinline__ uint4 bf16_of(const float (&v)[VALUES]) {
    return make_uint4(bf16_pair(v[0], v[1]), bf16_pair(v[2], v[3]), bf16_pair(v[4], v[5]), bf16_pair(v[6], v[7]));
}

// A row quantised with the global scales g and s, piece by piece: write(i, piece). v: this thread's first of `from`, loaded
// before the scales were known.
template <class Write>
__device__ __forceinline__ void quantize_pieces(const Element* from, float (&v)[VALUES], int pieces, float g, float s,
                                                Write write) {
    const int lane = threadIdx.x % 32;
    for (int i = blockIdx.y * THREADS + threadIdx.x; i - lane < pieces;) {  // the same for all of a warp
        const u32 mine = amax_of(v);
        const BlockScale block = block_scale(max(mine, __shfl_xor_sync(~0u, mine, 1)), g, s);
#pragma unroll
        for (int e = 0; e < VALUES; e++) v[e] = quantize_value(v[e], block);
        if (i < pieces) write(i, bf16_of(v));
        i += gridDim.y * THREADS;
        if (i < pieces) load8(from + i * VALUES, v);
    }
}
