// SPDX-License-Identifier: Apache-2.0
// A whole shared expert for up to 8 tokens in one launch: L1, clamp and SwiGLU, grid-wide hand-over, L2.
//
//   h = silu(min(x @ W1.T, L)) * clamp(x @ W3.T, -L, L)      W1, W3 interleaved 8 rows by 8: one tile, one thread
//   y = h @ W2.T
//
// Weights are the 16-row operand of mma.m16n8k16 (bf16 operands, fp32 sum), tokens the 8 columns. They come packed as
// layouts/fragments.py says: a lane's 16-byte load is its four A fragments.
//
// One persistent block per multiprocessor, as tile.cuh says; its ring runs ahead across the hand-over too.
//
// Blocks hand each other words through a mailbox in device memory, where NOT_YET says that a word has not come: h, and
// with NVFP4 activations the values of x, of which every block makes a share; of one token alone, and with FP8, every block
// makes all, which takes less than handing over. A reader asks until the word is another; that is the whole hand-over, and
// L2 begins with what is there. Launches use the two boxes in turn and empty the other.
//
// Floor: 0.5625 bytes * 3 HI read. bf16 holds exactly: code * 2^-126 (its bits, moved), block scale * 2^119 (its bits,
// moved, plus an exponent), their product code * scale * 2^-7, and NVFP4 activations. So 2^7 times the sum is exact. FP8:
// weights are as layouts/e4m3_fragments.py packs them, and become e4m3 in units of their row's amax / 448; both operands are
// multiplied as fp16, which holds them exactly.
//
// Compiled with -D: HIDDEN, INTERMEDIATE, ACTIVATIONS (0 bf16, 1 nvfp4 static, 2 dynamic, 3 per token, 4 e4m3),
// ELEMENT and RESULT (of x, of y: 0 bf16, 1 fp16, 2 fp32), STAGES, SHARED_BYTES, MAILBOX_BYTES.

#include "common.cuh"
#include "async.cuh"
#include "tile.cuh"

using L1 = Gemm<2 * INTERMEDIATE, HIDDEN>;
using L2 = Gemm<HIDDEN, INTERMEDIATE>;

// One token, to be quantised.
__device__ __forceinline__ bool is_alone(int tokens) { return ACTIVATIONS != BF16 && tokens == 1; }

struct Shared {
    Pipeline pipeline;
    alignas(16) Element x[ACTIVATIONS == BF16 ? 8 : HIDDEN];  // of a lone token; then its values, in bf16
    u64 has_box, has_x;
    u32 amax[2][TOKENS];          // of x, of h: bits of |.|, whose order is that of the values, NaN above all
    float token_scale[2][TOKENS];  // of x, of h: global scale of a token's activations
    u32 box;  // of the mailbox, this launch's
};
static_assert(sizeof(Shared) <= SHARED_BYTES, "backend.py allocates as much");

constexpr int X_STRIDE = (HIDDEN + 63) / 64 * 64, H_STRIDE = (INTERMEDIATE + 63) / 64 * 64;
struct Box {
    u32 x[TOKENS][X_STRIDE / 2];        // bf16 pairs, in the order of fragments
    u32 h[TOKENS * H_STRIDE];           // the same where h comes finished, else fp32 in the order of channels
    u32 amax[INTERMEDIATE / 8][TOKENS];  // of the 8 channels of a tile
};
#include "mailbox.cuh"
#include "entering.cuh"
#include "decode_entering.cuh"

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
                         const float* __restrict__ hidden_scale, float limit, Mailbox* mailbox, Result* __restrict__ y,
                         const BFloat16* __restrict__ gate_up_amax, const BFloat16* __restrict__ down_amax) {
    extern __shared__ __align__(128) unsigned char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;  // so the compiler knows it is one

    if (threadIdx.x == 0) {
        make_pipeline(shared.pipeline);
        barrier_init(shared_address(&shared.has_box), 1);
        barrier_init(shared_address(&shared.has_x), 1);
        barriers_are_made();
    }
    auto of_l1 = [=](int tile) { return amax_of_l1(gate_up_amax, INTERMEDIATE, tile); };  // E4M3
    auto of_l2 = [=](int tile) { return amax_of_l2(down_amax, tile); };
    if (threadIdx.x < 2 * TOKENS) shared.amax[threadIdx.x / TOKENS][threadIdx.x % TOKENS] = 0;
    __syncthreads();
    // Weights do not depend on what ran before; everything else may, so all but the producer wait for it.
    let_next_launch_begin();
    if (warp != PRODUCER) wait_for_launch_before();

    if (warp >= CONSUMERS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 64;");
        if (warp == PRODUCER && lane == 0) {
            Ring<STAGES> ring;
            for (int tile = blockIdx.x; tile < L1::tiles; tile += gridDim.x)
                produce_tile<L1>(gate_up + (size_t)tile * L1::tile_bytes, of_l1(tile), shared.pipeline, ring);
            for (int tile = blockIdx.x; tile < L2::tiles; tile += gridDim.x)
                produce_tile<L2>(down + (size_t)tile * L2::tile_bytes, of_l2(tile), shared.pipeline, ring);
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
            empty_share(&mailbox->boxes[(number + 1) % 2], sizeof(Box));
            float encode = 1.0f, decode = 1.0f;
            if (ACTIVATIONS == STATIC) global_scales(0, static_scale_at(hidden_scale), encode, decode);
            Ring<2> partial;
            for (int tile = blockIdx.x; tile < L1::tiles; tile += gridDim.x) {
                const float2 units = units_of(of_l1(tile));
                const float4 sum = reduce_tile(shared.pipeline, partial);
                partial.next();
                float h[2];
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const float scale = shared.token_scale[0][token + i];
                    const float gate = (i ? sum.y : sum.x) * units.x, up = (i ? sum.w : sum.z) * units.y;
                    h[i] = swiglu(gate * (scale * gate_scale), up * (scale * up_scale), limit);
                }
                post_h(tile, tokens, h, encode, decode, box);
            }
            for (int tile = blockIdx.x; tile < L2::tiles; tile += gridDim.x) {
                const float2 units = units_of(of_l2(tile));
                const float4 sum = reduce_tile(shared.pipeline, partial);
                partial.next();
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    if (token + i >= tokens) break;
                    const float scale = shared.token_scale[1][token + i] * scale_of_down;
                    Result* to = y + (size_t)(token + i) * HIDDEN + tile * 16 + row;
                    store(to, (i ? sum.y : sum.x) * units.x * scale);
                    store(to + 8, (i ? sum.w : sum.z) * units.y * scale);
                }
            }
            if (blockIdx.x == 0 && lane == 0) mailbox->launches = number + 1;
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 104;");
        const float static_scale = static_scale_at(input_scale), hidden_static_scale = static_scale_at(hidden_scale);
        Decoder decoder(shared.pipeline);
        Reader reader;
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
            } else if (ACTIVATIONS == E4M3) {
                Raw<Element> raw[L1::stages];
                load_raw<L1>(x, HIDDEN, tokens, false, raw);
                enter_whole<0>(raw, shared, fragments);
            } else {
                if (ACTIVATIONS != STATIC) {
                    Raw<Element> raw[L1::stages];
                    load_raw<L1>(x, HIDDEN, tokens, false, raw);
                    find_amax<0>(raw, shared);
                }
                post_share(
                    x, tokens, warp, CONSUMERS, [](int row) { return row; },
                    [&](int row, float& g, float& s) { global_scales(amax_of_token<0>(row, shared), static_scale, g, s); },
                    [&](int row) { return find_box().x[row]; });
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
            for (int tile = blockIdx.x; tile < L1::tiles; tile += gridDim.x)
                consume_tile<L1>(warp, shared.pipeline, decoder, reader, partial, fragments, [&](int stage) {
                    if (is_alone(tokens) && tile == blockIdx.x) take(stage, shared, fragments[stage]);
                });
        }
        {
            Fragment fragments[L2::stages];
            Box& box = find_box();
            const Inbox<L2> inbox(box.h, H_STRIDE / 2, tokens);
            if (ORDERED) {
                inbox.look_at_all(fragments);
            } else {
                Raw<Float32> raw[L2::stages];
                load_raw<L2>(reinterpret_cast<const Float32*>(box.h), H_STRIDE, tokens, true, raw);
                enter_whole<1>(raw, shared, fragments);
            }
            keep_token_scales<1>(hidden_static_scale, shared);
            for (int tile = blockIdx.x; tile < L2::tiles; tile += gridDim.x)
                consume_tile<L2>(warp, shared.pipeline, decoder, reader, partial, fragments, [&](int stage) {
                    if (ORDERED && tile == blockIdx.x) inbox.await(stage, fragments[stage]);
                });
        }
    }
}
