// SPDX-License-Identifier: Apache-2.0
// Where a row of activations goes in front of gemm.cu: a token's x to a row for each of its slots, as group.cu placed them,
// or row t of h to row t. For enter_rows.cu and fp8.cu, which read a row once and write it to each of these.

constexpr int FEW_SLOTS = 8;  // whose rows are asked for at once

struct Slots {
    const int* row_of_slot;  // of one token, top_k of them, -1: of no expert here; null: one slot, whose row is `row`
    int top_k, row;
    int few[FEW_SLOTS];  // rows of the first, asked for before anybody needs them

    // Of token t; or row t itself, where there is no list.
    __device__ __forceinline__ Slots(const int* list, int top_k, int t)
        : row_of_slot(list ? list + (size_t)t * top_k : nullptr), top_k(top_k), row(t) {
        if (list) ask(0, few);
    }
    __device__ __forceinline__ void ask(int first, int (&rows)[FEW_SLOTS]) const {
#pragma unroll
        for (int n = 0; n < FEW_SLOTS; n++) rows[n] = first + n < top_k ? __ldcg(row_of_slot + first + n) : -1;
    }
    // With a list: calls visit(rows), an int[FEW_SLOTS], for all slots; a row is -1 where there is none.
    template <class Visit>
    __device__ __forceinline__ void each_few(Visit visit) const {
        visit(few);
        for (int first = FEW_SLOTS; first < top_k; first += FEW_SLOTS) {
            int rows[FEW_SLOTS];
            ask(first, rows);
            visit(rows);
        }
    }
    // Calls visit(row) for each row that there is.
    template <class Visit>
    __device__ __forceinline__ void each(Visit visit) const {
        if (!row_of_slot) return visit(row);
        each_few([&](const int(&rows)[FEW_SLOTS]) {
#pragma unroll
            for (int n = 0; n < FEW_SLOTS; n++)
                if (rows[n] >= 0) visit(rows[n]);
        });
    }
};
