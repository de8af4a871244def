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
// and across the hand-over; a reducer warp adds the 16 partial sums of a tile and finishes it. Activations stay in the
// consumers' registers as B fragments.
//
// Blocks hand each other words through a mailbox in device memory, where NOT_YET says that a word has not come: h, and
// with NVFP4 activations the values of x, of which every block makes a share. A reader asks until the word is another;
// that is the whole hand-over, and L2 begins with what is there. Launches use the two boxes in turn and empty the other.
//
// Floor: 0.5625 bytes * 3 HI read. bf16 holds exactly: code * 2^-126 (its bits, moved), block scale * 2^119 (its bits,
// moved, plus an exponent), their product code * scale * 2^-7, and NVFP4 activations. So 2^7 times the sum is exact.
//
// Compiled with -D: HIDDEN, INTERMEDIATE, ACTIVATIONS (0 bf16, 1 nvfp4 static, 2 dynamic, 3 per token),
// ELEMENT (0 bf16, 1 fp16, 2 fp32: of x and y), STAGES, MAILBOX_BYTES.

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
    u64 stage_full[STAGES], stage_empty[STAGES], partial_full[2], partial_empty[2], has_box;
    u32 amax[2][TOKENS];          // of x, of h: bits of |.|, whose order is that of the values, NaN above all
    float token_scale[2][TOKENS];  // of x, of h: global scale of a token's activations
    u32 scale_offsets, box;  // box: of the mailbox, this launch's
};

#include "mailbox.cuh"

// --- activations ----------------------------------------------------------------------------------------------------

// h is finished by the reducer but where its scale needs all of it.
constexpr bool ORDERED = ACTIVATIONS == BF16 || ACTIVATIONS == STATIC;

// From 16 consecutive columns in each lane of four to fragments: lane c gives its words to the lanes that multiply them.
__device__ __forceinline__ void exchange(Fragment& fragment) {
    u32 halves[2][4];  // words of the first and of the second 8 columns
#pragma unroll
    for (int i = 0; i < 8; i++) halves[i / 4][i % 4] = fragment.b[i];
    transpose_quad(halves[0]), transpose_quad(halves[1]);
#pragma unroll
    for (int j = 0; j < 4; j++) fragment.b[2 * j] = halves[0][j], fragment.b[2 * j + 1] = halves[1][j];
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

__device__ __forceinline__ void consumers_sync() { sync_threads(1, CONSUMERS * 32); }

// The consumers' raw columns, one token per group of four lanes; fp32 from the mailbox is awaited.
template <class G, class Source>
__device__ __forceinline__ void load_raw(const Source* source, int stride, int tokens, bool awaited,
                                         Raw<Source> (&raw)[G::stages]) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, token = lane / 4;
    bool all;
    do {
        all = true;
#pragma unroll
        for (int stage = 0; stage < G::stages; stage++) {
            const int column = (stage * CONSUMERS + warp) * 64 + lane % 4 * BLOCK;
            raw[stage] = Raw<Source>{};
            if (token < tokens && column < G::columns) {
                const Source* from = source + (size_t)token * stride + column;
#pragma unroll
                for (int i = 0; i < (int)sizeof(Source); i++) {
                    const uint4 v = peek_16(reinterpret_cast<const uint4*>(from) + i);
                    all = all && v.x != NOT_YET && v.y != NOT_YET && v.z != NOT_YET && v.w != NOT_YET;
                    raw[stage].words[i] = v;
                }
            }
        }
    } while (awaited && !all);
    __syncwarp();
}

// What activations' global scales are made of, over the consumers: shared.amax of a token, or with "dynamic" of all in [0].
template <int PHASE, class Source, int STAGE_COUNT>
__device__ __forceinline__ void find_amax(Raw<Source> (&raw)[STAGE_COUNT], Shared& shared) {
    const int lane = threadIdx.x % 32;
    u32 largest = 0;
#pragma unroll
    for (int stage = 0; stage < STAGE_COUNT; stage++) {
        float v[16];
        unpack16(raw[stage], v);
        largest = max(largest, amax16(v));
        forget(raw[stage]);
    }
#pragma unroll
    for (int i = 1; i < 32; i *= 2) {
        const u32 other = __shfl_xor_sync(~0u, largest, i);
        if (i < 4 || ACTIVATIONS == DYNAMIC) largest = max(largest, other);
    }
    if (lane % 4 == 0) atomicMax(&shared.amax[PHASE][ACTIVATIONS == DYNAMIC ? 0 : lane / 4], largest);
    consumers_sync();
}

template <int PHASE>
__device__ __forceinline__ u32 amax_of_token(int token, const Shared& shared) {
    return shared.amax[PHASE][ACTIVATIONS == DYNAMIC ? 0 : token];
}

// The tokens' scales go to shared memory, where the reducer finds them with the first tile.
template <int PHASE>
__device__ __forceinline__ void keep_token_scales(const float* static_scale, Shared& shared) {
    if (threadIdx.x >= TOKENS) return;
    float g, s = 1.0f;
    if (ACTIVATIONS != BF16) global_scales(amax_of_token<PHASE>(threadIdx.x, shared), static_scale, g, s);
    shared.token_scale[PHASE][threadIdx.x] = s;
}

// x as it is, in bf16.
template <class G>
__device__ __forceinline__ void enter_bf16(const Element* x, int tokens, Fragment (&fragments)[G::stages]) {
    Raw<Element> raw[G::stages];
    load_raw<G>(x, G::columns, tokens, false, raw);
#pragma unroll
    for (int stage = 0; stage < G::stages; stage++) {
        if (is_bf16<Element>()) {
#pragma unroll
            for (int i = 0; i < 8; i++) fragments[stage].b[i] = reinterpret_cast<const u32*>(&raw[stage].words[0])[i];
        } else {
            float v[16];
            unpack16(raw[stage], v);
#pragma unroll
            for (int i = 0; i < 8; i++) fragments[stage].b[i] = bf16_pair(v[2 * i], v[2 * i + 1]);
        }
        exchange(fragments[stage]);
    }
}

// This block's share of x to NVFP4 values for all blocks: four lanes a block of 16, each the two words it would multiply.
template <class FindBox>
__device__ __forceinline__ void post_share(const Element* x, int tokens, const float* static_scale, const Shared& shared,
                                           FindBox find_box) {
    constexpr int BLOCKS = HIDDEN / BLOCK;
    const int c = threadIdx.x % 4, step = gridDim.x * CONSUMERS * 8;
    for (int first = (blockIdx.x + threadIdx.x / 32 * gridDim.x) * 8; first < tokens * BLOCKS; first += step) {
        const int i = first + threadIdx.x % 32 / 4;
        const bool is_one = i < tokens * BLOCKS;
        const int token = is_one ? i / BLOCKS : 0, column = is_one ? i % BLOCKS * BLOCK + 2 * c : 2 * c;
        float v[4], g, s;
        load_pair(x + (size_t)token * HIDDEN + column, v[0], v[1]);
        load_pair(x + (size_t)token * HIDDEN + column + 8, v[2], v[3]);
        global_scales(amax_of_token<0>(token, shared), static_scale, g, s);
        u32 largest = 0;
#pragma unroll
        for (int e = 0; e < 4; e++) largest = max(largest, __float_as_uint(v[e]) & 0x7FFFFFFFu);
        largest = max(largest, __shfl_xor_sync(~0u, largest, 1));
        largest = max(largest, __shfl_xor_sync(~0u, largest, 2));
        const BlockScale block = block_scale(largest, g, s);
#pragma unroll
        for (int e = 0; e < 4; e++) v[e] = quantize_value(v[e], block);
        if (is_one) post(&find_box().x[token][pair_position(column)], make_uint2(bf16_pair(v[0], v[1]), bf16_pair(v[2], v[3])));
    }
}

// h, fp32, to NVFP4 values with a scale that takes all of it.
template <class G>
__device__ __forceinline__ void enter_whole(const Box& box, int tokens, Shared& shared, Fragment (&fragments)[G::stages]) {
    Raw<Float32> raw[G::stages];
    load_raw<G>(reinterpret_cast<const Float32*>(box.h), H_STRIDE, tokens, true, raw);
    find_amax<1>(raw, shared);
    float g, s;
    global_scales(amax_of_token<1>(threadIdx.x % 32 / 4, shared), nullptr, g, s);
#pragma unroll
    for (int stage = 0; stage < G::stages; stage++) {
        float v[16];
        unpack16(raw[stage], v);
        quantize_block(v, g, s);
#pragma unroll
        for (int i = 0; i < 8; i++) fragments[stage].b[i] = bf16_pair(v[2 * i], v[2 * i + 1]);
        exchange(fragments[stage]);
    }
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
__device__ __forceinline__ void multiply_chunk(float (&sums)[2][4], uint4 codes, uint2 scales, u32 offsets,
                                               const Fragment& fragment) {
    u32 a[4][4];
    decode_chunk(codes, scales, offsets, a);
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

// await(stage): called before this stage's fragment is used for the first time.
template <class G, class Await>
__device__ __forceinline__ void consume(int warp, Shared& shared, Ring<STAGES>& ring, Ring<2>& partial,
                                        Fragment (&fragments)[G::stages], Await await) {
    const int lane = threadIdx.x % 32;
    const u32 offsets = load_4(shared_address(&shared.scale_offsets));
    const Address chunk = shared_address(shared.stages[0]) + warp * CHUNK_BYTES;
    const Address full = shared_address(shared.stage_full), empty = shared_address(shared.stage_empty);
    for (int tile = blockIdx.x; tile < G::tiles; tile += gridDim.x) {
        float sums[2][4] = {};
#pragma unroll
        for (int stage = 0; stage < G::stages; stage++, ring.next()) {
            const bool has_chunk = G::chunks % CONSUMERS == 0 || warp < G::chunks_in(stage);
            barrier_wait(full + ring.slot * BARRIER_BYTES, ring.parity);
            uint4 codes = {};
            uint2 scales = {};
            if (has_chunk) {
                const Address from = chunk + ring.slot * STAGE_BYTES;
                codes = load_16(from + lane * 16);
                scales = load_8(from + CODE_BYTES + lane / 4 * 8);
            }
            __syncwarp();
            if (lane == 0) barrier_arrive(empty + ring.slot * BARRIER_BYTES);
            if (tile == blockIdx.x) await(stage);
            if (has_chunk) multiply_chunk(sums, codes, scales, offsets, fragments[stage]);
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

// h of a tile, rows g = lane / 4 and tokens 2 c, 2 c + 1, to the mailbox. encode, decode: its static scale, if it has one.
__device__ __forceinline__ void post_h(int tile, int tokens, float (&h)[2], float encode, float decode, Box& box) {
    const int lane = threadIdx.x % 32, g = lane / 4, token = lane % 4 * 2;
    if (!ORDERED) {
#pragma unroll
        for (int i = 0; i < 2; i++)
            if (token + i < tokens) post(&box.h[(token + i) * H_STRIDE + tile * 8 + g], __float_as_uint(h[i]));
        return;
    }
    if (ACTIVATIONS == STATIC) {  // a block of 16 channels is this tile and its neighbour, which another block has
        u32 largest[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            largest[i] = __float_as_uint(h[i]) & 0x7FFFFFFFu;
#pragma unroll
            for (int other = 4; other < 32; other *= 2) largest[i] = max(largest[i], __shfl_xor_sync(~0u, largest[i], other));
        }
        if (g == 0) post(&box.amax[tile][token], make_uint2(largest[0], largest[1]));
        uint2 neighbour;
        do neighbour = peek_8(&box.amax[tile ^ 1][token]);
        while (neighbour.x == NOT_YET || neighbour.y == NOT_YET);
        __syncwarp();
        h[0] = quantize_value(h[0], block_scale(max(largest[0], neighbour.x), encode, decode));
        h[1] = quantize_value(h[1], block_scale(max(largest[1], neighbour.y), encode, decode));
    }
    // Whole words: lanes of even rows take token 2 c, of odd rows 2 c + 1, and give the other to their neighbour.
    const bool odd = g % 2;
    const float got = __shfl_xor_sync(~0u, odd ? h[0] : h[1], 4);
    const u32 pair = odd ? bf16_pair(got, h[1]) : bf16_pair(h[0], got);
    if (token + odd < tokens) post(&box.h[(token + odd) * (H_STRIDE / 2) + pair_position(tile * 8 + g - odd)], pair);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    shared_expert_decode(const Element* __restrict__ x, int tokens, const unsigned char* __restrict__ gate_up,
                         const float* __restrict__ gate_up_scales, const unsigned char* __restrict__ down,
                         const float* __restrict__ down_scale, const float* __restrict__ input_scale,
                         const float* __restrict__ hidden_scale, float limit, Mailbox* mailbox, Element* __restrict__ y) {
    extern __shared__ __align__(128) unsigned char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;  // so the compiler knows it is one

    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            barrier_init(shared_address(&shared.stage_full[i]), 1);
            barrier_init(shared_address(&shared.stage_empty[i]), CONSUMERS);
        }
        for (int i = 0; i < 2; i++) {
            barrier_init(shared_address(&shared.partial_full[i]), CONSUMERS);
            barrier_init(shared_address(&shared.partial_empty[i]), 1);
        }
        barrier_init(shared_address(&shared.has_box), 1);
        barriers_are_made();
        shared.scale_offsets = SCALE_OFFSETS;
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
            const float gate_scale = gate_up_scales[0], up_scale = gate_up_scales[1], scale_of_down = *down_scale;
            const u32 number = launch_number(*mailbox);
            if (lane == 0) {
                shared.box = number % 2;
                barrier_arrive(shared_address(&shared.has_box));
            }
            Box& box = mailbox->boxes[number % 2];
            empty_share(mailbox->boxes[(number + 1) % 2]);
            float encode = 1.0f, decode = 1.0f;
            if (ACTIVATIONS == STATIC) global_scales(0, hidden_scale, encode, decode);
            Ring<2> partial;
            reduce<L1>(shared, partial, [&](int tile, float4 sum) {
                float h[2];
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const float scale = shared.token_scale[0][token + i];
                    const float gate = (i ? sum.y : sum.x) * UNPACKED, up = (i ? sum.w : sum.z) * UNPACKED;
                    h[i] = swiglu(gate * (scale * gate_scale), up * (scale * up_scale), limit);
                }
                post_h(tile, tokens, h, encode, decode, box);
            });
            reduce<L2>(shared, partial, [&](int tile, float4 sum) {
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    if (token + i >= tokens) break;
                    const float scale = shared.token_scale[1][token + i] * scale_of_down;
                    Element* to = y + (size_t)(token + i) * HIDDEN + tile * 16 + row;
                    store(to, (i ? sum.y : sum.x) * UNPACKED * scale);
                    store(to + 8, (i ? sum.w : sum.z) * UNPACKED * scale);
                }
            });
            if (blockIdx.x == 0 && lane == 0) mailbox->launches = number + 1;
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 104;");
        Ring<STAGES> ring;
        Ring<2> partial;
        auto find_box = [&]() -> Box& {
            barrier_wait(shared_address(&shared.has_box), 0);
            return mailbox->boxes[shared.box];
        };
        {
            Fragment fragments[L1::stages];
#if ACTIVATIONS == BF16
            enter_bf16<L1>(x, tokens, fragments);
#else
#if ACTIVATIONS != STATIC
            {
                Raw<Element> raw[L1::stages];
                load_raw<L1>(x, HIDDEN, tokens, false, raw);
                find_amax<0>(raw, shared);
            }
#endif
            post_share(x, tokens, input_scale, shared, find_box);
            const Inbox<L1> inbox(&find_box().x[0][0], X_STRIDE / 2, tokens);
#pragma unroll
            for (int i = 0; i < 8; i++) fragments[0].b[i] = NOT_YET;
            inbox.await(0, fragments[0]);  // the rest is on its way then
            inbox.look_at_all(fragments);
#pragma unroll
            for (int stage = 1; stage < L1::stages; stage++) inbox.await(stage, fragments[stage]);
#endif
            keep_token_scales<0>(input_scale, shared);
            consume<L1>(warp, shared, ring, partial, fragments, [](int) {});
        }
        {
            Fragment fragments[L2::stages];
            Box& box = find_box();
            const Inbox<L2> inbox(box.h, H_STRIDE / 2, tokens);
            if (ORDERED)
                inbox.look_at_all(fragments);
            else
                enter_whole<L2>(box, tokens, shared, fragments);
            keep_token_scales<1>(hidden_scale, shared);
            consume<L2>(warp, shared, ring, partial, fragments, [&](int stage) {
                if (ORDERED) inbox.await(stage, fragments[stage]);
            });
        }
    }
}
