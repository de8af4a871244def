// SPDX-License-Identifier: Apache-2.0
// What a translated kernel runs on, in C++17. Threads are fibers of one host thread. A fiber goes on until it asks for
// something that others may change (a word that is peeked at, a barrier) or meets its warp; then those of a warp that is drawn
// by chance do.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <vector>

#define __device__
#define __forceinline__ inline
#define __restrict__
#define __align__(n) alignas(n)
#define __grid_constant__

struct uint2 {
    unsigned x, y;
};
struct int2 {
    int x, y;
};
struct float2 {
    float x, y;
};
struct uint4 {
    unsigned x, y, z, w;
};
struct int4 {
    int x, y, z, w;
};
struct float4 {
    float x, y, z, w;
};
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace machine {

using u32 = uint32_t;
using u64 = uint64_t;
constexpr int LANES = 32, WORDS = 12;

struct Index {
    unsigned x, y, z;
};

// Where threads meet: whoever comes last opens it.
struct Meeting {
    int arrived = 0;
    u32 generation = 0;
};

struct Warp {
    Meeting meeting;
    u32 words[2][LANES][WORDS];  // that lanes show each other, of this meeting and the one before
};

struct Block {
    std::vector<unsigned char> room;
    unsigned char* shared;
    std::vector<Warp> warps;
    std::map<int, Meeting> barriers;
    std::map<int, std::vector<u64>> variables;  // __shared__ ones, by line
};

struct Fiber {
    ucontext_t beginning;
    jmp_buf place;  // where it goes on
    std::unique_ptr<char[]> stack;
    Index thread, block;
    Block* home;
    Warp* warp;
    const Meeting* waits_at = nullptr;
    u32 generation = 0;
    bool begun = false, done = false;
};

inline bool can_go_on(const Fiber& fiber) {
    return !fiber.done && !(fiber.waits_at && fiber.waits_at->generation == fiber.generation);
}

// A copy on its way into shared memory.
struct Copy {
    Block* to;
    u32 place, bytes, barrier;
    const void* from;
};

// A word on its way into device memory: others see it some time later, in any order, unless its warp releases it.
struct Store {
    Warp* by;
    u32* to;
    u32 word;
};

struct Barrier {  // an mbarrier
    int16_t pending, count;
    int32_t bytes : 31;
    u32 phase : 1;
};
static_assert(sizeof(Barrier) == 8);

inline jmp_buf scheduler;
inline Fiber* self;
inline Index grid;
inline std::vector<Copy> copies;
inline std::vector<Store> stores;
inline u64 state;

inline u32 draw(u32 below) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return (u32)(state >> 32) % below;
}

// To the scheduler and back; jumps, since they do not ask the operating system.
__attribute__((noinline)) inline void yield() {
    if (_setjmp(self->place) == 0) _longjmp(scheduler, 1);
}
__attribute__((noinline)) inline void go_on(Fiber& fiber) {
    self = &fiber;
    if (_setjmp(scheduler)) return;
    if (fiber.begun) _longjmp(fiber.place, 1);
    fiber.begun = true;
    setcontext(&fiber.beginning);
}

template <class To, class From>
inline To bits_of(From v) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &v, sizeof(to));
    return to;
}

inline void meet(Meeting& meeting, int threads) {
    const u32 generation = meeting.generation;
    if (++meeting.arrived == threads) {
        meeting.arrived = 0, meeting.generation++;
        return;
    }
    self->waits_at = &meeting, self->generation = generation;
    yield();
    self->waits_at = nullptr;
}

inline int lane() { return self->thread.x % LANES; }

// All lanes show their words; returns everybody's.
template <int N>
inline u32 (*show(const u32 (&words)[N]))[WORDS] {
    static_assert(N <= WORDS);
    u32(*all)[WORDS] = self->warp->words[self->warp->meeting.generation % 2];
    std::copy(words, words + N, all[lane()]);
    meet(self->warp->meeting, LANES);
    return all;
}

inline Barrier& barrier_at(Block* block, u32 place) { return *reinterpret_cast<Barrier*>(block->shared + place); }
inline void complete(Barrier& barrier) {
    if (barrier.pending == 0 && barrier.bytes == 0) barrier.phase ^= 1, barrier.pending = barrier.count;
}

inline void finish_a_copy() {
    const size_t which = draw(copies.size());
    const Copy copy = copies[which];
    copies.erase(copies.begin() + which);
    std::memcpy(copy.to->shared + copy.place, copy.from, copy.bytes);
    Barrier& barrier = barrier_at(copy.to, copy.barrier);
    barrier.bytes = barrier.bytes - (int)copy.bytes;
    complete(barrier);
}

inline void finish_a_store() {
    Store& one = stores[draw(stores.size())];
    *one.to = one.word;
    one = stores.back();
    stores.pop_back();
}
inline void release(const Warp* warp) {
    auto is_other = [&](const Store& store) { return store.by != warp; };
    const auto mine = std::partition(stores.begin(), stores.end(), is_other);
    for (auto store = mine; store != stores.end(); store++) *store->to = store->word;
    stores.erase(mine, stores.end());
}

inline void (*body)(const void*);
inline const void* arguments;
inline void enter() {
    body(arguments);
    self->done = true;
    yield();
}

// Blocks `first` and up, side by side.
inline bool run_blocks(int first, int blocks, int threads, int shared_bytes) {
    constexpr int STACK = 1 << 17;
    std::vector<Block> all(blocks);
    std::vector<Fiber> fibers(blocks * threads);
    for (int b = 0; b < blocks; b++) {
        Block& block = all[b];
        block.room.assign(shared_bytes + 1024, 0xA5);
        block.shared = (unsigned char*)(((uintptr_t)block.room.data() + 1023) / 1024 * 1024);
        block.warps.resize(threads / LANES);
        for (int t = 0; t < threads; t++) {
            Fiber& fiber = fibers[b * threads + t];
            fiber.stack.reset(new char[STACK]);
            fiber.thread = {(unsigned)t, 0, 0}, fiber.block = {(first + b) % grid.x, (first + b) / grid.x, 0};
            fiber.home = &block, fiber.warp = &block.warps[t / LANES];
            getcontext(&fiber.beginning);
            fiber.beginning.uc_stack.ss_sp = fiber.stack.get(), fiber.beginning.uc_stack.ss_size = STACK;
            fiber.beginning.uc_link = nullptr;
            makecontext(&fiber.beginning, enter, 0);
        }
    }
    const int warps = blocks * threads / LANES;
    std::vector<int> patience(warps, 1);  // a warp's share of turns, drawn anew now and then
    int left = fibers.size();
    for (u64 turn = 0; left; turn++) {
        if (turn % 4096 == 0) {
            for (int& share : patience) share = draw(4) ? 1 : 1 + draw(40);
            const bool is_stuck = std::none_of(fibers.begin(), fibers.end(), can_go_on) && copies.empty() && stores.empty();
            if (is_stuck || turn > 4'000'000) return false;
        }
        if (!copies.empty() && draw(24) == 0) finish_a_copy();
        for (size_t due = (stores.size() + 31) / 32; due; due--) finish_a_store();
        const int warp = draw(warps);
        if (draw(patience[warp])) continue;
        for (int i = warp * LANES; i < (warp + 1) * LANES; i++) {
            Fiber& fiber = fibers[i];
            if (!can_go_on(fiber)) continue;
            go_on(fiber);
            left -= fiber.done;
        }
    }
    return copies.empty();
}

// False: threads wait for each other, or not all ended in a time that is enough for what the tests run, or a copy was still
// on its way. together: all blocks side by side; else a few.
inline bool run(void (*kernel)(const void*), const void* given, Index blocks, int threads, int shared_bytes, bool together, u64 seed) {
    state = seed * 0x9E3779B97F4A7C15 + 1, body = kernel, arguments = given, grid = blocks, copies.clear(), stores.clear();
    const int all = blocks.x * blocks.y, beside = together ? all : 4;
    for (int first = 0; first < all; first += beside)
        if (!run_blocks(first, std::min(beside, all - first), threads, shared_bytes)) return false;
    while (!stores.empty()) finish_a_store();
    return true;
}

// A variable that each block has one of.
template <class T>
inline T& variable(int line) {
    auto& room = self->home->variables[line];
    if (room.empty()) room.resize((sizeof(T) + 7) / 8);
    return *reinterpret_cast<T*>(room.data());
}

}  // namespace machine

#define threadIdx (machine::self->thread)
#define blockIdx (machine::self->block)
#define gridDim (machine::grid)

// --- CUDA's functions ------------------------------------------------------------------------------------------------

inline unsigned __float_as_uint(float v) { return machine::bits_of<unsigned>(v); }
inline float __uint_as_float(unsigned v) { return machine::bits_of<float>(v); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __ffs(unsigned v) { return __builtin_ffs(v); }
inline unsigned __funnelshift_l(unsigned low, unsigned high, int by) { return (unsigned)((((uint64_t)high << 32 | low) << by) >> 32); }
template <class T>
inline T __ldcg(const T* from) { return *from; }
inline size_t __cvta_generic_to_shared(const void* p) { return (const unsigned char*)p - machine::self->home->shared; }
template <class A, class B>
inline auto min(A a, B b) { return b < a ? b : a; }
template <class A, class B>
inline auto max(A a, B b) { return a < b ? b : a; }
inline unsigned atomicMax(unsigned* to, unsigned v) {
    const unsigned before = *to;
    *to = std::max(before, v);
    return before;
}
inline int atomicAdd(int* to, int v) {
    machine::yield();
    return (*to += v) - v;
}

inline void __syncwarp() { machine::show<1>({0}); }
inline void __syncthreads() { machine::meet(machine::self->home->barriers[0], machine::self->home->warps.size() * machine::LANES); }
template <class T>
inline T shuffle(T v, int from) {
    return machine::bits_of<T>(machine::show<1>({machine::bits_of<unsigned>(v)})[from][0]);
}
template <class T>
inline T __shfl_sync(unsigned, T v, int from) { return shuffle(v, from); }
template <class T>
inline T __shfl_xor_sync(unsigned, T v, int mask) { return shuffle(v, machine::lane() ^ mask); }
template <class T>
inline T __shfl_up_sync(unsigned, T v, int by) { return shuffle(v, std::max(machine::lane() - by, 0)); }
inline unsigned __ballot_sync(unsigned, bool v) {
    const auto all = machine::show<1>({v});
    unsigned set = 0;
    for (int i = 0; i < machine::LANES; i++) set |= all[i][0] << i;
    return set;
}
inline bool __any_sync(unsigned mask, bool v) { return __ballot_sync(mask, v) != 0; }
inline unsigned __reduce_max_sync(unsigned, unsigned v) {
    const auto all = machine::show<1>({v});
    for (int i = 0; i < machine::LANES; i++) v = std::max(v, all[i][0]);
    return v;
}

// --- instructions, by their names ------------------------------------------------------------------------------------

namespace ptx {
using namespace machine;
typedef uint16_t u16;

// v >= 0, finite, to the nearest of a format with so many fraction bits, ties to even; and back.
inline u32 encode(float v, int fraction, int bias) {
    const int exponent = v > 0 ? std::max(std::ilogb(v), 1 - bias) : 1 - bias;
    return (u32)std::nearbyint(std::ldexp(v, fraction - exponent)) + ((exponent + bias - 1) << fraction);
}
inline float decode(u32 bits, int fraction, int bias) {
    const int exponent = bits >> fraction, mantissa = bits & ((1 << fraction) - 1);
    return std::ldexp((float)(exponent ? mantissa + (1 << fraction) : mantissa), std::max(exponent, 1) - bias - fraction);
}
inline u16 to_half(float v) {
    if (std::isnan(v)) return 0x7FFF;
    return (std::signbit(v) ? 0x8000 : 0) | (std::fabs(v) < 65520 ? encode(std::fabs(v), 10, 15) : 0x7C00);
}
inline float from_half(u16 v) {
    const u32 magnitude = v & 0x7FFF;
    const float found = magnitude > 0x7C00 ? NAN : magnitude == 0x7C00 ? INFINITY : decode(magnitude, 10, 15);
    return v >> 15 ? -found : found;
}
inline u16 to_bf16(float v) {
    if (std::isnan(v)) return 0x7FFF;
    const u32 bits = bits_of<u32>(v);
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}
inline float from_bf16(u32 v) { return bits_of<float>(v << 16); }
inline u32 to_e4m3(float v) { return std::isnan(v) ? 0x7F : v < 464 ? encode(v, 3, 7) : 0x7E; }  // of v >= 0
inline float from_e4m3(u32 v) { return v == 0x7F ? NAN : decode(v, 3, 7); }

inline void cvt_f32_f16(float& to, u16 v) { to = from_half(v); }
inline void cvt_rn_bf16_f32(u16& to, float v) { to = to_bf16(v); }
inline void cvt_rn_f16_f32(u16& to, float v) { to = to_half(v); }
inline void cvt_rn_bf16x2_f32(u32& to, float high, float low) { to = (u32)to_bf16(high) << 16 | to_bf16(low); }
inline void cvt_rn_satfinite_e4m3x2_f32(u16& to, float, float low) { to = to_e4m3(low); }
inline void cvt_rn_f16x2_e4m3x2(u32& to, u16 v) { to = to_half(from_e4m3(v & 255)); }
inline void min_NaN_f32(float& v, float limit) { v = std::isnan(v) ? v : std::min(v, limit); }
inline void max_NaN_f32(float& v, float limit) { v = std::isnan(v) ? v : std::max(v, limit); }
inline void ex2_approx_ftz_f32(float& to, float v) { to = std::exp2(v); }
inline void rcp_approx_ftz_f32(float& to, float v) { to = 1.0f / v; }
inline u32 bf16x2_times(u32 pair, float v) {
    return (u32)to_bf16(from_bf16(pair >> 16) * v) << 16 | to_bf16(from_bf16(pair & 0xFFFF) * v);
}
inline void mul_rn_bf16x2_low(u32& to, u32 pair, u32 scales) { to = bf16x2_times(pair, from_bf16(scales & 0xFFFF)); }
inline void mul_rn_bf16x2_high(u32& to, u32 pair, u32 scales) { to = bf16x2_times(pair, from_bf16(scales >> 16)); }

inline const u32* shared_words(u32 place) { return reinterpret_cast<const u32*>(self->home->shared + place); }
inline void ld_shared_v4_u32(u32& x, u32& y, u32& z, u32& w, u32 from) {
    const u32* v = shared_words(from);
    x = v[0], y = v[1], z = v[2], w = v[3];
}
inline void ld_shared_v2_u32(u32& x, u32& y, u32 from) { x = shared_words(from)[0], y = shared_words(from)[1]; }
inline void ld_shared_u32(u32& v, u32 from) { v = *shared_words(from); }
inline void ld_shared_u16(u16& v, u32 from) { v = (u16)*shared_words(from); }
inline void st_release_cta_shared_cta_u32(u32 to, u32 v) { *reinterpret_cast<u32*>(self->home->shared + to) = v; }
inline void ld_acquire_cta_shared_cta_u32(u32& v, u32 from) { yield(), v = *shared_words(from); }

inline void mbarrier_init_shared_cta_b64(u32 at, u32 count) {
    barrier_at(self->home, at) = {(int16_t)count, (int16_t)count, 0, 0};
}
inline void fence_mbarrier_init_release_cluster() {}
inline void mbarrier_arrive_shared_cta_b64(u32 at) {
    Barrier& barrier = barrier_at(self->home, at);
    barrier.pending--;
    complete(barrier);
}
inline void mbarrier_arrive_expect_tx_shared_cta_b64(u32 at, u32 bytes) {
    Barrier& barrier = barrier_at(self->home, at);
    barrier.bytes = barrier.bytes + (int)bytes;
    mbarrier_arrive_shared_cta_b64(at);
}
inline void mbarrier_try_wait_parity_shared_cta_b64(u32 at, u32 parity) {
    while (barrier_at(self->home, at).phase == parity) yield();
}
inline void bar_sync(u32 name, u32 threads) { meet(self->home->barriers[name], threads); }
inline void griddepcontrol_launch_dependents() {}
inline void griddepcontrol_wait() {}
inline void setmaxnreg_dec_sync_aligned_u32() {}
inline void setmaxnreg_inc_sync_aligned_u32() {}
inline void nanosleep_u32() { yield(); }
inline void cp_async_bulk_shared_cluster_global_mbarrier_complete_tx_bytes(u32 to, const void* from, u32 bytes, u32 barrier) {
    copies.push_back({self->home, to, bytes, barrier, from});
}

// Of sources that are read whole, but of no kernel that is run.
template <class... Operands>
inline void cp_async_bulk_tensor_2d_shared_cluster_global_mbarrier_complete_tx_bytes(Operands...) { std::abort(); }
template <class... Operands>
inline void cp_async_bulk_tensor_3d_shared_cluster_global_mbarrier_complete_tx_bytes(Operands...) { std::abort(); }
template <class... Operands>
inline void mbarrier_try_wait_parity_acquire_cluster_shared_cta_b64(Operands...) { std::abort(); }

// Others' words in device memory: some time passes before they are looked at.
inline void ld_relaxed_gpu_global_v4_u32(u32& x, u32& y, u32& z, u32& w, const void* from) {
    yield();
    const u32* v = (const u32*)from;
    x = v[0], y = v[1], z = v[2], w = v[3];
}
inline void ld_relaxed_gpu_global_v2_u32(u32& x, u32& y, const void* from) { yield(), x = ((const u32*)from)[0], y = ((const u32*)from)[1]; }
inline void ld_relaxed_gpu_global_u32(u32& v, const void* from) { yield(), v = *(const u32*)from; }
inline void ld_acquire_gpu_global_u32(u32& v, const void* from) { yield(), v = *(const u32*)from; }
inline void st_relaxed_gpu_global_u32(u32* to, u32 v) { stores.push_back({self->warp, to, v}); }
inline void st_relaxed_gpu_global_v2_u32(u32* to, u32 x, u32 y) {
    st_relaxed_gpu_global_u32(to, x), st_relaxed_gpu_global_u32(to + 1, y);
}
inline void red_release_gpu_global_add_u32(u32* to, u32 v) { release(self->warp), *to += v; }

// 16 x 16 times 16 x 8 of the warp, as PTX deals them out.
inline void mma_sync_aligned_m16n8k16_row_col_f32_bf16_bf16_f32(float& d0, float& d1, float& d2, float& d3, u32 a0, u32 a1, u32 a2,
                                                               u32 a3, u32 b0, u32 b1) {
    const auto all = show<6>({a0, a1, a2, a3, b0, b1});
    const int g = lane() / 4, c = lane() % 4;
    float* sums[2][2] = {{&d0, &d1}, {&d2, &d3}};
    auto value = [](u32 pair, int k) { return from_bf16(k % 2 ? pair >> 16 : pair & 0xFFFF); };
    for (int h = 0; h < 2; h++)
        for (int e = 0; e < 2; e++)
            for (int k = 0; k < 16; k++) {
                const u32 a = all[4 * g + k % 8 / 2][h + k / 8 * 2], b = all[4 * (2 * c + e) + k % 8 / 2][4 + k / 8];
                *sums[h][e] += value(a, k) * value(b, k);
            }
}
}  // namespace ptx
