// SPDX-License-Identifier: Apache-2.0
// The amax of weight rows, which FP8 operands are in units of (amax / 448): what gemm.cu reads of it. Part of gemm.cu.

// The amax of the weight rows that a lane multiplies: its operands are in units of it.
struct RowAmax {
    float of[STRIPS][2];

    // all: of `rows` rows, with GATE_UP of half as many of gate and then of up; first: the block's first one among them.
    __device__ __forceinline__ RowAmax(const BFloat16* all, int rows, int first, int row_warp) {
        const int g = threadIdx.x % 32 / 4;
#pragma unroll
        for (int i = 0; i < 2 * STRIPS; i++) {
            const int row = first + row_of(row_warp, i / 2), index = GATE_UP ? row / 2 + i % 2 * (rows / 2) : row + i % 2 * 8;
            of[i / 2][i % 2] = row < rows ? amax_or_floor(to_float(all[index + g])) : 1.0f;
        }
    }
    __device__ __forceinline__ void invert(float (&inverses)[STRIPS][2]) const {
#pragma unroll
        for (int i = 0; i < 2 * STRIPS; i++) inverses[i / 2][i % 2] = inverse_of(of[i / 2][i % 2]);
    }
    __device__ __forceinline__ void scale(int strip, Rows& rows) const {
#pragma unroll
        for (int h = 0; h < 2; h++) rows.factors[h] *= unit_of(of[strip][h]);
    }
};

#if GROUPED
// The amax of a tile's weight rows: how many bytes, and their copy.
__device__ __forceinline__ u32 row_amax_bytes(const Arguments& arguments, int row) {
    return min(ROWS, arguments.rows - row) * sizeof(BFloat16);
}
__device__ __forceinline__ void copy_row_amax(const Arguments& arguments, int expert, int row, Tile& tile, Address barrier) {
    constexpr int HALVES = GATE_UP ? 2 : 1;
    const size_t of_half = arguments.rows / HALVES;
#pragma unroll
    for (int h = 0; h < HALVES; h++)
        copy_to_shared(shared_address(&tile.row_amax[h * (ROWS / 2)]),
                       arguments.row_amax + (expert * HALVES + h) * of_half + row / HALVES,
                       row_amax_bytes(arguments, row) / HALVES, barrier);
}
#endif
