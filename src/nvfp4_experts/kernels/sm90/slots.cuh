// SPDX-License-Identifier: Apache-2.0
// The rows of a token's slots, as group.cu placed them.

constexpr int FEW_SLOTS = 8;  // whose rows are asked for at once

struct Slots {
    const int* row_of_slot;  // of one token, top_k of them, -1: of no expert here; or null, with top_k 1
    int top_k, row;          // row: of the slot where row_of_slot is null

    // Calls visit(rows), an int[FEW_SLOTS], for all slots in order; a row is -1 where there is none.
    template <class Visit>
    __device__ __forceinline__ void each_few(Visit visit) const {
        for (int first = 0; first < top_k; first += FEW_SLOTS) {
            int rows[FEW_SLOTS];
#pragma unroll
            for (int n = 0; n < FEW_SLOTS; n++) {
                rows[n] = row_of_slot || n > 0 ? -1 : row;
                if (row_of_slot && first + n < top_k) rows[n] = __ldcg(row_of_slot + first + n);
            }
            visit(rows);
        }
    }
    // Calls visit(row) for each row that there is.
    template <class Visit>
    __device__ __forceinline__ void each(Visit visit) const {
        each_few([&](const int(&rows)[FEW_SLOTS]) {
#pragma unroll
            for (int n = 0; n < FEW_SLOTS; n++)
                if (rows[n] >= 0) visit(rows[n]);
        });
    }
};

// Of token t, or of row t itself where there is no list.
__device__ __forceinline__ Slots slots_of(const int* row_of_slot, int top_k, int t) {
    return {row_of_slot ? row_of_slot + (size_t)t * top_k : nullptr, top_k, t};
}
