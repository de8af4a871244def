// SPDX-License-Identifier: Apache-2.0
// Packed fragments (layouts/fragments.py) to plain bf16 rows: value = e2m1 * block scale, exact, no global scale. With
// FP8, each row is also rounded to e4m3 in units of its amax / 448 (as formats/activations.py does), still written as bf16.
//
// A warp takes one chunk (16 rows x 64 columns): a lane decodes 16 consecutive columns of rows g and g + 8 and writes them
// as two 32-byte pieces. Row r of tile t goes to out[r / SPLIT][SPLIT * t + r % SPLIT]: SPLIT = 16 is plain row order,
// SPLIT = 8 takes interleaved gate and up apart into two halves.
//
// Floor: 0.5625 bytes read and 2 written per weight. Compiled with -D: COLUMNS, SPLIT, FP8.

#include "common.cuh"

constexpr int CHUNKS = (COLUMNS + 63) / 64, STAGE_CHUNKS = 16, CODE_BYTES = 512, SCALE_BYTES = 64;
constexpr int CHUNK_BYTES = CODE_BYTES + SCALE_BYTES;

// Two bf16 values rounded to e4m3 after multiplication by `inverse`, and back.
__device__ __forceinline__ u32 round_to_e4m3(u32 pair, float inverse) {
    const float low = __fmul_rn(__uint_as_float(pair << 16), inverse);
    const float high = __fmul_rn(__uint_as_float(pair & 0xFFFF0000u), inverse);
    u16 bytes;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(bytes) : "f"(high), "f"(low));
    u32 halves;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(bytes));
    float values[2];
    asm("{.reg .b16 l, h;\n mov.b32 {l, h}, %2;\n cvt.f32.f16 %0, l;\n cvt.f32.f16 %1, h;}"
        : "=f"(values[0]), "=f"(values[1])
        : "r"(halves));
    return bf16_pair(values[0], values[1]);
}

// row_amax: of the rows of this call, in the order of out; used with FP8 alone.
extern "C" __global__ void unpack_fragments(const unsigned char* __restrict__ packed, int first_tile, int tiles,
                                            const float* __restrict__ row_amax, int half_stride,
                                            uint4* __restrict__ out) {
    const int index = (blockIdx.x * blockDim.x + threadIdx.x) / 32, lane = threadIdx.x % 32;
    const int tile = index / CHUNKS, chunk = index % CHUNKS, stage = chunk / STAGE_CHUNKS, inside = chunk % STAGE_CHUNKS;
    if (tile >= tiles) return;
    const int in_stage = min(STAGE_CHUNKS, CHUNKS - stage * STAGE_CHUNKS);
    const unsigned char* from =
        packed + ((size_t)(first_tile + tile) * CHUNKS + stage * STAGE_CHUNKS) * CHUNK_BYTES;
    const uint4 codes = *reinterpret_cast<const uint4*>(from + inside * CODE_BYTES + lane * 16);
    const unsigned char* scales = from + in_stage * CODE_BYTES + inside * SCALE_BYTES + lane * 2;
    const int column = chunk * 64 + lane % 4 * 16;
    if (column >= COLUMNS) return;
    const u32 words[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const u32 scale = scale_pair(scales[h]);
        u32 pairs[8];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            u32 decoded[4];  // of rows g, g + 8, g, g + 8
            decode(words[j], decoded);
            pairs[2 * j] = scaled(scaled(decoded[h], scale), 0x43004300u);  // times 2^7
            pairs[2 * j + 1] = scaled(scaled(decoded[2 + h], scale), 0x43004300u);
        }
        const int row = 8 * h + lane / 4;
#if FP8
        const float amax = row_amax[row / SPLIT * half_stride + tile * SPLIT + row % SPLIT];
        const float inverse = __fdiv_rn(448.0f, amax < 0x1p-100f ? 0x1p-100f : amax);  // NaN stays NaN
#pragma unroll
        for (int i = 0; i < 8; i++) pairs[i] = round_to_e4m3(pairs[i], inverse);
#endif
        uint4* to = out + (((size_t)(row / SPLIT) * tiles + tile) * SPLIT + row % SPLIT) * (COLUMNS / 8) + column / 8;
        to[0] = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
        to[1] = make_uint4(pairs[4], pairs[5], pairs[6], pairs[7]);
    }
}
