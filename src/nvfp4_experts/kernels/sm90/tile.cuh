// SPDX-License-Identifier: Apache-2.0
// One persistent block and its tiles of 16 weight rows, at most 8 tokens: what decode.cu and routed_decode.cu share.
//
// Warp roles: 16 consumers split K, each its own 64 columns of a stage; a producer warp keeps a ring of STAGES bulk copies
// (16 rows x 1024 columns, 9 KB) running ahead of them, across tiles; a reducer warp adds the 16 partial sums of a tile, or
// two on different schedulers take turns.
// Activations stay in the consumers' registers as B fragments.
// Needs STAGES.

// ACTIVATIONS: bf16, or NVFP4 by whose scale.
#define BF16 0
#define STATIC 1
#define DYNAMIC 2
#define PER_TOKEN 3

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
struct Fragment {
    u32 b[8];
};

struct Pipeline {
    alignas(128) unsigned char stages[STAGES][STAGE_BYTES];
    alignas(128) float4 partials[2][CONSUMERS][32];
    u64 stage_full[STAGES], stage_empty[STAGES], partial_full[2], partial_empty[2];
    u32 scale_offsets;
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
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 16 rows x 64 columns against this warp's 8 tokens.
__device__ __forceinline__ void multiply_chunk(float (&sums)[2][4], uint4 codes, uint2 scales, u32 offsets,
                                               const Fragment& fragment) {
    u32 a[4][4];
    decode_chunk(codes, scales, offsets, a);
#pragma unroll
    for (int j = 0; j < 4; j++) multiply(sums[j % 2], a[j], fragment.b[2 * j], fragment.b[2 * j + 1]);
}

// A consumer's place in the ring, and the barrier of the slot that it has read and not yet given back.
struct Reader {
    Ring<STAGES> ring;
    Address read = 0;
};

// One tile into the ring, as soon as there is room; by one thread.
template <class G>
__device__ __forceinline__ void produce_tile(const unsigned char* tile, Pipeline& pipeline, Ring<STAGES>& ring) {
    for (int stage = 0; stage < G::stages; stage++, ring.next()) {
        barrier_wait(shared_address(&pipeline.stage_empty[ring.slot]), ring.parity ^ 1);
        const u32 bytes = G::chunks_in(stage) * CHUNK_BYTES;
        barrier_expect(shared_address(&pipeline.stage_full[ring.slot]), bytes);
        copy_to_shared(shared_address(pipeline.stages[ring.slot]), tile + (size_t)stage * STAGE_BYTES, bytes,
                       shared_address(&pipeline.stage_full[ring.slot]));
    }
}

// A consumer's share of a tile's sums. begin(stage): called before the fragment of a stage is used.
template <class G, class Begin>
__device__ __forceinline__ void consume_tile(int warp, Pipeline& pipeline, u32 offsets, Reader& reader,
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
        uint4 codes = {};
        uint2 scales = {};
        if (has_chunk) codes = load_16(from + lane * 16), scales = load_8(from + CODE_BYTES + lane / 4 * 8);
        // Given back is the slot before, behind the wait: within straight code the assembler lets an arrival pass loads that
        // are under way, but not out of a loop. All lanes' are there: mma.sync has had them.
        if ((stage || reader.read) && (WARP_ARRIVALS == 32 || lane == 0)) barrier_arrive(reader.read);
        reader.read = empty + slot * BARRIER_BYTES;
        begin(stage);
        if (has_chunk) multiply_chunk(sums, codes, scales, offsets, fragments[stage]);
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
