// SPDX-License-Identifier: Apache-2.0
// Packed NVFP4 weights times bf16 activations on Hopper's tensor cores, for 9 tokens and more: half of the layer a launch.
//
//   GATE_UP   h = silu(min(gate, L)) * clamp(up, -L, L), gate and up = x @ W1.T, x @ W3.T       never more than I columns
//   DOWN      y = h @ W2.T
//
// Weights are the 64-row operand of wgmma, tokens its columns. A block owns 64 ROW_GROUPS weight rows and TOKENS tokens.
// Two producer threads, of weights and of activations, keep a ring of STAGES stages filled; ROW_GROUPS x COLUMN_GROUPS
// consumer warpgroups each take 64 rows and two chunks (of 64 columns) of a stage, and decode the weights of a chunk in
// registers (16 bytes a lane are its A operands, layouts/fragments.py) while the wgmmas of the chunk before run.
// Gate and up, interleaved 8 rows by 8, meet in one thread, so SwiGLU needs no exchange.
//
// K may be cut twice: in SPLIT runs, one for each block of a cluster, and within a block among COLUMN_GROUPS. The sums of
// these PARTS meet in shared memory (distributed, with SPLIT), where each part adds all of them, in order, for its share
// of the tokens.
// With one part blocks are persistent. A token's result depends on PARTS and on nothing else of the batch.
//
// GROUPED: weights of several experts, one after the other, and a list of tiles that group.cu made: rows of activations
// and their expert. A tile of few rows is multiplied by narrower wgmmas. One part only.
//
// Floor: max(0.5625 bytes per weight, 2 flops per weight and token). In between, decoding: a warp issues about 83
// instructions for 16 rows x 64 columns, 45 of them on the pipe that takes one every other cycle, whatever TOKENS is.
//
// Compiled with -D: GATE_UP (else DOWN), ROW_GROUPS, COLUMN_GROUPS, TOKENS, SPLIT, STAGES, REGISTERS (of a consumer
//   thread), SHARED_BYTES (of the launch), GROUPED and OUT: 0 bf16, 1 fp16, 2 fp32, 3 (GATE_UP) NVFP4 values as bf16,
//   quantised with a static scale.

#include "common.cuh"
#include "async.cuh"

#define BF16 0
#define FP16 1
#define FP32 2
#define NVFP4 3

#define PARTED (SPLIT * COLUMN_GROUPS > 1)

constexpr int WARPGROUPS = ROW_GROUPS * COLUMN_GROUPS, CONSUMERS = 4 * WARPGROUPS, THREADS = 128 * (WARPGROUPS + 1);
// GROUPED: widths of wgmma, narrowest and step. Registers are not enough for more of them.
constexpr int NARROWEST = TOKENS >= 96 ? TOKENS - 16 : TOKENS / 2, NARROWER = TOKENS < 96 ? TOKENS / 2 : OUT == NVFP4 ? 16 : 8;

constexpr int ROWS = 64 * ROW_GROUPS, ROW_WARPS = 4 * ROW_GROUPS, PARTS = SPLIT * COLUMN_GROUPS;
constexpr int WEIGHT_BYTES = ROW_WARPS * CHUNK_BYTES, TOKEN_BYTES = TOKENS * 128;  // of a chunk
constexpr int STAGE_CHUNKS = 2 * COLUMN_GROUPS, GROUPS = TOKENS / 8;               // of 64 columns; of 8 tokens
constexpr int SHARE = (GROUPS + PARTS - 1) / PARTS;                                // that a part finishes, at most
__device__ constexpr int first_group(int part) { return GROUPS * part / PARTS; }
__device__ constexpr int part_of(int group) {
    int part = 0;
    while (group >= first_group(part + 1)) part++;
    return part;
}

constexpr int SCALE_OF_TOKEN = 1, SCALE_OF_EXPERT = 2;  // 0: of all

struct TokenTile {
    int expert, first, end, unused;  // rows [first, end) of the activations
};

struct Arguments {
    TensorMap weights;      // (experts x tiles of 16 rows, chunks, 144) words, box (ROW_WARPS, STAGE_CHUNKS, 144)
    TensorMap activations;  // (tokens, columns) bf16, box (TOKENS, 64), 128-byte swizzle
    const float* weight_scales;  // of each expert; GATE_UP: of gate, of up; DOWN: of down
    const float* token_scales;   // of the activations: one, one a token, or one an expert; null: 1
    const float* hidden_scale;   // NVFP4: the static scale of h, of each expert
    void* out;                   // (tokens, rows / 2 or rows)
    int scaling, tokens, rows, chunks;
    float limit;
#if GROUPED
    const TokenTile* token_tiles;
    const int* token_tile_count;
    const float* row_weights;  // of each row of the activations, for what comes out; null: 1
#endif
};

struct Scales {
    float factors[GATE_UP ? 2 : 1], hidden;
};

struct Tile {
    TokenTile tokens;
    Scales scales;
};

struct Shared {
    union {
        struct {
            alignas(1024) unsigned char activations[STAGES][STAGE_CHUNKS][TOKEN_BYTES];
            alignas(128) unsigned char weights[STAGES][STAGE_CHUNKS * WEIGHT_BYTES];  // [row warp][chunk]
        };
        float4 sums[PARTS > 1 ? PARTS : 1][PARTS > 1 ? COLUMN_GROUPS * SHARE : 1][ROW_WARPS * 32];
    };
    u64 full[STAGES], empty[STAGES], summed;
    u32 scale_offsets;
#if GROUPED
    Tile tiles[STAGES + 1];  // as many as a producer can be ahead, and the one that is being finished
#else
    Scales scales[CONSUMERS];
#endif
#if OUT == NVFP4
    u32 amax[CONSUMERS][32];  // of 32 tokens at a time
    alignas(16) float2 block_scales[CONSUMERS][32];
#endif
};
static_assert(sizeof(Shared) <= SHARED_BYTES, "the launch must ask for as much");

// A block's tiles, one after the other, and its run of stages: [begin, end) of K. Grouped, it may be made only when the
// launch before has ended.
struct Work {
    int row_tiles, tile, tiles, step, begin, end;

    __device__ Work(const Arguments& arguments, int split) {
        row_tiles = (arguments.rows + ROWS - 1) / ROWS;
#if GROUPED
        tiles = row_tiles * __ldcg(arguments.token_tile_count);
#else
        tiles = row_tiles * ((arguments.tokens + TOKENS - 1) / TOKENS);
#endif
        tile = blockIdx.x / SPLIT, step = gridDim.x / SPLIT;
        const int stages = (arguments.chunks + STAGE_CHUNKS - 1) / STAGE_CHUNKS;
        begin = stages * split / SPLIT, end = stages * (split + 1) / SPLIT;
    }
    __device__ bool more() const { return tile < tiles; }
    __device__ void next() { tile += step; }
    __device__ int row() const { return tile % row_tiles * ROWS; }
    __device__ TokenTile tokens(const Arguments& arguments, int tile) const {
        if (tile >= tiles) return {};
        const int index = tile / row_tiles;
#if GROUPED
        const int4 found = __ldcg(reinterpret_cast<const int4*>(arguments.token_tiles) + index);
        return {found.x, found.y, found.z};
#else
        return {0, index * TOKENS, arguments.tokens};
#endif
    }
};

// Calls copy(slot, row, tokens, stage) for every stage of this block's work as soon as its slot is free.
template <class Copy>
__device__ __forceinline__ void produce(const Arguments& arguments, int split, Address empty, Copy copy) {
    Ring<STAGES> ring;
    Work work(arguments, split);
    TokenTile tokens = work.tokens(arguments, work.tile);
    for (; work.more(); work.next()) {
        const TokenTile upcoming = work.tokens(arguments, work.tile + work.step);  // asked for a tile ahead
        const int row = work.row();
#pragma unroll 1
        for (int stage = work.begin; stage < work.end; stage++, ring.next()) {
            barrier_wait(empty + ring.slot * BARRIER_BYTES, ring.parity ^ 1);
            copy(ring.slot, row, tokens, stage);
        }
        tokens = upcoming;
    }
}

// The sums over this warpgroup's columns, 64 rows x N tokens; sums[4 i + 2 h + e]: row g + 8 h, token 8 i + 2 c + e.
template <int N>
__device__ __forceinline__ void multiply(int steps, int row_warp, int column_group, const Shared& shared,
                                         Ring<STAGES>& ring, float (&all_sums)[TOKENS / 2]) {
    auto& sums = reinterpret_cast<float (&)[N / 2]>(all_sums);
    const int lane = threadIdx.x % 32;
    const Address full = shared_address(shared.full), empty = shared_address(shared.empty);
    const Address weights =
        shared_address(shared.weights) + (row_warp * STAGE_CHUNKS + 2 * column_group) * CHUNK_BYTES;
    const u32 operand = mma_operand(shared_address(shared.activations[0][2 * column_group]));
    const u32 offsets = load_4(shared_address(&shared.scale_offsets));
    u32 first[4][4], second[4][4];
    u32 before = 0;
    for (int i = 0; i < steps; i++) {
        const Address from = weights + ring.slot * (STAGE_CHUNKS * WEIGHT_BYTES);
        const u32 b = operand + ring.slot * (STAGE_CHUNKS * TOKEN_BYTES / 16);
        barrier_wait(full + ring.slot * BARRIER_BYTES, ring.parity);
        const Address codes_of_lane = from + lane * 16, scales_of_lane = from + CODE_BYTES + lane / 4 * 8;
        const uint4 codes = load_16(codes_of_lane), more_codes = load_16(codes_of_lane + CHUNK_BYTES);
        const uint2 scales = load_8(scales_of_lane), more_scales = load_8(scales_of_lane + CHUNK_BYTES);
        decode_chunk(codes, scales, offsets, first);
        mma_fence();
#pragma unroll
        for (int j = 0; j < 4; j++) mma_async<N>(sums, first[j], b + 2 * j);
        mma_commit();
        mma_wait<1>();  // the stage before has been read: its slot may be filled again
        if (i > 0 && lane == 0) barrier_arrive(empty + before * BARRIER_BYTES);
        decode_chunk(more_codes, more_scales, offsets, second);
        mma_fence();
#pragma unroll
        for (int j = 0; j < 4; j++) mma_async<N>(sums, second[j], b + TOKEN_BYTES / 16 + 2 * j);
        mma_commit();
        mma_wait<1>();
        before = ring.slot;
        ring.next();
    }
    mma_wait<0>();
    if (lane == 0) barrier_arrive(empty + before * BARRIER_BYTES);
#pragma unroll
    for (int i = 0; i < N / 2; i++) asm volatile("" : "+f"(sums[i])::"memory");
}

// By the narrowest of two or three widths that holds `count` tokens; the registers are not enough for more.
template <int N = NARROWEST>
__device__ __forceinline__ void multiply_few(int count, int steps, int row_warp, int column_group, const Shared& shared,
                                             Ring<STAGES>& ring, float (&sums)[TOKENS / 2]) {
    if (N == TOKENS || count <= N)
        multiply<N>(steps, row_warp, column_group, shared, ring, sums);
    else
        multiply_few<N == TOKENS ? N : N + NARROWER>(count, steps, row_warp, column_group, shared, ring, sums);
}

// Sends every group of tokens to the part that finishes it; returns the whole sums of this part's share.
__device__ __forceinline__ void exchange(int part, Shared& shared, const float (&sums)[TOKENS / 2], float (&whole)[SHARE * 4]) {
    const int place = threadIdx.x % (ROW_WARPS * 32), share = part % COLUMN_GROUPS * SHARE;
    // The ring is not used again: the sums lie in its place.
#if SPLIT > 1
    const Address summed = shared_address(&shared.summed);
    cluster_sync();
#else
    sync_threads(1, CONSUMERS * 32);
#endif
#pragma unroll
    for (int i = 0; i < GROUPS; i++) {
        const int to = part_of(i);
        float4* at = &shared.sums[part][to % COLUMN_GROUPS * SHARE + i - first_group(to)][place];
        const float4 v = make_float4(sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]);
#if SPLIT > 1
        send(shared_address(at), to / COLUMN_GROUPS, summed, v);
#else
        *at = v;
#endif
    }
#if SPLIT > 1
    barrier_wait_cluster(summed, 0);
#else
    sync_threads(1, CONSUMERS * 32);
#endif
#pragma unroll
    for (int i = 0; i < SHARE; i++) {
        float4 sum = shared.sums[0][share + i][place];
#pragma unroll
        for (int other = 1; other < PARTS; other++) {
            const float4 more = shared.sums[other][share + i][place];
            sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
        }
        whole[4 * i] = sum.x, whole[4 * i + 1] = sum.y, whole[4 * i + 2] = sum.z, whole[4 * i + 3] = sum.w;
    }
}

__device__ __forceinline__ u32 transposed(u32 pair) {
    u32 result;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(pair));
    return result;
}

// Eight rows by eight tokens, v[e] of row g and token 2 c + e, to out[token][row]: a lane writes rows 2 c, 2 c + 1 of token g.
__device__ __forceinline__ void store_8x8(void* out, size_t stride, int row, int token, int tokens, float v0, float v1) {
    const int lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
#if OUT == FP32
    float* to = reinterpret_cast<float*>(out) + (token + 2 * c) * stride + row + g;
    if (token + 2 * c < tokens) to[0] = v0;
    if (token + 2 * c + 1 < tokens) to[stride] = v1;
#else
#if OUT == FP16
    u32 pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(v1), "f"(v0));
#else
    u32 pair = bf16_pair(v0, v1);
#endif
    pair = transposed(pair);
    if (token + g < tokens) reinterpret_cast<u32*>(reinterpret_cast<u16*>(out) + (token + g) * stride + row)[c] = pair;
#endif
}

#if OUT == NVFP4
// One round of finding the largest |.| over the lanes of a column, the rows g of token c: a lane hands half of its values
// to the lane at `distance` and takes the larger of the other half. Which half it keeps is the bit of its g.
template <int VALUES>
__device__ __forceinline__ void halve(u32 (&values)[8], int distance) {
    const bool upper = threadIdx.x & distance;
#pragma unroll
    for (int i = 0; i < VALUES / 2; i++) {
        const u32 got = __shfl_xor_sync(~0u, upper ? values[i] : values[i + VALUES / 2], distance);
        values[i] = max(upper ? values[i + VALUES / 2] : values[i], got);
    }
}

// h to NVFP4 values. A block of 16 channels is that of two neighbouring warps. Of 32 tokens at a time, each lane finds the
// largest value and the scale of one, for all lanes of its warp to take.
__device__ __forceinline__ void quantize_share(float s, Shared& shared, float (&h)[SHARE * 4]) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, c = lane % 4;
    const float g = __frcp_rn(s);
#pragma unroll
    for (int first = 0; first < SHARE; first += 4) {
        u32 largest[8];  // [4 e + i]: of token 8 i + 2 c + e
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int e = 0; e < 2; e++)
                largest[4 * e + i] = first + i < SHARE ? __float_as_uint(h[4 * (first + i) + e]) & 0x7FFFFFFFu : 0;
        halve<8>(largest, 16), halve<4>(largest, 8), halve<2>(largest, 4);
        // This lane's: e is the upper bit of its row g, i the two others.
        const int token = lane / 4 % 4 * 8 + 2 * c + lane / 16;
        shared.amax[warp][token] = largest[0];
        sync_threads(2 + warp / 2, 64);
        const BlockScale block = block_scale(max(largest[0], shared.amax[warp ^ 1][token]), g, s);
        shared.block_scales[warp][token] = make_float2(block.scale, block.inverse);
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 4 && first + i < SHARE; i++) {
            const float4 scales = reinterpret_cast<const float4*>(&shared.block_scales[warp][8 * i])[c];
            float* of_group = h + 4 * (first + i);
            of_group[0] = quantize_value(of_group[0], {scales.x, scales.y});
            of_group[1] = quantize_value(of_group[1], {scales.z, scales.w});
        }
        sync_threads(2 + warp / 2, 64);  // both have read
    }
}
#endif

// What sums are multiplied by: the weights' scales, times the activations' if they share one. Asked for before there are
// sums, and kept out of the registers meanwhile, in shared memory.
__device__ __forceinline__ Scales load_scales(const Arguments& arguments, int expert) {
    constexpr int HALVES = GATE_UP ? 2 : 1;
    Scales scales;
    const bool shared_by_tokens = arguments.token_scales && arguments.scaling != SCALE_OF_TOKEN;
    const int index = arguments.scaling == SCALE_OF_EXPERT ? expert : 0;
    const float tokens = shared_by_tokens ? __ldcg(arguments.token_scales + index) : 1.0f;
#pragma unroll
    for (int i = 0; i < HALVES; i++) scales.factors[i] = tokens * arguments.weight_scales[expert * HALVES + i];
    scales.hidden = OUT == NVFP4 ? __ldcg(arguments.hidden_scale + expert) : 0.0f;
    return scales;
}

__device__ __forceinline__ float scale_of(const Arguments& arguments, int token, int end) {
    return arguments.scaling == SCALE_OF_TOKEN && token < end ? __ldcg(arguments.token_scales + token) : 1.0f;
}

__device__ __forceinline__ float weight_of(const Arguments& arguments, int token, int end) {
#if GROUPED
    if (arguments.row_weights && token < end) return __ldcg(arguments.row_weights + token);
#endif
    return 1.0f;
}

// Scales, SwiGLU and the result's format for 16 rows from `row` and the tokens [first_token, end_token).
__device__ __forceinline__ void finish(const Arguments& arguments, const Scales& scales, int row, int first_token,
                                       int end_token, Shared& shared, float (&sums)[SHARE * 4]) {
    const int c = threadIdx.x % 4;
#if GATE_UP
#pragma unroll
    for (int i = 0; i < SHARE; i++) {
        if (GROUPED && first_token + 8 * i >= end_token) break;
#pragma unroll
        for (int e = 0; e < 2; e++) {
            const int token = first_token + 8 * i + 2 * c + e;
            const float scale = scale_of(arguments, token, end_token);
            const float gate = sums[4 * i + e] * UNPACKED, up = sums[4 * i + 2 + e] * UNPACKED;
            sums[4 * i + e] = swiglu(gate * (scale * scales.factors[0]), up * (scale * scales.factors[1]), arguments.limit) *
                              weight_of(arguments, token, end_token);
        }
    }
#if OUT == NVFP4
    quantize_share(scales.hidden, shared, sums);
#endif
    if (row >= arguments.rows) return;
#pragma unroll
    for (int i = 0; i < SHARE; i++)
        store_8x8(arguments.out, arguments.rows / 2, row / 2, first_token + 8 * i, end_token, sums[4 * i], sums[4 * i + 1]);
#else
    if (row >= arguments.rows) return;
#pragma unroll
    for (int i = 0; i < SHARE; i++) {
        const int token = first_token + 8 * i, mine = token + 2 * c;
        if (GROUPED && token >= end_token) break;
        const float scale_0 = scale_of(arguments, mine, end_token) * scales.factors[0];
        const float scale_1 = scale_of(arguments, mine + 1, end_token) * scales.factors[0];
        const float weight_0 = weight_of(arguments, mine, end_token), weight_1 = weight_of(arguments, mine + 1, end_token);
#pragma unroll
        for (int h = 0; h < 2; h++)
            store_8x8(arguments.out, arguments.rows, row + 8 * h, token, end_token,
                      sums[4 * i + 2 * h] * UNPACKED * scale_0 * weight_0,
                      sums[4 * i + 2 * h + 1] * UNPACKED * scale_1 * weight_1);
    }
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) shared_expert_gemm(const __grid_constant__ Arguments arguments) {
    extern __shared__ __align__(1024) unsigned char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;  // so the compiler knows it is one
    const Address full = shared_address(shared.full), empty = shared_address(shared.empty);
    const int split = SPLIT > 1 ? (int)cluster_rank() : 0;

    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            barrier_init(full + i * BARRIER_BYTES, 2);  // a producer each
            barrier_init(empty + i * BARRIER_BYTES, CONSUMERS);
        }
#if SPLIT > 1
        barrier_init(shared_address(&shared.summed), 1);
#endif
        barriers_are_made();
        shared.scale_offsets = SCALE_OFFSETS;
#if SPLIT > 1
        const int groups = first_group((split + 1) * COLUMN_GROUPS) - first_group(split * COLUMN_GROUPS);
        barrier_expect(shared_address(&shared.summed), PARTS * groups * ROW_WARPS * 32 * sizeof(float4));
#endif
    }
    __syncthreads();
    if (SPLIT > 1) cluster_sync();
    let_next_launch_begin();

    if (warp >= CONSUMERS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(WARPGROUPS == 4 ? 32 : 40));
        if (warp == CONSUMERS && lane == 0) {
            if (GROUPED) wait_for_launch_before();  // it says which weights; else they do not depend on it
            const Address weights = shared_address(shared.weights);
#if GROUPED
            Ring<STAGES + 1> place;
#endif
            produce(arguments, split, empty, [&](u32 slot, int row, const TokenTile& tokens, int stage) {
                const Address barrier = full + slot * BARRIER_BYTES;
#if GROUPED
                if (stage == 0) {
                    shared.tiles[place.slot] = {tokens, load_scales(arguments, tokens.expert)};
                    place.next();
                }
#endif
                barrier_expect(barrier, STAGE_CHUNKS * WEIGHT_BYTES);
                copy_box(weights + slot * (STAGE_CHUNKS * WEIGHT_BYTES), arguments.weights, 0, stage * STAGE_CHUNKS,
                         (tokens.expert * arguments.rows + row) / 16, barrier);
            });
        }
        if (warp == CONSUMERS + 1 && lane == 0) {
            wait_for_launch_before();
            const Address activations = shared_address(shared.activations);
            produce(arguments, split, empty, [&](u32 slot, int, const TokenTile& tokens, int stage) {
                const Address barrier = full + slot * BARRIER_BYTES;
                barrier_expect(barrier, STAGE_CHUNKS * TOKEN_BYTES);
#pragma unroll
                for (int i = 0; i < STAGE_CHUNKS; i++)
                    copy_box(activations + (slot * STAGE_CHUNKS + i) * TOKEN_BYTES, arguments.activations,
                             (stage * STAGE_CHUNKS + i) * 64, tokens.first, barrier);
            });
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
        wait_for_launch_before();  // it may still read what this launch writes
        const int row_warp = warp % ROW_WARPS;
        Ring<STAGES> ring;
#if GROUPED
        Ring<STAGES + 1> place;
        for (Work work(arguments, 0); work.more(); work.next(), place.next()) {
            barrier_wait(full + ring.slot * BARRIER_BYTES, ring.parity);  // the producer has said which tile it is
            const Tile& tile = shared.tiles[place.slot];
            float sums[TOKENS / 2] = {};
            multiply_few(tile.tokens.end - tile.tokens.first, work.end, row_warp, 0, shared, ring, sums);
            finish(arguments, tile.scales, work.row() + row_warp * 16, tile.tokens.first, tile.tokens.end, shared, sums);
        }
#else
        const int column_group = warp / ROW_WARPS;
        if (lane == 0) shared.scales[warp] = load_scales(arguments, 0);
        __syncwarp();
        for (Work work(arguments, split); work.more(); work.next()) {
            const int row = work.row() + row_warp * 16, token = work.tokens(arguments, work.tile).first;
            float sums[TOKENS / 2] = {};
            multiply<TOKENS>(work.end - work.begin, row_warp, column_group, shared, ring, sums);
            const Scales scales = shared.scales[warp];
#if PARTED
            float whole[SHARE * 4];
            const int part = split * COLUMN_GROUPS + column_group;
            exchange(part, shared, sums, whole);
            const int end = min(arguments.tokens, token + first_group(part + 1) * 8);
            finish(arguments, scales, row, token + first_group(part) * 8, end, shared, whole);
#else
            finish(arguments, scales, row, token, arguments.tokens, shared, sums);
#endif
        }
#endif
    }
}
