// SPDX-License-Identifier: Apache-2.0
// Packed weights (layouts/e4m3_fragments.py) to e4m3 rows for an FP8 GEMM, each rounded in units of its amax / 448, byte
// for byte as quantize_fp8_rows of formats/activations.py rounds the decoded row.
//
// Lane c has block c of rows g and g + 8: 16 codes of a row under one scale, 16 bytes of the result, the words that it
// would multiply by gemm.cu.
//
// Floor: 0.5625 bytes read and 1 written per weight. A warp writes 128 consecutive bytes of each of 16 rows.

#include "common.cuh"
#include "async.cuh"
#include "e4m3.cuh"

constexpr int COLUMNS = 64, CHUNKS_OF_WARP = 2, THREADS = 256;

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
    u32 scale_bytes[CHUNKS_OF_WARP];
#pragma unroll
    for (int i = 0; i < CHUNKS_OF_WARP; i++) {
        const int chunk = min(first_chunk + i, chunks - 1);
        const unsigned char* from = packed + ((size_t)tile * chunks + chunk) * CHUNK_BYTES;
        codes[i] = __ldcs(reinterpret_cast<const uint4*>(from) + lane);
        scale_bytes[i] = __ldcs(reinterpret_cast<const u16*>(from + CODE_BYTES) + lane);
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
        scales[row_of(threadIdx.x, half)] = __fmul_rn(unit_of(amax), global_scale);
    }
    if (first_chunk >= chunks) return;  // a whole warp

    const float of_lane[2] = {inverses[g], inverses[g + 8]};
#pragma unroll
    for (int i = 0; i < CHUNKS_OF_WARP; i++) {
        u32 a[2][4];  // of columns 0 .. 7 and 8 .. 15: four of row g, of row g + 8, four more of each
        decode_chunk_e4m3(codes[i], scale_bytes[i], of_lane, a);
        const int column = (first_chunk + i) * COLUMNS + c * 16;
        if (column >= columns) continue;
#pragma unroll
        for (int h = 0; h < 2; h++)
            *reinterpret_cast<uint4*>(values + (size_t)row_of(g + 8 * h, half) * columns + column) =
                make_uint4(a[0][h], a[0][2 + h], a[1][h], a[1][2 + h]);
    }
}
