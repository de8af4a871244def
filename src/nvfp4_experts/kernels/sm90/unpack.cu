// SPDX-License-Identifier: Apache-2.0
// Packed fragments (layouts/fragments.py) to e4m3 rows for an FP8 GEMM, each rounded in units of its amax / 448, byte
// for byte as quantize_fp8_rows of formats/activations.py rounds the decoded row.
//
// A quad of lanes exchanges its words of a chunk, so that lane c holds block c of rows g and g + 8: 16 codes of a row
// under one scale, 16 bytes of the result. Such a block has 8 magnitudes. They are rounded once, into 8 bytes in two
// registers, and every code then picks its byte: a quarter of the multiplications and half of the conversions.
//
// Floor: 0.5625 bytes read and 1 written per weight. A warp writes 128 consecutive bytes of each of 16 rows.

#include "common.cuh"
#include "async.cuh"
#include "e4m3.cuh"

constexpr int COLUMNS = 64, CHUNKS_OF_WARP = 2, THREADS = 256;

// Four codes, a byte each with the magnitude in bits 0..2 of `index` and the sign in bit 7 of `signs`, as e4m3.
__device__ __forceinline__ u32 pick_bytes(Magnitudes table, u32 index, u32 signs) {
    const u32 pairs = index | index >> 4;  // two selectors each in bytes 0 and 2
    return pick(table, __byte_perm(pairs, 0, 0x4420), signs);
}

__device__ __forceinline__ float scale_of(u32 byte) { return to_float(Float16{(u16)(byte << 7)}); }  // times 2^7

__device__ __forceinline__ void swap(u32& a, u32& b) {
    const u32 kept = a;
    a = b, b = kept;
}

// Block c of a chunk is in words 2 (c / 2) and the next of all four lanes.
__device__ __forceinline__ void gather_words(uint4 codes, u32 (&first)[2][2], u32 (&second)[2][2]) {
    const bool upper = threadIdx.x & 2;
    first[0][0] = upper ? codes.z : codes.x, second[0][0] = upper ? codes.w : codes.y;
    first[1][0] = __shfl_xor_sync(~0u, upper ? codes.x : codes.z, 2);
    second[1][0] = __shfl_xor_sync(~0u, upper ? codes.y : codes.w, 2);
#pragma unroll
    for (int j = 0; j < 2; j++) {
        first[j][1] = __shfl_xor_sync(~0u, first[j][0], 1);
        second[j][1] = __shfl_xor_sync(~0u, second[j][0], 1);
    }
}

// The registers 4 `odd` .. 4 `odd` + 3 of two words; bits that are no code's stay in.
__device__ __forceinline__ void registers_of(bool odd, u32 first, u32 second, u32 (&pairs)[4]) {
    const u32 mixed = mixed_word(first, second);
    const u32 words[3] = {odd ? second : first, odd ? mixed : second, odd ? first : mixed};  // (i + 4) % 3 = (i + 1) % 3
#pragma unroll
    for (int q = 0; q < 4; q++) pairs[q] = __funnelshift_l(words[q % 3], words[q % 3], 2 * q + 8 * odd);
}

// Blocks of one y take one tile; packed: tiles of `chunks` chunks. Row i of a tile is row
//     split * tile + i % 8 + i / 8 * half
// of `values` and `scales`: split = 16, half = 8 is plain order; split = 8 takes interleaved gate and up apart, half
// rows from each other. row_amax (bf16) is likewise, with amax_half. global_scales: one, or gate's and up's.
// values: (rows, columns) e4m3; scales: (rows,), amax / 448 * global scale.
extern "C" __global__ void __launch_bounds__(THREADS)
    unpack_fragments(const unsigned char* __restrict__ packed, int chunks, int columns,
                     const BFloat16* __restrict__ row_amax, int amax_half, const float* __restrict__ global_scales,
                     int split, int half, unsigned char* __restrict__ values, float* __restrict__ scales) {
    __shared__ float inverses[16];
    let_next_launch_begin();
    const int tile = blockIdx.y, first_chunk = (blockIdx.x * (THREADS / 32) + threadIdx.x / 32) * CHUNKS_OF_WARP;
    const int lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
    auto row_of = [&](int i, int half) { return split * tile + i % 8 + i / 8 * half; };

    // Weights are there before any launch: they arrive while the launch in front of this one ends.
    uint4 codes[CHUNKS_OF_WARP];
    u32 scale_bytes[CHUNKS_OF_WARP][2];
#pragma unroll
    for (int i = 0; i < CHUNKS_OF_WARP; i++) {
        const int chunk = min(first_chunk + i, chunks - 1);
        const unsigned char* from = packed + ((size_t)tile * chunks + chunk) * CHUNK_BYTES;
        codes[i] = __ldcs(reinterpret_cast<const uint4*>(from) + lane);
#pragma unroll
        for (int h = 0; h < 2; h++) scale_bytes[i][h] = __ldcs(from + CODE_BYTES + 8 * g + 4 * h + c);
    }
    float amax;
    if (threadIdx.x < 16) {
        amax = amax_or_floor(to_float(row_amax[row_of(threadIdx.x, amax_half)]));
        inverses[threadIdx.x] = inverse_of(amax);
    }
    __syncthreads();
    wait_for_launch_before();  // it may still read what this launch writes
    if (blockIdx.x == 0 && threadIdx.x < 16) {
        const float global_scale = global_scales[split == 8 ? threadIdx.x / 8 : 0];
        scales[row_of(threadIdx.x, half)] = __fmul_rn(__fdiv_rn(amax, 448.0f), global_scale);
    }
    if (first_chunk >= chunks) return;  // a whole warp

#pragma unroll
    for (int i = 0; i < CHUNKS_OF_WARP; i++) {
        u32 first[2][2], second[2][2];  // the two words that hold this lane's block, [j][e] of lane c ^ (2 j + e)
        gather_words(codes[i], first, second);
        const Magnitudes table[2] = {magnitudes(scale_of(scale_bytes[i][0]), inverses[g]),
                                     magnitudes(scale_of(scale_bytes[i][1]), inverses[g + 8])};
        // Of lanes s, s + 1: columns 2 s .. 2 s + 3 of the block, and 8 more.
        const u32 low_bytes = c % 2 ? 0x2064 : 0x6420, high_bytes = c % 2 ? 0x3175 : 0x7531;
        u32 out[2][4];
#pragma unroll
        for (int j = 0; j < 2; j++) {
            u32 pairs[2][4];
#pragma unroll
            for (int e = 0; e < 2; e++) registers_of(c % 2, first[j][e], second[j][e], pairs[e]);
#pragma unroll
            for (int q = 0; q < 4; q++) {  // a byte a column: the sign and the exponent's upper bit; what is below
                const u32 low = __byte_perm(pairs[0][q], pairs[1][q], low_bytes);
                const u32 high = __byte_perm(pairs[0][q], pairs[1][q], high_bytes);
                out[q % 2][j + q / 2 * 2] = pick_bytes(table[q % 2], (high << 2 & 0x04040404u) | (low >> 6 & 0x03030303u), high);
            }
        }
        if (c >= 2) {  // j was the other half's
#pragma unroll
            for (int h = 0; h < 2; h++) swap(out[h][0], out[h][1]), swap(out[h][2], out[h][3]);
        }
        const int column = (first_chunk + i) * COLUMNS + c * 16;
        if (column < columns) {
#pragma unroll
            for (int h = 0; h < 2; h++)
                *reinterpret_cast<uint4*>(values + (size_t)row_of(g + 8 * h, half) * columns + column) =
                    make_uint4(out[h][0], out[h][1], out[h][2], out[h][3]);
        }
    }
}
