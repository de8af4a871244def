// SPDX-License-Identifier: Apache-2.0
// Packed fragments (layouts/fragments.py) to plain bf16 rows: value = e2m1 * block scale, exact, no global scale.
//
// A warp takes one chunk (16 rows x 64 columns): a lane decodes 16 consecutive columns of rows g and g + 8 and writes them
// as two 32-byte pieces. Row r of tile t goes to out[r / SPLIT][SPLIT * t + r % SPLIT]: SPLIT = 16 is plain row order,
// SPLIT = 8 takes interleaved gate and up apart into two halves.
//
// Floor: 0.5625 bytes read and 2 written per weight. Compiled with -D: COLUMNS, SPLIT.

typedef unsigned int u32;

constexpr int CHUNKS = (COLUMNS + 63) / 64, STAGE_CHUNKS = 16, CODE_BYTES = 512, SCALE_BYTES = 64;
constexpr int CHUNK_BYTES = CODE_BYTES + SCALE_BYTES;

__device__ __forceinline__ u32 product(u32 a, u32 b) {
    u32 result;
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
    return result;
}

extern "C" __global__ void unpack_fragments(const unsigned char* __restrict__ packed, int first_tile, int tiles,
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
        const u32 scale = scales[h] * 0x00100010u + 0x70007000u;  // scale * 2^119, as in decode.cu
        u32 pairs[8];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const u32 w = words[j];
            const u32 low = h ? (w << 3) & 0x81C081C0u : w & 0x81C081C0u;
            const u32 high = h ? ((w << 4) & 0x80008000u) | ((w >> 6) & 0x01800180u) | ((w >> 4) & 0x00400040u)
                               : (w << 6) & 0x81C081C0u;
            pairs[2 * j] = product(product(low, scale), 0x43004300u);  // times 2^7
            pairs[2 * j + 1] = product(product(high, scale), 0x43004300u);
        }
        const int row = 8 * h + lane / 4;
        uint4* to = out + (((size_t)(row / SPLIT) * tiles + tile) * SPLIT + row % SPLIT) * (COLUMNS / 8) + column / 8;
        to[0] = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
        to[1] = make_uint4(pairs[4], pairs[5], pairs[6], pairs[7]);
    }
}
