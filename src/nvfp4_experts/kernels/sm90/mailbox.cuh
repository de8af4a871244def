// SPDX-License-Identifier: Apache-2.0
// Words that the blocks of a launch hand each other through device memory: NOT_YET says that a word has not come.
// A writer stores words, a reader asks again until they are others; nothing else orders the two.
//
// Launches on a mailbox follow each other. They use its two boxes in turn, and each empties the box of the next.
// Needs Box, what a launch hands over, and MAILBOX_BYTES; tile.cuh.

constexpr u32 NOT_YET = 0xFFFFFFFF;  // as bf16 or fp32 a NaN that arithmetic does not give, and above all bits of |.|

struct alignas(128) Mailbox {
    u32 launches;  // that have ended
    u32 rows[2];   // of the boxes, that have words in them: routed_decode.cu
    alignas(128) Box boxes[2];
};
static_assert(sizeof(Mailbox) == MAILBOX_BYTES, "mailbox.py allocates as much");
static_assert(sizeof(Box) % 16 == 0, "emptied 16 bytes at a time");

// Relaxed: a word says itself whether it is there.
__device__ __forceinline__ uint4 peek_16(const void* from) {
    uint4 v;
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
    return v;
}
__device__ __forceinline__ uint2 peek_8(const void* from) {
    uint2 v;
    asm volatile("ld.relaxed.gpu.global.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(from));
    return v;
}
__device__ __forceinline__ void post(u32* to, u32 word) {
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(word));
}
__device__ __forceinline__ void post(u32* to, uint2 words) {
    asm volatile("st.relaxed.gpu.global.v2.u32 [%0], {%1, %2};" ::"l"(to), "r"(words.x), "r"(words.y));
}

// A word that counts, and says what has been written before it was counted up.
__device__ __forceinline__ void add_release(u32* to, u32 count) {
    asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(to), "r"(count) : "memory");
}
__device__ __forceinline__ u32 load_acquire_gpu(const u32* from) {
    u32 word;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(word) : "l"(from) : "memory");
    return word;
}

// The number of this launch on its mailbox. One block ends it when all have asked: that is, when it has a word of each.
__device__ __forceinline__ u32 launch_number(const Mailbox& mailbox) {
    u32 number;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(number) : "l"(&mailbox.launches));
    return number;
}

// This block's share of words that the next launch must find empty, by one warp.
__device__ __forceinline__ void empty_share(void* from, int bytes) {
    uint4* words = reinterpret_cast<uint4*>(from);
    for (int i = blockIdx.x * 32 + threadIdx.x % 32; i < bytes / 16; i += gridDim.x * 32)
        words[i] = make_uint4(NOT_YET, NOT_YET, NOT_YET, NOT_YET);
}

// --- activations in the order of fragments ---------------------------------------------------------------------------

// In the order of fragments, where the pair of columns k, k + 1 of a token lies, in words: lane c's eight follow each other.
// They begin at column LANE_STEP c of a chunk, with WORD_STEP columns from word to word.
#if ACTIVATIONS == E4M3
constexpr int LANE_STEP = 16, WORD_STEP = 2;
__device__ __forceinline__ int pair_position(int k) { return k / 2; }
#else
constexpr int LANE_STEP = 2, WORD_STEP = 8;
__device__ __forceinline__ int pair_position(int k) { return k / 64 * 32 + k % 8 / 2 * 8 + k % 64 / 8; }
#endif

// Words of a fragment that are columns of the matrix; `first`: column of its word 0.
template <class G>
__device__ __forceinline__ bool is_column(int first, int word) { return G::columns % 64 == 0 || first + WORD_STEP * word < G::columns; }

// A token's columns in the order of fragments, arriving. EVERY: all lanes have a row.
template <class G, bool EVERY = false>
struct Inbox {
    const u32* words;  // of this lane in stage 0; null: its token has none, and its fragments are zero
    int column;        // of the first of them

    __device__ explicit Inbox(const u32* row) : column(threadIdx.x / 32 * 64 + threadIdx.x % 4 * LANE_STEP) {
        words = EVERY || row ? row + pair_position(column) : nullptr;
    }
    __device__ Inbox(const u32* rows, int stride, int tokens)
        : Inbox(threadIdx.x % 32 / 4 < tokens ? rows + threadIdx.x % 32 / 4 * stride : nullptr) {}
    __device__ __forceinline__ void look(int stage, Fragment& fragment) const {
        const int first = column + stage * CONSUMERS * 64;
        uint4 low = {}, high = {};
        if ((EVERY || words) && (G::chunks % CONSUMERS == 0 || first < G::columns)) {
            const u32* from = words + stage * CONSUMERS * 32;
            low = peek_16(from), high = peek_16(from + 4);
        }
        const u32 found[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
        for (int i = 0; i < 8; i++) fragment.b[i] = is_column<G>(first, i) ? found[i] : 0;
    }
    static __device__ __forceinline__ bool is_there(const Fragment& fragment) {
        bool there = true;
#pragma unroll
        for (int i = 0; i < 8; i++) there = there && fragment.b[i] != NOT_YET;
        return there;
    }
    __device__ __forceinline__ void look_at_all(Fragment (&fragments)[G::stages]) const {
#pragma unroll
        for (int stage = 0; stage < G::stages; stage++) look(stage, fragments[stage]);
    }
    // Until all words of a stage are there. Every block asks at once, so only the lanes of one token that has a row ask
    // again and again: the other tokens' words come with theirs.
    __device__ __forceinline__ void await(int stage, Fragment& fragment, int asker = 0) const {
        while (__any_sync(~0u, !is_there(fragment))) {
            if (threadIdx.x % 32 / 4 == asker)
                while (!is_there(fragment)) look(stage, fragment);
            __syncwarp();
            look(stage, fragment);
        }
    }
    __device__ __forceinline__ void await_all(Fragment (&fragments)[G::stages], int asker = 0) const {
#pragma unroll
        for (int stage = 0; stage < G::stages; stage++) await(stage, fragments[stage], asker);
    }
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
