// SPDX-License-Identifier: Apache-2.0
// How x and h enter a decode launch: from memory or the mailbox, as bf16 or quantised to NVFP4, to the consumers' B
// fragments. Included by decode.cu, which has Shared, Gemm and the macros.

// h is finished by the reducer but where its scale needs all of it.
constexpr bool ORDERED = ACTIVATIONS == BF16 || ACTIVATIONS == STATIC;

// Asked for early. Past the L1 cache: the launch before may have written it.
__device__ __forceinline__ float static_scale_at(const float* scale) { return ACTIVATIONS == STATIC ? __ldcg(scale) : 0.0f; }

// Global scales g (encode) and s (decode) from an amax or a static scale.
__device__ __forceinline__ void global_scales(u32 amax_bits, float static_scale, float& g, float& s) {
    if (ACTIVATIONS == STATIC)
        s = static_scale, g = __frcp_rn(s);
    else
        global_scales_of_amax(amax_bits, g, s);
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

// This block's share of x to NVFP4 values for all blocks: four lanes a block of 16, each the two words it would multiply.
template <class FindBox>
__device__ __forceinline__ void post_share(const Element* x, int tokens, float static_scale, const Shared& shared,
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
    global_scales(amax_of_token<1>(threadIdx.x % 32 / 4, shared), 0.0f, g, s);
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

// --- a lone token: x comes to shared memory in one copy, sooner than the lanes of fragments would get it -------------

__device__ __forceinline__ void copy_x(const Element* x, Shared& shared) {
    const Address has_x = shared_address(&shared.has_x);
    barrier_expect(has_x, sizeof(shared.x));
    copy_to_shared(shared_address(shared.x), x, sizeof(shared.x), has_x);
}

// x to NVFP4 values, where it is, a block of 16 to a thread.
__device__ __forceinline__ void enter_alone(float static_scale, Shared& shared) {
    constexpr int CONSUMER_THREADS = CONSUMERS * 32, EACH = (HIDDEN / BLOCK + CONSUMER_THREADS - 1) / CONSUMER_THREADS;
    auto column_of = [](int i) { return (i * CONSUMER_THREADS + (int)threadIdx.x) * BLOCK; };
    float g, s, v[EACH][BLOCK] = {};
    u32 largest[EACH], all = 0;
    barrier_wait(shared_address(&shared.has_x), 0);
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        Raw<Element> raw = {};
        if (column_of(i) < HIDDEN) raw = *reinterpret_cast<const Raw<Element>*>(shared.x + column_of(i));
        unpack16(raw, v[i]);
        largest[i] = amax16(v[i]), all = max(all, largest[i]);
    }
    if (ACTIVATIONS != STATIC) {
        all = __reduce_max_sync(~0u, all);
        if (threadIdx.x % 32 == 0) atomicMax(&shared.amax[0][0], all);
    }
    if (ACTIVATIONS != STATIC || sizeof(Element) > 2) consumers_sync();  // values take the room of other columns in fp32
    global_scales(amax_of_token<0>(0, shared), static_scale, g, s);
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        if (column_of(i) >= HIDDEN) break;
        const BlockScale block = block_scale(largest[i], g, s);
        u32* to = reinterpret_cast<u32*>(shared.x) + column_of(i) / 2;
#pragma unroll
        for (int e = 0; e < BLOCK; e += 2)
            to[e / 2] = bf16_pair(quantize_value(v[i][e], block), quantize_value(v[i][e + 1], block));
    }
    consumers_sync();
}

// Its share of a stage.
__device__ __forceinline__ void take(int stage, const Shared& shared, Fragment& fragment) {
    const int lane = threadIdx.x % 32, first = (stage * CONSUMERS + threadIdx.x / 32) * 64 + lane * 2;
    const u32* from = reinterpret_cast<const u32*>(shared.x) + first / 2;
    const bool has_columns = lane < 4 && (L1::chunks % CONSUMERS == 0 || first < L1::columns);
#pragma unroll
    for (int i = 0; i < 8; i++) fragment.b[i] = has_columns && is_column<L1>(first, i) ? from[4 * i] : 0;
}
