// SPDX-License-Identifier: Apache-2.0
// What surrounds the FP8 GEMMs: rows to e4m3 with a scale each, as quantize_fp8_rows of formats/activations.py does it.
//
//   quantize_rows_*   of x, byte for byte                                        floor: x read once, 1 byte written
//   enter_rows_*      the same in front of gemm.cu, for each slot of a row       floor: x read once, 1 byte written a slot
//   swiglu_quantize   of h = silu(min(gate, L)) * clamp(up, -L, L) in fp32       floor: 4 bytes read, 1 written per h
//
// A block of threads takes a row and reads it once: a thread keeps KEPT vectors of 8 values while the largest is found.
// Columns beyond 8 * KEPT a thread (KEPT * 8192 in all) are read, or computed, twice.

#include "common.cuh"
#include "async.cuh"
#include "e4m3.cuh"
#include "slots.cuh"

constexpr int KEPT = 4, MOST_THREADS = 1024;

struct Eight {
    float value[8];
};

// A row gives its values in two steps, so that a thread's loads are all on their way before the first is used.
template <class Element>
struct RowOfX {
    const Element* x;
    union Loaded {
        uint4 words[sizeof(Element) / 2];
        Element element[8];
    };

    __device__ __forceinline__ Loaded load(int vector) const {
        Loaded loaded;
#pragma unroll
        for (int i = 0; i < (int)sizeof(Element) / 2; i++)
            loaded.words[i] = __ldcg(reinterpret_cast<const uint4*>(x + vector * 8) + i);
        return loaded;
    }
    __device__ __forceinline__ Eight values(const Loaded& loaded) const {
        Eight v;
#pragma unroll
        for (int i = 0; i < 8; i++) v.value[i] = to_float(loaded.element[i]);
        return v;
    }
};

struct RowOfH {
    const BFloat16 *gate, *up;
    float limit;
    union Loaded {
        uint4 words[2];
        BFloat16 element[16];
    };

    __device__ __forceinline__ Loaded load(int vector) const {
        Loaded loaded;
        loaded.words[0] = __ldcg(reinterpret_cast<const uint4*>(gate) + vector);
        loaded.words[1] = __ldcg(reinterpret_cast<const uint4*>(up) + vector);
        return loaded;
    }
    __device__ __forceinline__ Eight values(const Loaded& loaded) const {
        Eight v;
#pragma unroll
        for (int i = 0; i < 8; i++)
            v.value[i] = swiglu(to_float(loaded.element[i]), to_float(loaded.element[i + 8]), limit);
        return v;
    }
};

// The bits of the largest magnitude; infinity sorts above every number, NaN above infinity.
__device__ __forceinline__ u32 largest_of(u32 largest, const Eight& v) {
#pragma unroll
    for (int i = 0; i < 8; i++) largest = max(largest, __float_as_uint(v.value[i]) & 0x7FFFFFFFu);
    return largest;
}

__device__ __forceinline__ u32 largest_of_block(u32 largest) {
    __shared__ u32 of_warp[MOST_THREADS / 32];
    largest = __reduce_max_sync(~0u, largest);
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = largest;
    __syncthreads();
    return __reduce_max_sync(~0u, threadIdx.x % 32 < blockDim.x / 32 ? of_warp[threadIdx.x % 32] : 0);
}

// Where the two words of a vector go in the order of layouts/e4m3_fragments.py: of every 16 words, 4 c + r and 4 r + c change
// places.
__device__ __forceinline__ void store_transposed(unsigned char* values, int vector, uint2 words) {
    u32* to = reinterpret_cast<u32*>(values) + vector / 8 * 16 + vector % 2 * 8 + vector % 8 / 2;
    to[0] = words.x, to[4] = words.y;
}

// Where a row goes: to one row, byte for byte.
struct ToRow {
    static constexpr int MULTIPLE = 1;  // of vectors that are stored
    unsigned char* values;
    float* scale;
    __device__ __forceinline__ void put_scale(float s) const { *scale = s; }
    __device__ __forceinline__ void put(int vector, uint2 words) const { reinterpret_cast<uint2*>(values)[vector] = words; }
};

// To the rows of its slots, in the order of layouts/e4m3_fragments.py, with zeros up to a multiple of 64 columns.
struct ToSlots {
    static constexpr int MULTIPLE = 8;
    unsigned char* values;
    float* scales;
    Slots slots;
    int columns;
    __device__ __forceinline__ void put_scale(float s) const {
        slots.each([=](int to) { scales[to] = s; });
    }
    __device__ __forceinline__ void put(int vector, uint2 words) const {
        slots.each([=](int to) { store_transposed(values + (size_t)to * columns, vector, words); });
    }
};

// row: where the values come from; to: where e4m3 and the scale go.
template <class Row, class To>
__device__ __forceinline__ void quantize_row(const Row& row, int columns, const To& to) {
    const int vectors = columns / 8, again = KEPT * blockDim.x;
    const int stored = (vectors + To::MULTIPLE - 1) / To::MULTIPLE * To::MULTIPLE;
    typename Row::Loaded loaded[KEPT];
#pragma unroll
    for (int i = 0; i < KEPT; i++) loaded[i] = row.load(min((int)(threadIdx.x + i * blockDim.x), vectors - 1));
    Eight kept[KEPT];
    u32 largest = 0;
#pragma unroll
    for (int i = 0; i < KEPT; i++) {
        kept[i] = row.values(loaded[i]);
        largest = largest_of(largest, kept[i]);
    }
    for (int vector = again + threadIdx.x; vector < vectors; vector += blockDim.x)
        largest = largest_of(largest, row.values(row.load(vector)));

    const float amax = amax_or_floor(__uint_as_float(largest_of_block(largest))), inverse = __fdiv_rn(448.0f, amax);
    if (threadIdx.x == 0) to.put_scale(unit_of(amax));
    auto write = [&](int vector, Eight v) {
#pragma unroll
        for (int i = 0; i < 8; i++) v.value[i] = __fmul_rn(v.value[i], inverse);
        const u32 low = e4m3_quad(v.value[0], v.value[1], v.value[2], v.value[3]);
        const u32 high = e4m3_quad(v.value[4], v.value[5], v.value[6], v.value[7]);
        to.put(vector, vector < vectors ? make_uint2(low, high) : make_uint2(0, 0));
    };
#pragma unroll
    for (int i = 0; i < KEPT; i++) {
        const int vector = threadIdx.x + i * blockDim.x;
        if (vector < stored) write(vector, kept[i]);
    }
    for (int vector = again + threadIdx.x; vector < stored; vector += blockDim.x)
        write(vector, row.values(row.load(min(vector, vectors - 1))));
}

// x (T, columns), columns a multiple of 8 -> values (T, columns), scales (T,). One block a row.
template <class Element>
__device__ __forceinline__ void quantize_rows(const Element* x, int columns, unsigned char* values, float* scales) {
    let_next_launch_begin();
    wait_for_launch_before();
    const size_t first = (size_t)blockIdx.x * columns;
    quantize_row(RowOfX<Element>{x + first}, columns, ToRow{values + first, scales + blockIdx.x});
}

#define QUANTIZE_ROWS(name, Element)                                               \
    extern "C" __global__ void __launch_bounds__(MOST_THREADS)                     \
        name(const Element* x, int columns, unsigned char* values, float* scales) { \
        quantize_rows(x, columns, values, scales);                                 \
    }
QUANTIZE_ROWS(quantize_rows_bf16, BFloat16)
QUANTIZE_ROWS(quantize_rows_fp16, Float16)
QUANTIZE_ROWS(quantize_rows_fp32, Float32)

// x (T, columns) -> values (.., columns up to a multiple of 64): row t to the rows row_of_slot[t * top_k ..]; without such a
// list to row t, of *count rows, or all where that is null. One block a row.
template <class Element>
__device__ __forceinline__ void enter_rows(const Element* x, int columns, const int* count, const int* row_of_slot, int top_k,
                                           unsigned char* values, float* scales) {
    let_next_launch_begin();
    wait_for_launch_before();
    const int row = blockIdx.x;
    if (!row_of_slot && count && row >= __ldcg(count)) return;
    quantize_row(RowOfX<Element>{x + (size_t)row * columns}, columns,
                 ToSlots{values, scales, Slots(row_of_slot, top_k, row), (columns + 63) / 64 * 64});
}

#define ENTER_ROWS(name, Element)                                                                                     \
    extern "C" __global__ void __launch_bounds__(MOST_THREADS)                                                        \
        name(const Element* x, int columns, const int* count, const int* row_of_slot, int top_k, unsigned char* values, \
             float* scales) {                                                                                         \
        enter_rows(x, columns, count, row_of_slot, top_k, values, scales);                                             \
    }
ENTER_ROWS(enter_rows_bf16, BFloat16)
ENTER_ROWS(enter_rows_fp16, Float16)
ENTER_ROWS(enter_rows_fp32, Float32)

// gate_up (T, 2 columns) bf16, gate's columns and then up's -> values (T, columns), scales (T,). One block a row.
extern "C" __global__ void __launch_bounds__(MOST_THREADS)
    swiglu_quantize(const BFloat16* gate_up, int columns, float limit, unsigned char* values, float* scales) {
    let_next_launch_begin();
    wait_for_launch_before();
    const size_t first = (size_t)blockIdx.x * columns;
    quantize_row(RowOfH{gate_up + 2 * first, gate_up + 2 * first + columns, limit}, columns,
                 ToRow{values + first, scales + blockIdx.x});
}
