// SPDX-License-Identifier: Apache-2.0
// What follows the sums of gemm.cu: scales, SwiGLU, the result's format, and its way to memory. Included there, where
// Arguments, Rows and Shared are.

__device__ __forceinline__ u32 transposed(u32 pair) {
    u32 result;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(pair));
    return result;
}

// Eight rows by eight tokens, v[e] of row g and token 2 c + e, to out[token][row]: a lane writes rows 2 c, 2 c + 1 of token g.
__device__ __forceinline__ void store_8x8(void* out, size_t stride, int row, int token, int tokens, float v0, float v1) {
    const int lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
#if OUT == FP32
    float* to = reinterpret_cast<float*>(out) + (token + 2 * c) * stride + row + g;
    if (token + 2 * c < tokens) to[0] = v0;
    if (token + 2 * c + 1 < tokens) to[stride] = v1;
#else
#if OUT == FP16
    u32 pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(v1), "f"(v0));
#else
    u32 pair = bf16_pair(v0, v1);
#endif
    pair = transposed(pair);
    if (token + g < tokens) reinterpret_cast<u32*>(reinterpret_cast<u16*>(out) + (token + g) * stride + row)[c] = pair;
#endif
}

#if OUT == NVFP4
// One round of finding the largest |.| over the lanes of a column, the rows g of token c: a lane hands half of its values
// to the lane at `distance` and takes the larger of the other half. Which half it keeps is the bit of its g.
template <int VALUES>
__device__ __forceinline__ void halve(u32 (&values)[8], int distance) {
    const bool upper = threadIdx.x & distance;
#pragma unroll
    for (int i = 0; i < VALUES / 2; i++) {
        const u32 got = __shfl_xor_sync(~0u, upper ? values[i] : values[i + VALUES / 2], distance);
        values[i] = max(upper ? values[i + VALUES / 2] : values[i], got);
    }
}

// h to NVFP4 values. A block of 16 channels is that of two neighbouring warps. Of 32 tokens at a time, each lane finds the
// largest value and the scale of one, for all lanes of its warp to take.
__device__ __forceinline__ void quantize_share(float s, Shared& shared, float (&h)[SHARE * 4]) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, c = lane % 4;
    const float g = __frcp_rn(s);
#pragma unroll
    for (int first = 0; first < SHARE; first += 4) {
        u32 largest[8];  // [4 e + i]: of token 8 i + 2 c + e
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int e = 0; e < 2; e++)
                largest[4 * e + i] = first + i < SHARE ? __float_as_uint(h[4 * (first + i) + e]) & 0x7FFFFFFFu : 0;
        halve<8>(largest, 16), halve<4>(largest, 8), halve<2>(largest, 4);
        // This lane's: e is the upper bit of its row g, i the two others.
        const int token = lane / 4 % 4 * 8 + 2 * c + lane / 16;
        shared.amax[warp][token] = largest[0];
        sync_threads(2 + warp / 2, 64);
        const BlockScale block = block_scale(max(largest[0], shared.amax[warp ^ 1][token]), g, s);
        shared.block_scales[warp][token] = make_float2(block.scale, block.inverse);
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 4 && first + i < SHARE; i++) {
            const float4 scales = reinterpret_cast<const float4*>(&shared.block_scales[warp][8 * i])[c];
            float* of_group = h + 4 * (first + i);
            of_group[0] = quantize_value(of_group[0], {scales.x, scales.y});
            of_group[1] = quantize_value(of_group[1], {scales.z, scales.w});
        }
        sync_threads(2 + warp / 2, 64);  // both have read
    }
}
#endif

__device__ __forceinline__ float scale_of(const Arguments& arguments, int token, int end) {
    return arguments.scaling == SCALE_OF_TOKEN && token < end ? __ldcg(arguments.token_scales + token) : 1.0f;
}

__device__ __forceinline__ float weight_of(const Arguments& arguments, int token, int end) {
#if GROUPED
    if (arguments.row_weights && token < end) return __ldcg(arguments.row_weights + token);
#endif
    return 1.0f;
}

// Scales, SwiGLU and the result's format for 16 rows from `row` and the tokens [first_token, end_token).
__device__ __forceinline__ void finish(const Arguments& arguments, const Rows& rows, float hidden_scale, int row,
                                       int first_token, int end_token, Shared& shared, float (&sums)[SHARE * 4]) {
    constexpr float UNPACKED_SUM = FP8 ? 1.0f : UNPACKED;
    const int c = threadIdx.x % 4;
#if GATE_UP
#pragma unroll
    for (int i = 0; i < SHARE; i++) {
        if (GROUPED && first_token + 8 * i >= end_token) break;
#pragma unroll
        for (int e = 0; e < 2; e++) {
            const int token = first_token + 8 * i + 2 * c + e;
            const float scale = scale_of(arguments, token, end_token);
            const float gate = sums[4 * i + e] * UNPACKED_SUM, up = sums[4 * i + 2 + e] * UNPACKED_SUM;
            sums[4 * i + e] = swiglu(gate * (scale * rows.factors[0]), up * (scale * rows.factors[1]), arguments.limit) *
                              weight_of(arguments, token, end_token);
        }
    }
#if OUT == NVFP4
    quantize_share(hidden_scale, shared, sums);
#endif
    if (row >= arguments.rows) return;
#pragma unroll
    for (int i = 0; i < SHARE; i++)
        store_8x8(arguments.out, arguments.stride, row / 2, first_token + 8 * i, end_token, sums[4 * i], sums[4 * i + 1]);
#else
    if (row >= arguments.rows) return;
#pragma unroll
    for (int i = 0; i < SHARE; i++) {
        const int token = first_token + 8 * i, mine = token + 2 * c;
        if (GROUPED && token >= end_token) break;
        const float scale_0 = scale_of(arguments, mine, end_token), scale_1 = scale_of(arguments, mine + 1, end_token);
        const float weight_0 = weight_of(arguments, mine, end_token), weight_1 = weight_of(arguments, mine + 1, end_token);
#pragma unroll
        for (int h = 0; h < 2; h++)
            store_8x8(arguments.out, arguments.stride, row + 8 * h, token, end_token,
                      sums[4 * i + 2 * h] * UNPACKED_SUM * (scale_0 * rows.factors[h]) * weight_0,
                      sums[4 * i + 2 * h + 1] * UNPACKED_SUM * (scale_1 * rows.factors[h]) * weight_1);
    }
#endif
}
