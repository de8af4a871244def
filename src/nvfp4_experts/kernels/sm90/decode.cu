// SPDX-License-Identifier: Apache-2.0
// A whole shared expert for up to 8 tokens in one launch: L1, clamp and SwiGLU, grid-wide hand-over, L2.
//
//   h = silu(min(x @ W1.T, L)) * clamp(x @ W3.T, -L, L)      W1, W3 interleaved 8 rows by 8: one tile, one thread
//   y = h @ W2.T
//
// Weights are the 16-row operand of mma.m16n8k16 (bf16 operands, fp32 sum), tokens the 8 columns. They come packed as
// layouts/fragments.py says: a lane's 16-byte load is its four A fragments.
//
// One persistent block per multiprocessor. Warp roles: 16 consumers split K, each its own 64 columns of a stage;
// a producer warp keeps a ring of STAGES bulk copies (16 rows x 1024 columns, 9 KB) running ahead of them, across tiles
// and across the hand-over; a reducer warp adds the 16 partial sums of a tile and finishes it. Activations are brought
// into their format once per block and phase and stay in the consumers' registers as B fragments.
//
// Floor: 0.5625 bytes * 3 HI read. bf16 holds exactly: code * 2^-126 (its bits, moved), block scale * 2^119 (its bits,
// moved, plus an exponent), their product code * scale * 2^-7, and NVFP4 activations. So 2^7 times the sum is exact.
//
// Compiled with -D: HIDDEN, INTERMEDIATE, ACTIVATIONS (0 bf16, 1 nvfp4 static, 2 dynamic, 3 per token),
// ELEMENT (0 bf16, 1 fp16, 2 fp32: of x and y), STAGES.

#include "common.cuh"
#include "async.cuh"

#define BF16 0
#define STATIC 1
#define DYNAMIC 2
#define PER_TOKEN 3

constexpr int CONSUMERS = 16, PRODUCER = 16, REDUCER = 17, THREADS = 20 * 32;  // two warps idle
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
    static __device__ __forceinline__ int chunks_in(int stage) { return min(CONSUMERS, chunks - stage * CONSUMERS); }
};
using L1 = Gemm<2 * INTERMEDIATE, HIDDEN>;
using L2 = Gemm<HIDDEN, INTERMEDIATE>;

struct Shared {
    alignas(128) unsigned char stages[STAGES][STAGE_BYTES];
    alignas(128) float4 partials[2][CONSUMERS][32];
    u64 stage_full[STAGES], stage_empty[STAGES], partial_full[2], partial_empty[2];
    u32 amax[2][TOKENS];          // of x, of h: bits of |.|, whose order is that of the values, NaN above all
    float token_scale[2][TOKENS];  // of x, of h: global scale of a token's activations
};

// --- activations ----------------------------------------------------------------------------------------------------

#if ACTIVATIONS == BF16
typedef BFloat16 HiddenState;
#else
typedef Float32 HiddenState;
#endif

// One token's share of a chunk: words 2 j, 2 j + 1 are the B operand of step j, columns 16 j + 2 c + {0, 1} and + {8, 9}.
struct Fragment {
    u32 b[8];
};

// From 16 consecutive columns in each lane of four to fragments: lane c gives its words to the lanes that multiply them.
__device__ __forceinline__ void exchange(Fragment& fragment) {
    u32 halves[2][4];  // words of the first and of the second 8 columns
#pragma unroll
    for (int i = 0; i < 8; i++) halves[i / 4][i % 4] = fragment.b[i];
    transpose_quad(halves[0]), transpose_quad(halves[1]);
#pragma unroll
    for (int j = 0; j < 4; j++) fragment.b[2 * j] = halves[0][j], fragment.b[2 * j + 1] = halves[1][j];
}

// With bf16 activations h is stored so that a lane's 16 values are its fragment: where channel k of token t lies.
constexpr bool ORDERED = ACTIVATIONS == BF16;
constexpr int H_STRIDE = ORDERED ? (INTERMEDIATE + 63) / 64 * 64 : INTERMEDIATE;
__device__ __forceinline__ int h_position(int k) {
    return ORDERED ? k / 64 * 64 + k % 8 / 2 * 16 + k % 64 / 8 * 2 + k % 2 : k;
}

// Global scales g (encode) and s (decode) from an amax or a static scale.
__device__ __forceinline__ void global_scales(u32 amax_bits, const float* static_scale, float& g, float& s) {
    if (ACTIVATIONS == STATIC) {
        s = __ldcg(static_scale);  // the launch before may have written it
        g = __frcp_rn(s);
        return;
    }
    global_scales_of_amax(amax_bits, g, s);
}

// The amax that an activation's global scale is made of, over the consumers: of the token in this lane, or of all.
template <int PHASE>
__device__ __forceinline__ u32 joint_amax(u32 largest, int token, bool one_token_a_warp, Shared& shared) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 1; i < 32; i *= 2) {
        const u32 other = __shfl_xor_sync(~0u, largest, i);
        if (i < 4 || ACTIVATIONS == DYNAMIC || one_token_a_warp) largest = max(largest, other);
    }
    if (lane % 4 == 0) atomicMax(&shared.amax[PHASE][ACTIVATIONS == DYNAMIC ? 0 : token], largest);
    asm volatile("bar.sync 1, %0;" ::"n"(CONSUMERS * 32) : "memory");
    return shared.amax[PHASE][ACTIVATIONS == DYNAMIC ? 0 : token];
}

__device__ __forceinline__ void to_bf16(const float (&v)[16], Fragment& fragment) {
#pragma unroll
    for (int i = 0; i < 8; i++) fragment.b[i] = bf16_pair(v[2 * i], v[2 * i + 1]);
}

// One token alone: its blocks are spread over all lanes, quantised once, and handed to the four lanes that own them.
template <class G, int PHASE, class Source>
__device__ __forceinline__ float enter_one(const Source* source, const float* static_scale, Shared& shared,
                                           Fragment (&fragments)[G::stages]) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int column = (lane / 4 * CONSUMERS + warp) * 64 + lane % 4 * BLOCK;
    Raw<Source> raw = {};
    if (column < G::columns) raw = load16(source + column);
    float v[16], g, s;
    unpack16(raw, v);
    u32 largest = 0;
    if (ACTIVATIONS != STATIC) largest = joint_amax<PHASE>(amax16(v), 0, true, shared);
    global_scales(largest, static_scale, g, s);
    quantize_block(v, g, s);
    Fragment mine;
    to_bf16(v, mine);
    exchange(mine);
#pragma unroll
    for (int stage = 0; stage < G::stages; stage++) {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const u32 bits = __shfl_sync(~0u, mine.b[i], stage * 4 + lane % 4);
            fragments[stage].b[i] = lane < 4 ? bits : 0;
        }
    }
    return s;
}

// Columns of this warp's chunks, one token per group of four lanes.
template <class G, int PHASE, class Source>
__device__ __forceinline__ float enter_all(const Source* source, int tokens, const float* static_scale, Shared& shared,
                                           Fragment (&fragments)[G::stages]) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, token = lane / 4;
    constexpr bool IN_ORDER = PHASE == 1 && ORDERED;
    constexpr int STRIDE = IN_ORDER ? H_STRIDE : G::columns;
    Raw<Source> raw[G::stages];
#pragma unroll
    for (int stage = 0; stage < G::stages; stage++) {
        const int column = (stage * CONSUMERS + warp) * 64 + (lane % 4) * BLOCK;
        raw[stage] = Raw<Source>{};
        if (token < tokens && column < STRIDE) raw[stage] = load16(source + (size_t)token * STRIDE + column);
    }
    float g, s = 1.0f;
    if (ACTIVATIONS != BF16) {
        u32 largest = 0;
        if (ACTIVATIONS != STATIC) {
#pragma unroll
            for (int stage = 0; stage < G::stages; stage++) {
                float v[16];
                unpack16(raw[stage], v);
                largest = max(largest, amax16(v));
                forget(raw[stage]);
            }
            largest = joint_amax<PHASE>(largest, token, false, shared);
        }
        global_scales(largest, static_scale, g, s);
    }
#pragma unroll
    for (int stage = 0; stage < G::stages; stage++) {
        if (ACTIVATIONS == BF16 && is_bf16<Source>()) {  // as it is
#pragma unroll
            for (int i = 0; i < 8; i++) fragments[stage].b[i] = reinterpret_cast<const u32*>(&raw[stage].words[0])[i];
        } else {
            float v[16];
            unpack16(raw[stage], v);
            if (ACTIVATIONS != BF16) quantize_block(v, g, s);
            to_bf16(v, fragments[stage]);
        }
        if (!IN_ORDER) exchange(fragments[stage]);
        if (IN_ORDER && G::columns % 64) {  // nothing was stored past the last channel
            const int first = (stage * CONSUMERS + warp) * 64 + lane % 4 * 2;
#pragma unroll
            for (int i = 0; i < 8; i++)
                if (first + 8 * i >= G::columns) fragments[stage].b[i] = 0;
        }
    }
    return s;
}

// Brings this warp's columns of all tokens into the activation format; the tokens' scales go to shared memory, where the
// reducer finds them with the first tile.
template <class G, int PHASE, class Source>
__device__ __forceinline__ void enter(const Source* source, int tokens, const float* static_scale, Shared& shared,
                                      Fragment (&fragments)[G::stages]) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float scale;
    if (ACTIVATIONS != BF16 && G::stages <= 8 && tokens == 1)
        scale = enter_one<G, PHASE>(source, static_scale, shared, fragments);
    else
        scale = enter_all<G, PHASE>(source, tokens, static_scale, shared, fragments);
    if (warp == 0 && lane % 4 == 0) shared.token_scale[PHASE][lane / 4] = scale;
}

// --- weights --------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void multiply(float (&sum)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 16 rows x 64 columns against this warp's 8 tokens.
__device__ __forceinline__ void multiply_chunk(float (&sums)[2][4], uint4 codes, uint2 scales, const Fragment& fragment) {
    u32 a[4][4];
    decode_chunk(codes, scales, a);
#pragma unroll
    for (int j = 0; j < 4; j++) multiply(sums[j % 2], a[j], fragment.b[2 * j], fragment.b[2 * j + 1]);
}

// --- the roles ------------------------------------------------------------------------------------------------------

template <class G>
__device__ __forceinline__ void produce(const unsigned char* weights, Shared& shared, Ring<STAGES>& ring) {
    for (int tile = blockIdx.x; tile < G::tiles; tile += gridDim.x) {
        const unsigned char* from = weights + (size_t)tile * G::chunks * CHUNK_BYTES;
        for (int stage = 0; stage < G::stages; stage++, ring.next()) {
            barrier_wait(shared_address(&shared.stage_empty[ring.slot]), ring.parity ^ 1);
            const u32 bytes = G::chunks_in(stage) * CHUNK_BYTES;
            barrier_expect(shared_address(&shared.stage_full[ring.slot]), bytes);
            copy_to_shared(shared_address(shared.stages[ring.slot]), from + (size_t)stage * STAGE_BYTES, bytes,
                           shared_address(&shared.stage_full[ring.slot]));
        }
    }
}

template <class G>
__device__ __forceinline__ void consume(Shared& shared, Ring<STAGES>& ring, Ring<2>& partial,
                                        const Fragment (&fragments)[G::stages]) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int tile = blockIdx.x; tile < G::tiles; tile += gridDim.x) {
        float sums[2][4] = {};
#pragma unroll
        for (int stage = 0; stage < G::stages; stage++, ring.next()) {
            const int chunks = G::chunks_in(stage);
            barrier_wait(shared_address(&shared.stage_full[ring.slot]), ring.parity);
            uint4 codes = {};
            uint2 scales = {};
            if (warp < chunks) {
                const unsigned char* from = shared.stages[ring.slot] + warp * CHUNK_BYTES;
                codes = *reinterpret_cast<const uint4*>(from + lane * 16);
                scales = *reinterpret_cast<const uint2*>(from + CODE_BYTES + lane / 4 * 8);
            }
            __syncwarp();
            if (lane == 0) barrier_arrive(shared_address(&shared.stage_empty[ring.slot]));
            if (warp < chunks) multiply_chunk(sums, codes, scales, fragments[stage]);
        }
        barrier_wait(shared_address(&shared.partial_empty[partial.slot]), partial.parity ^ 1);
        shared.partials[partial.slot][warp][lane] = make_float4(sums[0][0] + sums[1][0], sums[0][1] + sums[1][1],
                                                                sums[0][2] + sums[1][2], sums[0][3] + sums[1][3]);
        __syncwarp();
        if (lane == 0) barrier_arrive(shared_address(&shared.partial_full[partial.slot]));
        partial.next();
    }
}

// Adds a tile's partial sums in order; sum.x, .y: row g, tokens 2c and 2c + 1; .z, .w: row g + 8.
template <class G, class Finish>
__device__ __forceinline__ void reduce(Shared& shared, Ring<2>& partial, Finish finish) {
    const int lane = threadIdx.x % 32;
    for (int tile = blockIdx.x; tile < G::tiles; tile += gridDim.x) {
        barrier_wait(shared_address(&shared.partial_full[partial.slot]), partial.parity);
        float4 sum = shared.partials[partial.slot][0][lane];
#pragma unroll
        for (int warp = 1; warp < CONSUMERS; warp++) {
            const float4 more = shared.partials[partial.slot][warp][lane];
            sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
        }
        __syncwarp();
        if (lane == 0) barrier_arrive(shared_address(&shared.partial_empty[partial.slot]));
        partial.next();
        finish(tile, sum);
    }
}

// The grid-wide hand-over: a counter that every launch raises by the number of blocks. A launch begins at a multiple of
// it, so the next multiple means that all blocks have arrived; nothing is ever reset. At most 2 INTERMEDIATE / 16 blocks.
__device__ __forceinline__ u64 load_acquire(const u64* p) {
    u64 value;
    asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(p) : "memory");
    return value;
}

__device__ __forceinline__ void arrive_release(u64* counter) {
    asm volatile("red.release.gpu.global.add.u64 [%0], 1;" ::"l"(counter) : "memory");
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    shared_expert_decode(const Element* __restrict__ x, int tokens, const unsigned char* __restrict__ gate_up,
                         const float* __restrict__ gate_up_scales, const unsigned char* __restrict__ down,
                         const float* __restrict__ down_scale, const float* __restrict__ input_scale,
                         const float* __restrict__ hidden_scale, float limit, HiddenState* __restrict__ hidden_states,
                         u64* __restrict__ hand_over, Element* __restrict__ y) {
    extern __shared__ __align__(128) unsigned char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) barrier_init(shared_address(&shared.stage_full[i]), 1), barrier_init(shared_address(&shared.stage_empty[i]), CONSUMERS);
        for (int i = 0; i < 2; i++) barrier_init(shared_address(&shared.partial_full[i]), CONSUMERS), barrier_init(shared_address(&shared.partial_empty[i]), 1);
        barriers_are_made();
    }
    if (threadIdx.x < 2 * TOKENS) shared.amax[threadIdx.x / TOKENS][threadIdx.x % TOKENS] = 0;
    __syncthreads();
    // Weights do not depend on what ran before; everything else may, so all but the producer wait for it.
    let_next_launch_begin();
    if (warp != PRODUCER) wait_for_launch_before();

    if (warp >= CONSUMERS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 64;");
        if (warp == PRODUCER && lane == 0) {
            Ring<STAGES> ring;
            produce<L1>(gate_up, shared, ring);
            produce<L2>(down, shared, ring);
        } else if (warp == REDUCER) {
            const int row = lane / 4, token = lane % 4 * 2;
            const float gate_scale = gate_up_scales[0], up_scale = gate_up_scales[1];
            Ring<2> partial;
            reduce<L1>(shared, partial, [&](int tile, float4 sum) {
                for (int i = 0; i < 2; i++) {
                    if (token + i >= tokens) break;
                    const float scale = shared.token_scale[0][token + i];
                    const float gate = (i ? sum.y : sum.x) * UNPACKED, up = (i ? sum.w : sum.z) * UNPACKED;
                    const float h = swiglu(gate * (scale * gate_scale), up * (scale * up_scale), limit);
                    store(&hidden_states[(size_t)(token + i) * H_STRIDE + h_position(tile * 8 + row)], h);
                }
            });
            __syncwarp();
            if (lane == 0) arrive_release(hand_over);
            const float scale_of_down = *down_scale;
            reduce<L2>(shared, partial, [&](int tile, float4 sum) {
                for (int i = 0; i < 2; i++) {
                    if (token + i >= tokens) break;
                    const float scale = shared.token_scale[1][token + i] * scale_of_down;
                    Element* to = y + (size_t)(token + i) * HIDDEN + tile * 16 + row;
                    store(to, (i ? sum.y : sum.x) * UNPACKED * scale);
                    store(to + 8, (i ? sum.w : sum.z) * UNPACKED * scale);
                }
            });
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 104;");
        Ring<STAGES> ring;
        Ring<2> partial;
        // Read before this block arrives: it has a tile of L1, which warp 0 has yet to contribute to.
        const u64 all_arrived = threadIdx.x == 0 ? (load_acquire(hand_over) / gridDim.x + 1) * gridDim.x : 0;
        {
            Fragment fragments[L1::stages];
            enter<L1, 0>(x, tokens, input_scale, shared, fragments);
            consume<L1>(shared, ring, partial, fragments);
        }
        if (threadIdx.x == 0) {
            while (load_acquire(hand_over) < all_arrived) {
            }
        }
        asm volatile("bar.sync 1, %0;" ::"n"(CONSUMERS * 32) : "memory");
        {
            Fragment fragments[L2::stages];
            enter<L2, 1>(hidden_states, tokens, hidden_scale, shared, fragments);
            consume<L2>(shared, ring, partial, fragments);
        }
    }
}
