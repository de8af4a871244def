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
// with NVFP4 activations the values of x, of which every block makes a share; of one token alone every block makes all,
// which takes less than handing over. A reader asks until the word is another; that is the whole hand-over, and L2 begins
// with what is there. Launches use the two boxes in turn and empty the other.
//
// Floor: 0.5625 bytes * 3 HI read. bf16 holds exactly: code * 2^-126 (its bits, moved), block scale * 2^119 (its bits,
// moved, plus an exponent), their product code * scale * 2^-7, and NVFP4 activations. So 2^7 times the sum is exact.
//
// Compiled with -D: HIDDEN, INTERMEDIATE, ACTIVATIONS (0 bf16, 1 nvfp4 static, 2 dynamic, 3 per token),
// ELEMENT (0 bf16, 1 fp16, 2 fp32: of x and y), STAGES, SHARED_BYTES, MAILBOX_BYTES.

#include "common.cuh"
#include "async.cuh"

#define BF16 0
#define STATIC 1
#define DYNAMIC 2
#define PER_TOKEN 3

constexpr int CONSUMERS = 16, PRODUCER = 16, REDUCER = 17, COPIER = 18, THREADS = 20 * 32;  // one warp idles
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

// One token, to be quantised.
__device__ __forceinline__ bool is_alone(int tokens) { return ACTIVATIONS != BF16 && tokens == 1; }

struct Shared {
    alignas(128) unsigned char stages[STAGES][STAGE_BYTES];
    alignas(128) float4 partials[2][CONSUMERS][32];
    alignas(16) Element x[ACTIVATIONS == BF16 ? 8 : HIDDEN];  // of a lone token; then its values, in bf16
    u64 stage_full[STAGES], stage_empty[STAGES], partial_full[2], partial_empty[2], has_box, has_x;
    u32 amax[2][TOKENS];          // of x, of h: bits of |.|, whose order is that of the values, NaN above all
    float token_scale[2][TOKENS];  // of x, of h: global scale of a token's activations
    u32 scale_offsets, box;  // box: of the mailbox, this launch's
};
static_assert(sizeof(Shared) <= SHARED_BYTES, "backend.py allocates as much");

#include "mailbox.cuh"
#include "entering.cuh"

// --- weights --------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void multiply(float (&sum)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 16 rows x 64 columns against this warp's 8 tokens. have_read(): called when codes and scales are in registers for
// certain, since a product has been made of them: loads that have been issued may still be waiting their turn.
template <class HaveRead>
__device__ __forceinline__ void multiply_chunk(float (&sums)[2][4], uint4 codes, uint2 scales, u32 offsets,
                                               const Fragment& fragment, HaveRead have_read) {
    u32 a[4][4];
    decode_chunk(codes, scales, offsets, a);
#pragma unroll
    for (int j = 0; j < 4; j++) {
        multiply(sums[j % 2], a[j], fragment.b[2 * j], fragment.b[2 * j + 1]);
        if (j == 0) have_read();
    }
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

// begin(stage): called before this stage's fragment is used for the first time.
template <class G, class Begin>
__device__ __forceinline__ void consume(int warp, Shared& shared, Ring<STAGES>& ring, Ring<2>& partial,
                                        Fragment (&fragments)[G::stages], Begin begin) {
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
            if (tile == blockIdx.x) begin(stage);
            auto release = [&] {
                __syncwarp();
                if (lane == 0) barrier_arrive(empty + ring.slot * BARRIER_BYTES);
            };
            if (has_chunk)
                multiply_chunk(sums, codes, scales, offsets, fragments[stage], release);
            else
                release();
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
        barrier_init(shared_address(&shared.has_x), 1);
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
        } else if (warp == COPIER && lane == 0 && is_alone(tokens)) {
            copy_x(x, shared);
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
            if (ACTIVATIONS == STATIC) global_scales(0, static_scale_at(hidden_scale), encode, decode);
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
        const float static_scale = static_scale_at(input_scale), hidden_static_scale = static_scale_at(hidden_scale);
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
            if (is_alone(tokens)) {
                enter_alone(static_scale, shared);
            } else {
                if (ACTIVATIONS != STATIC) {
                    Raw<Element> raw[L1::stages];
                    load_raw<L1>(x, HIDDEN, tokens, false, raw);
                    find_amax<0>(raw, shared);
                }
                post_share(x, tokens, static_scale, shared, find_box);
                const Inbox<L1> inbox(&find_box().x[0][0], X_STRIDE / 2, tokens);
#pragma unroll
                for (int i = 0; i < 8; i++) fragments[0].b[i] = NOT_YET;
                inbox.await(0, fragments[0]);  // the rest is on its way then
                inbox.look_at_all(fragments);
#pragma unroll
                for (int stage = 1; stage < L1::stages; stage++) inbox.await(stage, fragments[stage]);
            }
#endif
            keep_token_scales<0>(static_scale, shared);
            consume<L1>(warp, shared, ring, partial, fragments, [&](int stage) {
                if (is_alone(tokens)) take(stage, shared, fragments[stage]);
            });
        }
        {
            Fragment fragments[L2::stages];
            Box& box = find_box();
            const Inbox<L2> inbox(box.h, H_STRIDE / 2, tokens);
            if (ORDERED)
                inbox.look_at_all(fragments);
            else
                enter_whole<L2>(box, tokens, shared, fragments);
            keep_token_scales<1>(hidden_static_scale, shared);
            consume<L2>(warp, shared, ring, partial, fragments, [&](int stage) {
                if (ORDERED) inbox.await(stage, fragments[stage]);
            });
        }
    }
}
