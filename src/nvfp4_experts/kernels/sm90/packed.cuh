// SPDX-License-Identifier: Apache-2.0
// A lane's part of a chunk of packed weights, as it lies in shared memory, and its A operands. Needs common.cuh, async.cuh
// and e4m3.cuh.

// layouts/fragments.py: four k16 steps in bf16, exact but for a factor of 2^-7. offsets: SCALE_OFFSETS.
struct PackedBf16 {
    static constexpr int STEPS = 4;
    uint4 codes;
    uint2 scales;
    PackedBf16() = default;
    __device__ PackedBf16(Address chunk, int lane)
        : codes(load_16(chunk + lane * 16)), scales(load_8(chunk + CODE_BYTES + lane / 4 * 8)) {}
    __device__ __forceinline__ void decode(u32 offsets, const float (&)[2], u32 (&a)[STEPS][4]) const {
        decode_chunk(codes, scales, offsets, a);
    }
};

// layouts/e4m3_fragments.py: two k32 steps in e4m3, each row in units of its amax / 448. inverses: of rows g and g + 8.
struct PackedE4m3 {
    static constexpr int STEPS = 2;
    uint4 codes;
    u32 scales;
    PackedE4m3() = default;
    __device__ PackedE4m3(Address chunk, int lane)
        : codes(load_16(chunk + lane * 16)), scales(load_2(chunk + CODE_BYTES + lane * 2)) {}
    __device__ __forceinline__ void decode(u32, const float (&inverses)[2], u32 (&a)[STEPS][4]) const {
        decode_chunk_e4m3(codes, scales, inverses, a);
    }
};
