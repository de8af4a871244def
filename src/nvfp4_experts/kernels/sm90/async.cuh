// SPDX-License-Identifier: Apache-2.0
// Hopper's asynchronous machinery, one name an instruction: mbarriers, the copy engine, clusters, warpgroup mma.

// In this block's shared memory; worked out once, since generic pointers cost instructions in a loop.
typedef u32 Address;

__device__ __forceinline__ Address shared_address(const void* p) { return (Address)__cvta_generic_to_shared(p); }

__device__ __forceinline__ uint4 load_16(Address from) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(from));
    return v;
}

__device__ __forceinline__ uint2 load_8(Address from) {
    uint2 v;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(from));
    return v;
}

__device__ __forceinline__ u32 load_4(Address from) {
    u32 v;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(from));
    return v;
}

__device__ __forceinline__ u32 load_2(Address from) {
    u16 v;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(from));
    return v;
}

// A word in shared memory that says what has been written before it.
__device__ __forceinline__ void store_release(Address to, u32 word) {
    asm volatile("st.release.cta.shared::cta.u32 [%0], %1;" ::"r"(to), "r"(word) : "memory");
}

__device__ __forceinline__ u32 load_acquire(Address from) {
    u32 word;
    asm volatile("ld.acquire.cta.shared::cta.u32 %0, [%1];" : "=r"(word) : "r"(from) : "memory");
    return word;
}

// --- barriers in shared memory --------------------------------------------------------------------------------------

constexpr int BARRIER_BYTES = 8;

__device__ __forceinline__ void barrier_init(Address barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

__device__ __forceinline__ void barriers_are_made() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(Address barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// A warp that has done something together arrives through one lane. racecheck follows each lane by itself: compiled for it,
// all arrive.
#ifdef EVERY_LANE_ARRIVES
constexpr u32 WARP_ARRIVALS = 32;
#else
constexpr u32 WARP_ARRIVALS = 1;
#endif
__device__ __forceinline__ void barrier_arrive_warp(Address barrier) {
    __syncwarp();
    if (WARP_ARRIVALS == 32 || threadIdx.x % 32 == 0) barrier_arrive(barrier);
}

// The phase completes when these bytes have arrived too.
__device__ __forceinline__ void barrier_expect(Address barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_wait(Address barrier, u32 parity) {
    asm volatile(
        "{\n.reg .pred p;\n"
        "again:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@!p bra again;\n}\n" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

// As barrier_wait, for what other blocks of the cluster have sent.
__device__ __forceinline__ void barrier_wait_cluster(Address barrier, u32 parity) {
    asm volatile(
        "{\n.reg .pred p;\nagain:\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%0], %1;\n@!p bra again;\n}\n" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

// Position in a ring of barriers: parity flips each time round.
template <int SIZE>
struct Ring {
    u32 slot = 0, parity = 0;
    __device__ __forceinline__ void next() {
        if (++slot == SIZE) slot = 0, parity ^= 1;
    }
};

// Threads of a block that share a named barrier.
__device__ __forceinline__ void sync_threads(int name, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(name), "r"(threads) : "memory");
}

// --- the launch before this one -------------------------------------------------------------------------------------

__device__ __forceinline__ void let_next_launch_begin() { asm volatile("griddepcontrol.launch_dependents;"); }

// Until all of the launch before has ended and its writes can be seen.
__device__ __forceinline__ void wait_for_launch_before() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// --- copies into shared memory --------------------------------------------------------------------------------------

struct alignas(64) TensorMap {
    u64 words[16];
};

// Bytes: a multiple of 16.
__device__ __forceinline__ void copy_to_shared(Address to, const void* from, u32 bytes, Address barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier)
                 : "memory");
}

__device__ __forceinline__ void copy_box(Address to, const TensorMap& map, int x, int y, int z, Address barrier) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(to),
        "l"(&map), "r"(x), "r"(y), "r"(z), "r"(barrier)
        : "memory");
}

__device__ __forceinline__ void copy_box(Address to, const TensorMap& map, int x, int y, Address barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
        "l"(&map), "r"(x), "r"(y), "r"(barrier)
        : "memory");
}

// --- clusters -------------------------------------------------------------------------------------------------------

__device__ __forceinline__ u32 cluster_rank() {
    u32 rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// All threads of the cluster that have not ended. It orders no memory: it says that barriers exist, or that nobody reads
// a ring any more.
__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

// To the same place in another block of the cluster, or this one; its barrier counts the 16 bytes when they are there.
__device__ __forceinline__ void send(Address to, u32 rank, Address barrier, float4 v) {
    asm volatile(
        "{\n.reg .b32 place, counter;\nmapa.shared::cluster.u32 place, %0, %2;\nmapa.shared::cluster.u32 counter, %1, %2;\n"
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [place], {%3, %4, %5, %6}, [counter];\n}\n" ::"r"(to),
        "r"(barrier), "r"(rank), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w)
        : "memory");
}

// --- warpgroup mma --------------------------------------------------------------------------------------------------

__device__ __forceinline__ void mma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void mma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void mma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// The lower word of the descriptor of B: a row of 64 bf16 (128 bytes) per column of B, rows swizzled in groups of 8 as
// the copy engine's 128-byte mode leaves them. Two more per 16 rows of K. The upper word is the same for all.
__device__ __forceinline__ u32 mma_operand(Address tile) { return (tile >> 4 & 0x3FFF) | 1u << 16; }
#define MMA_OPERAND_HIGH "0x40000040"  // 128-byte swizzle, 1024 bytes from 8 rows to the next

// sums (64 x N) += a (64 x K, in registers) * b (K x N, in shared memory), K the 32 bytes of a step: 16 bf16 or 32 e4m3.
template <int N>
__device__ __forceinline__ void mma_async_bf16(float (&sums)[N / 2], const u32 (&a)[4], u32 b);
template <int N>
__device__ __forceinline__ void mma_async_e4m3(float (&sums)[N / 2], const u32 (&a)[4], u32 b);

#define SUM_4(i) "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3])
#define SUMS_4 SUM_4(0)
#define SUMS_8 SUMS_4, SUM_4(4)
#define SUMS_12 SUMS_8, SUM_4(8)
#define SUMS_16 SUMS_12, SUM_4(12)
#define SUMS_20 SUMS_16, SUM_4(16)
#define SUMS_24 SUMS_20, SUM_4(20)
#define SUMS_28 SUMS_24, SUM_4(24)
#define SUMS_32 SUMS_28, SUM_4(28)
#define SUMS_36 SUMS_32, SUM_4(32)
#define SUMS_40 SUMS_36, SUM_4(36)
#define SUMS_44 SUMS_40, SUM_4(40)
#define SUMS_48 SUMS_44, SUM_4(44)
#define SUMS_52 SUMS_48, SUM_4(48)
#define SUMS_56 SUMS_52, SUM_4(52)
#define SUMS_60 SUMS_56, SUM_4(56)
#define SUMS_64 SUMS_60, SUM_4(60)
#define SUM_32(i) SUM_4(i), SUM_4(i + 4), SUM_4(i + 8), SUM_4(i + 12), SUM_4(i + 16), SUM_4(i + 20), SUM_4(i + 24), SUM_4(i + 28)
#define SUMS_128 SUMS_64, SUM_32(64), SUM_32(96)
#define NAMES_4 "%0, %1, %2, %3"
#define NAMES_8 NAMES_4 ", %4, %5, %6, %7"
#define NAMES_12 NAMES_8 ", %8, %9, %10, %11"
#define NAMES_16 NAMES_12 ", %12, %13, %14, %15"
#define NAMES_20 NAMES_16 ", %16, %17, %18, %19"
#define NAMES_24 NAMES_20 ", %20, %21, %22, %23"
#define NAMES_28 NAMES_24 ", %24, %25, %26, %27"
#define NAMES_32 NAMES_28 ", %28, %29, %30, %31"
#define NAMES_36 NAMES_32 ", %32, %33, %34, %35"
#define NAMES_40 NAMES_36 ", %36, %37, %38, %39"
#define NAMES_44 NAMES_40 ", %40, %41, %42, %43"
#define NAMES_48 NAMES_44 ", %44, %45, %46, %47"
#define NAMES_52 NAMES_48 ", %48, %49, %50, %51"
#define NAMES_56 NAMES_52 ", %52, %53, %54, %55"
#define NAMES_60 NAMES_56 ", %56, %57, %58, %59"
#define NAMES_64 NAMES_60 ", %60, %61, %62, %63"
#define NAMES_128 NAMES_64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// N columns in R registers; the five operands behind them are numbered a0 .. b. TAIL: what follows b; K-major both.
#define DEFINE_MMA_OF(NAME, TYPES, TAIL, N, R, a0, a1, a2, a3, b_)                                                     \
    template <>                                                                                                       \
    __device__ __forceinline__ void NAME<N>(float (&sums)[N / 2], const u32 (&a)[4], u32 b) {                          \
        asm volatile("{\n.reg .b64 b;\nmov.b64 b, {%" #b_ ", " MMA_OPERAND_HIGH "};\n"                                  \
                     "wgmma.mma_async.sync.aligned.m64n" #N TYPES " {" NAMES_##R "}, {%" #a0 ", %" #a1 ", %" #a2       \
                     ", %" #a3 "}, b, " TAIL ";\n}\n"                                                               \
                     : SUMS_##R                                                                                       \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b));                                           \
    }
#define DEFINE_MMA(...)                                                             \
    DEFINE_MMA_OF(mma_async_bf16, "k16.f32.bf16.bf16", "1, 1, 1, 0", __VA_ARGS__) \
    DEFINE_MMA_OF(mma_async_e4m3, "k32.f32.e4m3.e4m3", "1, 1, 1", __VA_ARGS__)
DEFINE_MMA(8, 4, 4, 5, 6, 7, 8)
DEFINE_MMA(16, 8, 8, 9, 10, 11, 12)
DEFINE_MMA(24, 12, 12, 13, 14, 15, 16)
DEFINE_MMA(32, 16, 16, 17, 18, 19, 20)
DEFINE_MMA(40, 20, 20, 21, 22, 23, 24)
DEFINE_MMA(48, 24, 24, 25, 26, 27, 28)
DEFINE_MMA(56, 28, 28, 29, 30, 31, 32)
DEFINE_MMA(64, 32, 32, 33, 34, 35, 36)
DEFINE_MMA(72, 36, 36, 37, 38, 39, 40)
DEFINE_MMA(80, 40, 40, 41, 42, 43, 44)
DEFINE_MMA(88, 44, 44, 45, 46, 47, 48)
DEFINE_MMA(96, 48, 48, 49, 50, 51, 52)
DEFINE_MMA(104, 52, 52, 53, 54, 55, 56)
DEFINE_MMA(112, 56, 56, 57, 58, 59, 60)
DEFINE_MMA(120, 60, 60, 61, 62, 63, 64)
DEFINE_MMA(128, 64, 64, 65, 66, 67, 68)
DEFINE_MMA(256, 128, 128, 129, 130, 131, 132)
