// SPDX-License-Identifier: Apache-2.0
// bf16 rows in front of gemm.cu as they are: row r is row gather[r] of x; counts[1] of them. The copy engine moves them
// through shared memory, a piece for every thread, and no value comes to a register.
//
// Why rows are copied, and not gathered on their way into the tensor cores: docs/decisions.md.
//
// Floor: x read once, and its bytes written for every row.

#include "common.cuh"
#include "async.cuh"

constexpr int THREADS = 96, PIECE = 2048;

struct Shared {
    alignas(128) unsigned char pieces[THREADS][PIECE];
    u64 full[THREADS];
};

extern "C" __global__ void __launch_bounds__(THREADS)
    copy_rows(const unsigned char* __restrict__ x, int row_bytes, const int* __restrict__ counts,
              const int* __restrict__ gather, unsigned char* __restrict__ rows) {
    extern __shared__ __align__(128) unsigned char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const Address full = shared_address(&shared.full[threadIdx.x]), piece = shared_address(shared.pieces[threadIdx.x]);
    let_next_launch_begin();
    barrier_init(full, 1);
    barriers_are_made();
    wait_for_launch_before();
    const int pieces = (row_bytes + PIECE - 1) / PIECE, all = __ldcg(counts + 1) * pieces, step = gridDim.x * THREADS;
    u32 parity = 0;
    for (int i = blockIdx.x * THREADS + threadIdx.x; i < all; i += step, parity ^= 1) {
        const int row = i / pieces, at = i % pieces * PIECE, bytes = min(PIECE, row_bytes - at);
        const unsigned char* from = x + (size_t)__ldcg(gather + row) * row_bytes + at;
        copies_have_read();  // the piece before
        barrier_expect(full, bytes);
        copy_to_shared(piece, from, bytes, full);
        barrier_wait(full, parity);
        copy_from_shared(rows + (size_t)row * row_bytes + at, piece, bytes);
    }
    copies_have_ended();
}
