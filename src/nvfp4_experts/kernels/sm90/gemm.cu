// SPDX-License-Identifier: Apache-2.0
// Packed NVFP4 weights times bf16 activations on Hopper's tensor cores, for 9 tokens and more: half of the layer a launch.
//
//   GATE_UP   h = silu(min(gate, L)) * clamp(up, -L, L), gate and up = x @ W1.T, x @ W3.T       never more than I columns
//   DOWN      y = h @ W2.T
//
// Weights are the 64-row operand of wgmma, tokens its columns. A block owns 64 STRIPS ROW_GROUPS weight rows and TOKENS
// tokens. Two producer threads, of weights and of activations, keep a ring of STAGES stages filled; ROW_GROUPS x
// COLUMN_GROUPS consumer warpgroups each take STRIPS times 64 rows and two chunks (of 64 columns) of a stage, and decode
// the weights of a chunk in registers (16 bytes a lane are its A operands, layouts/fragments.py) while the wgmmas of the
// one before run.
// Gate and up, interleaved 8 rows by 8, meet in one thread, so SwiGLU needs no exchange.
//
// K may be cut twice: in SPLIT runs, one for each block of a cluster, and within a block among COLUMN_GROUPS. The sums of
// these PARTS meet in shared memory (distributed, with SPLIT), where each part adds all of them, in order, for its share
// of the tokens.
// With one part blocks are persistent. A token's result depends on PARTS and on nothing else of the batch.
//
// GROUPED: weights of several experts, one after the other, and a list of tiles that group.cu made: rows of activations
// and their expert. A tile of few rows is multiplied by narrower wgmmas, to the next 8 from NARROWEST on, and less of the
// ring is filled. A stage's wgmmas have ended before the next is decoded. One part only.
//
// FP8: weights as layouts/e4m3_fragments.py packs them become e4m3 in units of their row's amax / 448; activations are
// e4m3 in the order that it says, with a scale a row. Half of the wgmmas.
//
// Floor: max(0.5625 bytes per weight, 2 flops per weight and token). In between, decoding: a warp issues about 83
// instructions for 16 rows x 64 columns, 45 of them (FP8: 38) on the pipe that takes one every other cycle, whatever TOKENS
// is; and the second-level cache, which every block asks for its activations: STRIPS.
//
// Compiled with -D: GATE_UP (else DOWN), ROW_GROUPS, STRIPS, COLUMN_GROUPS, TOKENS, BOX_TOKENS (copied at a time; without
//   GROUPED all of them), SPLIT, STAGES, REGISTERS (of a consumer thread), SHARED_BYTES (of the launch), GROUPED, FP8 and
//   OUT: 0 bf16, 1 fp16, 2 fp32, 3 (GATE_UP) NVFP4 values as bf16, quantised with a static scale.

#include "common.cuh"
#include "async.cuh"
#include "e4m3.cuh"
#include "packed.cuh"

#define BF16 0
#define FP16 1
#define FP32 2
#define NVFP4 3

#define PARTED (SPLIT * COLUMN_GROUPS > 1)

constexpr int WARPGROUPS = ROW_GROUPS * COLUMN_GROUPS, CONSUMERS = 4 * WARPGROUPS, THREADS = 128 * (WARPGROUPS + 1);
constexpr int ROWS = 64 * STRIPS * ROW_GROUPS, ROW_WARPS = 4 * ROW_GROUPS, PARTS = SPLIT * COLUMN_GROUPS;
constexpr int STAGE_CHUNKS = 2 * COLUMN_GROUPS, GROUPS = TOKENS / 8;  // of 64 columns; of 8 tokens
constexpr int WEIGHT_BYTES = ROWS / 16 * CHUNK_BYTES;                  // of a chunk
constexpr int SLICE_CHUNKS = FP8 ? 2 : 1, SLICE_BYTES = TOKENS * 128;  // of activations: rows of 128 bytes
#if FP8
typedef PackedE4m3 Packed;
#else
typedef PackedBf16 Packed;
#endif
constexpr int STAGE_SLICES = STAGE_CHUNKS / SLICE_CHUNKS, STEPS = Packed::STEPS;  // STEPS: wgmmas of a chunk, 32 bytes each
constexpr int NEXT_CHUNK = FP8 ? STEPS * 32 : SLICE_BYTES;  // bytes from a chunk of activations to the next
constexpr int NARROWEST = TOKENS < 128 ? 8 : 64;            // of wgmmas with GROUPED
constexpr int SHARE = (GROUPS + PARTS - 1) / PARTS;         // that a part finishes, at most
static_assert(STRIPS == 1 || PARTS == 1, "sums of parts are of one strip");
static_assert(BOX_TOKENS % 8 == 0, "the swizzle's period is 8 rows");
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
    TensorMap weights;      // (experts x tiles of 16 rows, chunks, 144) words, box (ROWS / 16, STAGE_CHUNKS, 144)
    TensorMap activations;  // (tokens, columns) bf16 or e4m3, box (BOX_TOKENS, 128 bytes), 128-byte swizzle
    const float* weight_scales;  // of each expert; GATE_UP: of gate, of up; DOWN: of down
    const float* token_scales;   // of the activations: one, one a token, or one an expert; null: 1
    const float* hidden_scale;   // NVFP4: the static scale of h, of each expert
    void* out;                   // (tokens, rows / 2 or rows), `stride` values from a token to the next
    int scaling, tokens, rows, chunks, stride;
    float limit;
    const BFloat16* row_amax;  // FP8: of the weight rows of each expert; GATE_UP: of gate's, then of up's
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
#if FP8
    alignas(16) BFloat16 row_amax[ROWS];  // GATE_UP: half of them gate's, half up's
#endif
};

struct Shared {
    union {
        struct {
            alignas(1024) unsigned char activations[STAGES][STAGE_SLICES][SLICE_BYTES];
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

template <int N>
__device__ __forceinline__ void multiply_chunk(float (&sums)[N / 2], const u32 (&a)[STEPS][4], u32 b) {
    mma_fence();
#pragma unroll
    for (int j = 0; j < STEPS; j++) {
#if FP8
        mma_async_e4m3<N>(sums, a[j], b + 2 * j);
#else
        mma_async_bf16<N>(sums, a[j], b + 2 * j);
#endif
    }
    mma_commit();
    mma_wait<1>();  // the chunk before has been multiplied
}

// Rows of a warp: 16 of each strip, strips 64 ROW_GROUPS apart.
__device__ __forceinline__ int row_of(int row_warp, int strip) { return (strip * ROW_WARPS + row_warp) * 16; }

// The sums over this warpgroup's columns, 64 rows x N tokens a strip; sums[4 i + 2 h + e]: row g + 8 h, token 8 i + 2 c + e.
template <int N>
__device__ __forceinline__ void multiply(int steps, int row_warp, int column_group, const Shared& shared,
                                         const float (&inverses)[STRIPS][2], Ring<STAGES>& ring,
                                         float (&sums)[STRIPS][TOKENS / 2]) {
    const int lane = threadIdx.x % 32;
    const Address full = shared_address(shared.full), empty = shared_address(shared.empty);
    const Address weights =
        shared_address(shared.weights) + (row_warp * STAGE_CHUNKS + 2 * column_group) * CHUNK_BYTES;
    const u32 operand = mma_operand(shared_address(shared.activations[0][2 / SLICE_CHUNKS * column_group]));
    const u32 offsets = load_4(shared_address(&shared.scale_offsets));
    u32 a[2][STEPS][4];
    u32 before = 0;
    for (int i = 0; i < steps; i++) {
        const Address from = weights + ring.slot * (STAGE_CHUNKS * WEIGHT_BYTES);
        const u32 b = operand + ring.slot * (STAGE_SLICES * SLICE_BYTES / 16);
        barrier_wait(full + ring.slot * BARRIER_BYTES, ring.parity);
        Packed packed[2][STRIPS];
#pragma unroll
        for (int u = 0; u < 2 * STRIPS; u++)
            packed[u / STRIPS][u % STRIPS] =
                Packed(from + (u % STRIPS * ROW_WARPS * STAGE_CHUNKS + u / STRIPS) * CHUNK_BYTES, lane);
#pragma unroll
        for (int u = 0; u < 2 * STRIPS; u++) {
            const int chunk = u / STRIPS, strip = u % STRIPS;
            packed[chunk][strip].decode(offsets, inverses[strip], a[u % 2]);
            multiply_chunk<N>(reinterpret_cast<float (&)[N / 2]>(sums[strip]), a[u % 2], b + chunk * NEXT_CHUNK / 16);
            if (u == 0 && i > 0 && lane == 0) barrier_arrive(empty + before * BARRIER_BYTES);  // it may be filled again
        }
        if (GROUPED) mma_wait<0>();  // operands in flight from here to the next stage would have registers for each width
        before = ring.slot;
        ring.next();
    }
    mma_wait<0>();
    if (lane == 0) barrier_arrive(empty + before * BARRIER_BYTES);
#pragma unroll
    for (int strip = 0; strip < STRIPS; strip++)
#pragma unroll
        for (int i = 0; i < TOKENS / 2; i++) asm volatile("" : "+f"(sums[strip][i])::"memory");
}

// By the narrowest of LEAST, LEAST + 8, .. MOST that holds `count` tokens.
template <int LEAST, int MOST>
__device__ __forceinline__ void multiply_few(int count, int steps, int row_warp, const Shared& shared,
                                             const float (&inverses)[STRIPS][2], Ring<STAGES>& ring,
                                             float (&sums)[STRIPS][TOKENS / 2]) {
    if constexpr (LEAST < MOST) {
        constexpr int MIDDLE = (LEAST + MOST) / 16 * 8;
        if (count <= MIDDLE)
            multiply_few<LEAST, MIDDLE>(count, steps, row_warp, shared, inverses, ring, sums);
        else
            multiply_few<MIDDLE + 8, MOST>(count, steps, row_warp, shared, inverses, ring, sums);
    } else {
        multiply<MOST>(steps, row_warp, 0, shared, inverses, ring, sums);
    }
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

// What the sums of this lane's rows g and g + 8 of a warp's 16 are multiplied by.
struct Rows {
    float factors[2];
};

__device__ __forceinline__ Rows rows_of(const Scales& scales) {
    return {scales.factors[0], scales.factors[GATE_UP ? 1 : 0]};
}

#if FP8
#include "row_amax.cuh"
#endif
#include "finish.cuh"

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
                    Tile& tile = shared.tiles[place.slot];
                    tile.tokens = tokens, tile.scales = load_scales(arguments, tokens.expert);
                }
#endif
#if FP8 && GROUPED
                const u32 amax_bytes = stage == 0 ? row_amax_bytes(arguments, row) : 0;
                barrier_expect(barrier, STAGE_CHUNKS * WEIGHT_BYTES + amax_bytes);
                if (stage == 0) copy_row_amax(arguments, tokens.expert, row, shared.tiles[place.slot], barrier);
#else
                barrier_expect(barrier, STAGE_CHUNKS * WEIGHT_BYTES);
#endif
#if GROUPED
                if (stage == 0) place.next();
#endif
                copy_box(weights + slot * (STAGE_CHUNKS * WEIGHT_BYTES), arguments.weights, 0, stage * STAGE_CHUNKS,
                         (tokens.expert * arguments.rows + row) / 16, barrier);
            });
        }
        if (warp == CONSUMERS + 1 && lane == 0) {
            wait_for_launch_before();
            const Address activations = shared_address(shared.activations);
            produce(arguments, split, empty, [&](u32 slot, int, const TokenTile& tokens, int stage) {
                const Address barrier = full + slot * BARRIER_BYTES;
                const int boxes = GROUPED ? (tokens.end - tokens.first + BOX_TOKENS - 1) / BOX_TOKENS : 1;
                barrier_expect(barrier, STAGE_SLICES * BOX_TOKENS * 128 * boxes);
#pragma unroll
                for (int i = 0; i < STAGE_SLICES; i++)
#pragma unroll 1
                    for (int box = 0; box < boxes; box++)
                        copy_box(activations + (slot * STAGE_SLICES + i) * SLICE_BYTES + box * BOX_TOKENS * 128,
                                 arguments.activations, (stage * STAGE_SLICES + i) * SLICE_CHUNKS * 64,
                                 tokens.first + box * BOX_TOKENS, barrier);
            });
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
        const int row_warp = warp % ROW_WARPS;
        Ring<STAGES> ring;
#if FP8 && !GROUPED
        auto row_amax = [&](const Work& work) { return RowAmax(arguments.row_amax, arguments.rows, work.row(), row_warp); };
        RowAmax amax = row_amax(Work(arguments, split));  // weights do not depend on the launch before
#endif
        wait_for_launch_before();  // it may still read what this launch writes
#if GROUPED
        Ring<STAGES + 1> place;
        for (Work work(arguments, 0); work.more(); work.next(), place.next()) {
            barrier_wait(full + ring.slot * BARRIER_BYTES, ring.parity);  // the producer has said which tile it is
            const Tile& tile = shared.tiles[place.slot];
            float sums[STRIPS][TOKENS / 2] = {};
            float inverses[STRIPS][2];
#if FP8
            auto row_amax = [&] { return RowAmax(tile.row_amax, ROWS, 0, row_warp); };
            row_amax().invert(inverses);
#endif
            const int count = __shfl_sync(~0u, tile.tokens.end - tile.tokens.first, 0);  // so the compiler knows it is one
            multiply_few<NARROWEST, TOKENS>(count, work.end, row_warp, shared, inverses, ring, sums);
#pragma unroll
            for (int strip = 0; strip < STRIPS; strip++) {
                const int row = row_of(row_warp, strip);
                Rows rows = rows_of(tile.scales);
#if FP8
                row_amax().scale(strip, rows);  // not kept in registers meanwhile
#endif
                finish(arguments, rows, tile.scales.hidden, work.row() + row, tile.tokens.first, tile.tokens.end, shared,
                       sums[strip]);
            }
        }
#else
        const int column_group = warp / ROW_WARPS;
        if (lane == 0) shared.scales[warp] = load_scales(arguments, 0);
        __syncwarp();
        for (Work work(arguments, split); work.more();) {
            const int token = work.tokens(arguments, work.tile).first;
            float sums[STRIPS][TOKENS / 2] = {};
            float inverses[STRIPS][2] = {};
#if FP8
            amax.invert(inverses);
#endif
            multiply<TOKENS>(work.end - work.begin, row_warp, column_group, shared, inverses, ring, sums);
            const Scales scales = shared.scales[warp];
            auto rows = [&](int strip) {
                Rows made = rows_of(scales);
#if FP8
                amax.scale(strip, made);
#endif
                return made;
            };
#if PARTED
            float whole[SHARE * 4];
            const int part = split * COLUMN_GROUPS + column_group;
            exchange(part, shared, sums[0], whole);
            const int end = min(arguments.tokens, token + first_group(part + 1) * 8);
            finish(arguments, rows(0), scales.hidden, work.row() + row_of(row_warp, 0), token + first_group(part) * 8, end,
                   shared, whole);
#else
#pragma unroll
            for (int strip = 0; strip < STRIPS; strip++)
                finish(arguments, rows(strip), scales.hidden, work.row() + row_of(row_warp, strip), token, arguments.tokens,
                       shared, sums[strip]);
#endif
            work.next();
#if FP8
            amax = row_amax(work);
#endif
        }
#endif
    }
}
