// SPDX-License-Identifier: Apache-2.0
// How x and h become values of NVFP4, or e4m3, in a decode launch, whose blocks share the work through the mailbox. Included
// by decode.cu and routed_decode.cu, which have Shared, Box and the macros.

// Asked for early. Past the L1 cache: the launch before may have written it.
__device__ __forceinline__ float static_scale_at(const float* scale) { return ACTIVATIONS == STATIC ? __ldcg(scale) : 0.0f; }

// Global scales g (encode) and s (decode) from an amax or a static scale.
__device__ __forceinline__ void global_scales(u32 amax_bits, float static_scale, float& g, float& s) {
    if (ACTIVATIONS == STATIC) {
        s = static_scale, g = __frcp_rn(s);
    } else if (ACTIVATIONS == E4M3) {
        const float amax = amax_or_floor(__uint_as_float(amax_bits));
        g = __fdiv_rn(448.0f, amax), s = unit_of(amax);
    } else {
        global_scales_of_amax(amax_bits, g, s);
    }
}

__device__ __forceinline__ void consumers_sync() { sync_threads(1, CONSUMERS * 32); }

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
__device__ __forceinline__ void keep_token_scales(float static_scale, Shared& shared) {
    if (threadIdx.x >= TOKENS) return;
    float g, s = 1.0f;
    if (ACTIVATIONS != BF16) global_scales(amax_of_token<PHASE>(threadIdx.x, shared), static_scale, g, s);
    shared.token_scale[PHASE][threadIdx.x] = s;
}

#if ACTIVATIONS == E4M3
// Four columns of a row to the two words that are multiplied.
__device__ __forceinline__ uint2 e4m3_pairs(const float* v, float g) {
    uint2 pairs;
    f16_pairs(e4m3_quad(__fmul_rn(v[0], g), __fmul_rn(v[1], g), __fmul_rn(v[2], g), __fmul_rn(v[3], g)), pairs.x, pairs.y);
    return pairs;
}

// A block of 16 to its eight.
__device__ __forceinline__ void e4m3_words(const float (&v)[BLOCK], float g, u32 (&words)[8]) {
#pragma unroll
    for (int q = 0; q < 4; q++) {
        const uint2 pairs = e4m3_pairs(v + 4 * q, g);
        words[2 * q] = pairs.x, words[2 * q + 1] = pairs.y;
    }
}
#endif

// A block of 16 that four lanes hold, lane c its columns QUARTER c, the next, and those two UPPER further, as the two words
// that would be multiplied: they follow each other.
constexpr int QUARTER = ACTIVATIONS == E4M3 ? 4 : 2, UPPER = ACTIVATIONS == E4M3 ? 2 : 8;

__device__ __forceinline__ uint2 quantize_quarter(float (&v)[4], float g, float s) {
#if ACTIVATIONS == E4M3
    return e4m3_pairs(v, g);
#else
    u32 largest = 0;
#pragma unroll
    for (int e = 0; e < 4; e++) largest = max(largest, __float_as_uint(v[e]) & 0x7FFFFFFFu);
    largest = max(largest, __shfl_xor_sync(~0u, largest, 1));
    largest = max(largest, __shfl_xor_sync(~0u, largest, 2));
    const BlockScale block = block_scale(largest, g, s);
#pragma unroll
    for (int e = 0; e < 4; e++) v[e] = quantize_value(v[e], block);
    return make_uint2(bf16_pair(v[0], v[1]), bf16_pair(v[2], v[3]));
#endif
}

// Columns that lanes hold to fragments, with scales that take all of a token's.
template <int PHASE, class Source, int STAGE_COUNT>
__device__ __forceinline__ void enter_whole(Raw<Source> (&raw)[STAGE_COUNT], Shared& shared,
                                            Fragment (&fragments)[STAGE_COUNT]) {
    find_amax<PHASE>(raw, shared);
    float g, s;
    global_scales(amax_of_token<PHASE>(threadIdx.x % 32 / 4, shared), 0.0f, g, s);
#pragma unroll
    for (int stage = 0; stage < STAGE_COUNT; stage++) {
        float v[BLOCK];
        unpack16(raw[stage], v);
#if ACTIVATIONS == E4M3
        e4m3_words(v, g, fragments[stage].b);
#else
        quantize_block(v, g, s);
#pragma unroll
        for (int i = 0; i < 8; i++) fragments[stage].b[i] = bf16_pair(v[2 * i], v[2 * i + 1]);
        exchange(fragments[stage]);
#endif
    }
}

// This block's share of `rows` rows of x to such values for all blocks, by warp `warp` of `warps`. token_of(row): of x;
// scales_of(row, g, s): its global scales; place(row): where its words go. EACH: blocks of 16 that four lanes ask for at once.
template <int EACH = 1, class TokenOf, class ScalesOf, class Place>
__device__ __forceinline__ void post_share(const Element* x, int rows, int warp, int warps, TokenOf token_of, ScalesOf scales_of,
                                           Place place) {
    constexpr int BLOCKS = HIDDEN / BLOCK;
    const int c = threadIdx.x % 4, step = gridDim.x * warps * 8;
    for (int first = (blockIdx.x + warp * gridDim.x) * 8; first < rows * BLOCKS; first += EACH * step) {
        auto block_of = [&](int n) { return first + n * step + (int)threadIdx.x % 32 / 4; };
        auto is_one = [&](int n) { return block_of(n) < rows * BLOCKS; };
        auto row_of = [&](int n) { return is_one(n) ? block_of(n) / BLOCKS : 0; };
        auto column_of = [&](int n) { return is_one(n) ? block_of(n) % BLOCKS * BLOCK + QUARTER * c : QUARTER * c; };
        float v[EACH][4];
#pragma unroll
        for (int n = 0; n < EACH; n++) {
            const Element* from = x + (size_t)token_of(row_of(n)) * HIDDEN + column_of(n);
            load_pair(from, v[n][0], v[n][1]);
            load_pair(from + UPPER, v[n][2], v[n][3]);
        }
#pragma unroll
        for (int n = 0; n < EACH; n++) {
            float g, s;
            scales_of(row_of(n), g, s);
            const uint2 words = quantize_quarter(v[n], g, s);
            if (is_one(n)) post(place(row_of(n)) + pair_position(column_of(n)), words);
        }
    }
}
