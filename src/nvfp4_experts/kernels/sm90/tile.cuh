// SPDX-License-Identifier: Apache-2.0
// One persistent block and its tiles of 16 weight rows, at most 8 tokens: what decode.cu and routed_decode.cu share.
//
// Warp roles: 16 consumers split K, each its own 64 columns of a stage; a producer warp keeps a ring of STAGES bulk copies
// (16 rows x 1024 columns, 9 KB) running ahead of them, across tiles; a reducer warp adds the 16 partial sums of a tile, or
// two on different schedulers take turns.
// Activations stay in the consumers' registers as B fragments.
// Needs STAGES, ACTIVATIONS, common.cuh and async.cuh.

#include "e4m3.cuh"
#include "packed.cuh"

// ACTIVATIONS: bf16, NVFP4 by whose scale, or e4m3 by its row's.
#define BF16 0
#define STATIC 1
#define DYNAMIC 2
#define PER_TOKEN 3
#define E4M3 4

constexpr int CONSUMERS = 16, PRODUCER = 16, REDUCER = 17, COPIER = 18, ENTERER = 19, THREADS = 20 * 32;
constexpr int TOKENS = 8;
constexpr int STAGE_BYTES = CONSUMERS * CHUNK_BYTES;
constexpr int BLOCK = 16;

// A GEMM as the warps see it: tiles of 16 output rows, K in chunks of 64, stages of 16 chunks.
template <int N, int K>
struct Gemm {
    static constexpr int tiles = N / 16;
    static constexpr int columns = K;
    static constexpr int chunks = (K + 63) / 64;
    static constexpr int stages = (chunks + CONSUMERS - 1) / CONSUMERS;
    static constexpr int tile_bytes = chunks * CHUNK_BYTES;
    static __device__ __forceinline__ int chunks_in(int stage) { return min(CONSUMERS, chunks - stage * CONSUMERS); }
};

// One token's share of a chunk: words 2 j, 2 j + 1 are the B operand of step j, columns 16 j + 2 c + {0, 1} and + {8, 9}.
// E4M3: columns 16 c + 4 j + {0, 1} and + {2, 3}, as fp16: sums do not ask in which order columns come, and four of them are
// a word of the weights.
struct Fragment {
    u32 b[8];
};

struct Pipeline {
    alignas(128) unsigned char stages[STAGES][STAGE_BYTES];
    alignas(128) float4 partials[2][CONSUMERS][32];
    u64 stage_full[STAGES], stage_empty[STAGES], partial_full[2], partial_empty[2];
    u32 scale_offsets;
#if ACTIVATIONS == E4M3
    alignas(16) BFloat16 row_amax[STAGES][16];  // of the tile whose first stage this is
#endif
};

#if ACTIVATIONS == E4M3
typedef PackedE4m3 Packed;
#else
typedef PackedBf16 Packed;
#endif

// What weights of a tile are decoded with.
struct Decoder {
    u32 offsets;
    float inverses[2];
    __device__ explicit Decoder(const Pipeline& pipeline) : offsets(load_4(shared_address(&pipeline.scale_offsets))) {}
    // By the lanes of rows g and g + 8, when its first stage has come.
    __device__ __forceinline__ void meet_tile(const Pipeline& pipeline, int slot) {
#if ACTIVATIONS == E4M3
        const Address amax = shared_address(pipeline.row_amax[slot]) + threadIdx.x % 32 / 4 * sizeof(BFloat16);
#pragma unroll
        for (int h = 0; h < 2; h++)
            inverses[h] = inverse_of(amax_or_floor(to_float(BFloat16{(u16)load_2(amax + h * 8 * sizeof(BFloat16))})));
#endif
    }
};

// By one thread, in front of barriers_are_made.
__device__ __forceinline__ void make_pipeline(Pipeline& pipeline) {
    for (int i = 0; i < STAGES; i++) {
        barrier_init(shared_address(&pipeline.stage_full[i]), 1);
        barrier_init(shared_address(&pipeline.stage_empty[i]), CONSUMERS * WARP_ARRIVALS);
    }
    for (int i = 0; i < 2; i++) {
        barrier_init(shared_address(&pipeline.partial_full[i]), CONSUMERS * WARP_ARRIVALS);
        barrier_init(shared_address(&pipeline.partial_empty[i]), WARP_ARRIVALS);
    }
    pipeline.scale_offsets = SCALE_OFFSETS;
}

__device__ __forceinline__ void multiply(float (&sum)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if ACTIVATIONS == E4M3
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// 16 rows x 64 columns against this warp's 8 tokens.
__device__ __forceinline__ void multiply_chunk(float (&sums)[2][4], const Packed& packed, const Decoder& decoder,
                                               const Fragment& fragment) {
    u32 a[Packed::STEPS][4];
    packed.decode(decoder.offsets, decoder.inverses, a);
#pragma unroll
    for (int j = 0; j < 4; j++) {
#if ACTIVATIONS == E4M3
        u32 pairs[4];  // four columns: of row g, then of g + 8
#pragma unroll
        for (int h = 0; h < 2; h++) f16_pairs(a[j / 2][j % 2 * 2 + h], pairs[h], pairs[2 + h]);
        multiply(sums[j % 2], pairs, fragment.b[2 * j], fragment.b[2 * j + 1]);
#else
        multiply(sums[j % 2], a[j], fragment.b[2 * j], fragment.b[2 * j + 1]);
#endif
    }
}

// A consumer's place in the ring, and the barrier of the slot that it has read and not yet given back.
struct Reader {
    Ring<STAGES> ring;
    Address read = 0;
};

// E4M3: the amax of a tile's rows, the first eight and the others. L1: of rows of gate, and then of up.
struct TileAmax {
    const BFloat16 *first, *others;
};
__device__ __forceinline__ TileAmax amax_of_l1(const BFloat16* gate_up, int intermediate, int tile) {
    return {gate_up + tile * 8, gate_up + intermediate + tile * 8};
}
__device__ __forceinline__ TileAmax amax_of_l2(const BFloat16* down, int tile) {
    return {down + tile * 16, down + tile * 16 + 8};
}

// What sums of a tile's rows g and g + 8 are in units of. Asked for in front of the sums.
__device__ __forceinline__ float2 units_of(const TileAmax& amax) {
#if ACTIVATIONS == E4M3
    const int g = threadIdx.x % 32 / 4;
    auto of = [=](const BFloat16* rows) { return unit_of(amax_or_floor(to_float(rows[g]))); };
    return {of(amax.first), of(amax.others)};
#else
    return {UNPACKED, UNPACKED};
#endif
}

// One tile into the ring, as soon as there is room; by one thread.
template <class G>
__device__ __forceinline__ void produce_tile(const unsigned char* tile, const TileAmax& rows, Pipeline& pipeline,
                                             Ring<STAGES>& ring) {
    for (int stage = 0; stage < G::stages; stage++, ring.next()) {
        const Address full = shared_address(&pipeline.stage_full[ring.slot]);
        barrier_wait(shared_address(&pipeline.stage_empty[ring.slot]), ring.parity ^ 1);
        const u32 bytes = G::chunks_in(stage) * CHUNK_BYTES;
#if ACTIVATIONS == E4M3
        constexpr u32 HALF = 8 * sizeof(BFloat16);
        barrier_expect(full, bytes + (stage ? 0 : 2 * HALF));
        if (stage == 0) {
            const Address amax = shared_address(pipeline.row_amax[ring.slot]);
            copy_to_shared(amax, rows.first, HALF, full), copy_to_shared(amax + HALF, rows.others, HALF, full);
        }
#else
        barrier_expect(full, bytes);
#endif
        copy_to_shared(shared_address(pipeline.stages[ring.slot]), tile + (size_t)stage * STAGE_BYTES, bytes, full);
    }
}

// A consumer's share of a tile's sums. begin(stage): called before the fragment of a stage is used.
template <class G, class Begin>
__device__ __forceinline__ void consume_tile(int warp, Pipeline& pipeline, Decoder& decoder, Reader& reader,
                                             Ring<2>& partial, Fragment (&fragments)[G::stages], Begin begin) {
    const int lane = threadIdx.x % 32;
    const Address chunk = shared_address(pipeline.stages[0]) + warp * CHUNK_BYTES;
    const Address full = shared_address(pipeline.stage_full), empty = shared_address(pipeline.stage_empty);
    float sums[2][4] = {};
#pragma unroll
    for (int stage = 0; stage < G::stages; stage++, reader.ring.next()) {
        const u32 slot = reader.ring.slot;
        barrier_wait(full + slot * BARRIER_BYTES, reader.ring.parity);
        const bool has_chunk = G::chunks % CONSUMERS == 0 || warp < G::chunks_in(stage);
        const Address from = chunk + slot * STAGE_BYTES;
        Packed packed = {};
        if (has_chunk) packed = Packed(from, lane);
        if (stage == 0) decoder.meet_tile(pipeline, slot);
        // Given back is the slot before, behind the wait: within straight code the assembler lets an arrival pass loads that
        // are under way, but not out of a loop. All lanes' are there: mma.sync has had them.
        if ((stage || reader.read) && (WARP_ARRIVALS == 32 || lane == 0)) barrier_arrive(reader.read);
        reader.read = empty + slot * BARRIER_BYTES;
        begin(stage);
        if (has_chunk) multiply_chunk(sums, packed, decoder, fragments[stage]);
    }
    barrier_wait(shared_address(&pipeline.partial_empty[partial.slot]), partial.parity ^ 1);
    pipeline.partials[partial.slot][warp][lane] = make_float4(sums[0][0] + sums[1][0], sums[0][1] + sums[1][1],
                                                              sums[0][2] + sums[1][2], sums[0][3] + sums[1][3]);
    barrier_arrive_warp(shared_address(&pipeline.partial_full[partial.slot]));
    partial.next();
}

// A tile's partial sums added in order, by the reducer; .x, .y: row g, tokens 2c and 2c + 1; .z, .w: row g + 8.
__device__ __forceinline__ float4 reduce_tile(Pipeline& pipeline, const Ring<2>& partial) {
    const int lane = threadIdx.x % 32;
    barrier_wait(shared_address(&pipeline.partial_full[partial.slot]), partial.parity);
    float4 sum = pipeline.partials[partial.slot][0][lane];
#pragma unroll
    for (int warp = 1; warp < CONSUMERS; warp++) {
        const float4 more = pipeline.partials[partial.slot][warp][lane];
        sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
    }
    barrier_arrive_warp(shared_address(&pipeline.partial_empty[partial.slot]));
    return sum;
}
