// SPDX-License-Identifier: Apache-2.0
// What a translated kernel runs on, in C++17. Threads are fibers of one host thread. A fiber goes on until it asks for
// something that others may change (a word that is peeked at, a barrier) or meets its warp; then those of a warp that is drawn
// by chance do.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
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
    Block* cluster;  // the first one of its cluster
    int rank, running;  // in it; its threads that have not ended, counted in the first one
    Meeting meeting;            // of the cluster's threads, in the first one
    std::vector<unsigned char> room;
    unsigned char* shared;
    std::vector<Warp> warps;
    std::map<int, Meeting> barriers;
    std::map<int, std::vector<u64>> variables;  // __shared__ ones, by line
};

// Products that a lane has asked for and not waited for, in groups; they are made as late as that.
struct Products {
    std::vector<std::function<void()>> open;
    std::deque<std::vector<std::function<void()>>> groups;
};

// Bytes of shared memory.
struct Place {
    u32 at, bytes;
};

struct Fiber {
    Products products;
    std::vector<Place> loads;  // that may still be under way: an assembler lets instructions pass them, but not out of a loop
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

// A copy on its way into shared memory: what it does and where, and the barrier that then counts its bytes.
struct Copy {
    std::function<void()> make;
    Block* to;
    Place place;
    u32 barrier;
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
inline std::vector<Fiber>* side_by_side;
inline bool has_passed_a_load;
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

// All threads of the cluster that have not ended.
inline void meet_cluster() {
    Block& first = *self->home->cluster;
    const u32 generation = first.meeting.generation;
    first.meeting.arrived++;
    while (first.meeting.generation == generation) {
        if (first.meeting.arrived == first.running) first.meeting.arrived = 0, first.meeting.generation++;
        yield();
    }
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
    copy.make();
    for (const Fiber& fiber : *side_by_side)
        for (const Place& load : fiber.loads)
            has_passed_a_load |= fiber.home == copy.to && load.at < copy.place.at + copy.place.bytes && copy.place.at < load.at + load.bytes;
    Barrier& barrier = barrier_at(copy.to, copy.barrier);
    barrier.bytes = barrier.bytes - (int)copy.place.bytes;
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
    self->done = true, self->home->cluster->running--;
    yield();
}

// Blocks `first` and up, side by side.
inline bool run_blocks(int first, int blocks, int threads, int shared_bytes, int cluster) {
    constexpr int STACK = 1 << 17;
    std::vector<Block> all(blocks);
    std::vector<Fiber> fibers(blocks * threads);
    side_by_side = &fibers;
    for (int b = 0; b < blocks; b++) {
        Block& block = all[b];
        block.cluster = &all[b / cluster * cluster], block.rank = b % cluster, block.running = cluster * threads;
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
    return copies.empty() && !has_passed_a_load;
}

// False: threads wait for each other, or not all ended in a time that is enough for what the tests run, or a copy was still
// on its way, or came where a load was. cluster: blocks of one; 0: all blocks are to be side by side; else a few are.
inline bool run(void (*kernel)(const void*), const void* given, Index blocks, int threads, int shared_bytes, int cluster, u64 seed) {
    state = seed * 0x9E3779B97F4A7C15 + 1, body = kernel, arguments = given, grid = blocks, copies.clear(), stores.clear();
    has_passed_a_load = false;
    const int all = blocks.x * blocks.y, beside = cluster ? std::max(cluster, 4 / cluster * cluster) : all;
    for (int first = 0; first < all; first += beside)
        if (!run_blocks(first, std::min(beside, all - first), threads, shared_bytes, std::max(cluster, 1))) return false;
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
