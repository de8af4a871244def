// SPDX-License-Identifier: Apache-2.0
// What entering.cuh does not have of decode.cu: where h is finished, and x of a lone token.

// h is finished by the reducer but where its scale needs all of it.
constexpr bool ORDERED = ACTIVATIONS == BF16 || ACTIVATIONS == STATIC;

// --- a lone token: x comes to shared memory in one copy, sooner than the lanes of fragments would get it -------------

__device__ __forceinline__ void copy_x(const Element* x, Shared& shared) {
    const Address has_x = shared_address(&shared.has_x);
    barrier_expect(has_x, sizeof(shared.x));
    copy_to_shared(shared_address(shared.x), x, sizeof(shared.x), has_x);
}

// x to values, where it is, a block of 16 to a thread.
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
        u32* to = reinterpret_cast<u32*>(shared.x) + column_of(i) / 2;
#if ACTIVATIONS == E4M3
        u32 words[8];
        e4m3_words(v[i], g, words);
#pragma unroll
        for (int e = 0; e < 8; e++) to[e] = words[e];
#else
        const BlockScale block = block_scale(largest[i], g, s);
#pragma unroll
        for (int e = 0; e < BLOCK; e += 2)
            to[e / 2] = bf16_pair(quantize_value(v[i][e], block), quantize_value(v[i][e + 1], block));
#endif
    }
    consumers_sync();
}

// Its share of a stage.
__device__ __forceinline__ void take(int stage, const Shared& shared, Fragment& fragment) {
    const int lane = threadIdx.x % 32, first = (stage * CONSUMERS + threadIdx.x / 32) * 64 + lane * LANE_STEP;
    const u32* from = reinterpret_cast<const u32*>(shared.x) + first / 2;
    const bool has_columns = lane < 4 && (L1::chunks % CONSUMERS == 0 || first < L1::columns);
#pragma unroll
    for (int i = 0; i < 8; i++) fragment.b[i] = has_columns && is_column<L1>(first, i) ? from[WORD_STEP / 2 * i] : 0;
}
