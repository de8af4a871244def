// SPDX-License-Identifier: Apache-2.0
// How x and h enter a launch of routed_decode.cu as NVFP4 values, or e4m3. Each block makes a share of them for all:
//
//   x    by the consumers, a row a token; STATIC, whose scale is the expert's: a row a slot, the routed ones' by the enterer;
//        E4M3, which takes less to make than to hand over: of all of it for itself
//   h    by the enterer, a group after the other, from what the reducers left as fp32
//
// Groups before the last one's hide how long it takes to hand h over twice.

#if ACTIVATIONS == E4M3
__device__ __forceinline__ void enter_x(const Arguments& arguments, Shared& shared, Fragment (&fragments)[L1::stages]) {
    Raw<Element> raw[L1::stages];
    load_raw<L1>(arguments.x, HIDDEN, arguments.tokens, false, raw);
    enter_whole<0>(raw, shared, fragments);
    keep_token_scales<0>(0.0f, shared);
}
#else
// x of the tokens that come first, by the consumers: of all, or with STATIC of the shared expert.
template <class GroupCount>
__device__ __forceinline__ void post_x(const Arguments& arguments, Shared& shared, Box& box, GroupCount group_count) {
    const int tokens = arguments.tokens, warp = threadIdx.x / 32;
    auto token_of = [](int row) { return row; };
#if ACTIVATIONS == STATIC
    if (!arguments.shared.gate_up) return;
    const float scale = __ldcg(arguments.shared.input_scale);
    post_share(
        arguments.x, tokens, warp, CONSUMERS, token_of, [&](int, float& g, float& s) { global_scales(0, scale, g, s); },
        [&](int row) { return box.x[tokens * arguments.top_k + row]; });
#else
    Raw<Element> raw[L1::stages];
    load_raw<L1>(arguments.x, HIDDEN, tokens, false, raw);
    find_amax<0>(raw, shared);
    keep_token_scales<0>(0.0f, shared);
    if (group_count() == 0) return;  // the launch does not count then, and its box must stay empty
    post_share(
        arguments.x, tokens, warp, CONSUMERS, token_of,
        [&](int row, float& g, float& s) { global_scales(amax_of_token<0>(row, shared), 0.0f, g, s); },
        [&](int row) { return box.x[row]; });
#endif
}
#endif

#if ACTIVATIONS == STATIC
// x of the routed experts' slots, by the enterer; and word when every block has posted its share.
__device__ __forceinline__ void post_x_of_slots(const Arguments& arguments, Shared& shared, Box& box) {
    const int top_k = arguments.top_k;
    post_share<4>(
        arguments.x, arguments.tokens * top_k, 0, 1, [&](int row) { return row / top_k; },
        [&](int row, float& g, float& s) { global_scales(0, shared.x_scale[row], g, s); },
        [&](int row) { return box.x[row]; });
    __syncwarp();
    if (threadIdx.x % 32 == 0) add_release(&box.blocks_with_x, 1);
}

__device__ __forceinline__ void find_all_x(Shared& shared, const Box& box) {
    if (threadIdx.x % 32 == 0 && load_acquire_gpu(&box.blocks_with_x) == gridDim.x - 1)
        store_release(shared_address(&shared.has_all_x), 1);
}
#endif

// Who asks again at once takes turns from the consumers, and the enterer has time.
__device__ __forceinline__ void sleep() { asm volatile("nanosleep.u32 100;"); }

// h of a tile, rows g = lane / 4 and tokens 2 c, 2 c + 1, by a reducer.
__device__ __forceinline__ void post_whole_h(int tile, const unsigned char (&slots)[TOKENS], const float (&h)[2], Box& box) {
    const int lane = threadIdx.x % 32, g = lane / 4;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int slot = slots[lane % 4 * 2 + i];
        if (slot != NOBODY) post(&box.whole_h[slot][tile * 8 + g], __float_as_uint(h[i]));
#if ACTIVATIONS != STATIC
        u32 largest = __float_as_uint(h[i]) & 0x7FFFFFFFu;
#pragma unroll
        for (int other = 4; other < 32; other *= 2) largest = max(largest, __shfl_xor_sync(~0u, largest, other));
        if (g == 0 && slot != NOBODY) post(&box.amax[slot][tile], largest);
#endif
    }
}

#if ACTIVATIONS != STATIC
// The largest |h| of a slot, when all of it is there, from four lanes; 0 of nobody's.
__device__ __forceinline__ u32 amax_of_slot(int slot, const Box& box) {
    u32 largest;
    while (true) {
        largest = 0;
        for (int first = threadIdx.x % 4 * 4; first < L1::tiles && slot != NOBODY; first += 16) {
            const uint4 v = peek_16(&box.amax[slot][first]);
            const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int i = 0; i < 4; i++)
                if (L1::tiles % 4 == 0 || first + i < L1::tiles) largest = max(largest, words[i]);
        }
        if (largest != NOT_YET) break;
        while (peek_8(&box.amax[slot][L1::tiles - 2]).y == NOT_YET) sleep();  // one of the last, so as not to ask for all
    }
    __syncwarp();
    largest = max(largest, __shfl_xor_sync(~0u, largest, 1));
    return max(largest, __shfl_xor_sync(~0u, largest, 2));
}

// What the scale of this lane's token in a group is made of: its |h|, or with DYNAMIC those of all the expert's slots, of
// which some are in another group if a token names the expert twice.
__device__ __forceinline__ u32 amax_of_h(const Group& group, const Shared& shared, const Box& box) {
    const int lane = threadIdx.x % 32;
    u32 largest = amax_of_slot(group.slots[lane / 4], box);
    if (ACTIVATIONS != DYNAMIC) return largest;
    const int one = group.slots[group.asker], expert = one < CHOICES ? shared.expert_of_slot[one] : -1;
    const int key = expert < 0 ? -1 : shared.key_of_slot[one];
    for (int first = 0; first < CHOICES; first += 32) {
        const int mine = first + lane;
        const bool is_other = expert >= 0 && shared.expert_of_slot[mine] == expert && shared.key_of_slot[mine] != key;
        for (u32 others = __ballot_sync(~0u, is_other); others; others &= others - 1)
            largest = max(largest, amax_of_slot(first + __ffs(others) - 1, box));
    }
    return __reduce_max_sync(~0u, largest);
}
#endif

// This block's share of every group's h to such values, by the enterer: a block of 16 of each token at a time.
__device__ __forceinline__ void enter_h(int groups, Shared& shared, Box& box) {
    constexpr int BLOCKS = INTERMEDIATE / BLOCK;
    const int lane = threadIdx.x % 32, c = lane % 4;
    for (int group = 0; group < groups; group++) {
        const Group& of = shared.groups[group];
        const int slot = of.slots[lane / 4];
#if ACTIVATIONS == STATIC
        find_all_x(shared, box);
#endif
        const bool is_one = slot != NOBODY;
        float g, s;
        uint2 low = {}, high = {};
        auto look = [&](int block) {
            const u32* from = box.whole_h[slot] + block * BLOCK + QUARTER * c;
            low = peek_8(from), high = peek_8(from + UPPER);
        };
        auto is_there = [](uint2 words) { return words.x != NOT_YET && words.y != NOT_YET; };
        if (is_one && blockIdx.x < BLOCKS) look(blockIdx.x);  // on its way while the scale is found
#if ACTIVATIONS == STATIC
        global_scales(0, is_one ? shared.h_scale[slot] : 1.0f, g, s);
#else
        global_scales(amax_of_h(of, shared, box), 0.0f, g, s);
        if (is_one && c == 0) shared.h_scale[slot] = s;
        __syncwarp();
        if (lane == 0) store_release(shared_address(&shared.groups_with_scales), group + 1);
#endif
        for (int block = blockIdx.x; block < BLOCKS; block += gridDim.x) {
            if (is_one && block != blockIdx.x) look(block);
            while (is_one && !(is_there(low) && is_there(high))) sleep(), look(block);
            __syncwarp();
            float v[4] = {__uint_as_float(low.x), __uint_as_float(low.y), __uint_as_float(high.x), __uint_as_float(high.y)};
            const uint2 words = quantize_quarter(v, g, s);
            if (is_one) post(box.h[slot] + pair_position(block * BLOCK + QUARTER * c), words);
        }
    }
}

#if ACTIVATIONS != E4M3
// L1 of all groups by a consumer. Of a slot's x: asked for while the last tile of the group before is multiplied, and not
// looked at twice where all of it was known to be there.
__device__ __forceinline__ void multiply_entered(int groups, int warp, int tokens, Shared& shared, const Box& box,
                                                 Decoder& decoder, Reader& reader, Ring<2>& partial) {
    if (groups == 0) return;
    Fragment fragments[L1::stages];
    auto nothing = [](int) {};
#if ACTIVATIONS == STATIC
    const int token = threadIdx.x % 32 / 4;
    auto x_of = [&](int group) { return Inbox<L1, true>(box.x[slot_read(shared.groups[group], token)]); };
    bool awaits = true;
    Inbox<L1, true> inbox = x_of(0);
    inbox.look_at_all(fragments);
    each_tile(groups, [&](int group, int, int next) {
        if (awaits) inbox.await_all(fragments, shared.groups[group].asker);
        awaits = false;
        if (next == group) {
            consume_tile<L1>(warp, shared.pipeline, decoder, reader, partial, fragments, nothing);
            return;
        }
        awaits = __any_sync(~0u, load_acquire(shared_address(&shared.has_all_x)) == 0);  // by all lanes or none
        inbox = x_of(next);
        consume_tile<L1>(warp, shared.pipeline, decoder, reader, partial, fragments, [&](int stage) {
            if (stage) inbox.look(stage - 1, fragments[stage - 1]);
        });
        inbox.look(L1::stages - 1, fragments[L1::stages - 1]);
    });
#else
    const Inbox<L1> inbox(&box.x[0][0], X_STRIDE / 2, tokens);
    inbox.look_at_all(fragments);
    inbox.await_all(fragments);
    each_tile(groups, [&](int, int, int) {
        consume_tile<L1>(warp, shared.pipeline, decoder, reader, partial, fragments, nothing);
    });
#endif
}
#endif
