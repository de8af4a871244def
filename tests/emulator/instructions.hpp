// SPDX-License-Identifier: Apache-2.0
// What kernels ask of a GPU, on machine.hpp: CUDA's functions, and instructions by their names.
#pragma once
#include "machine.hpp"

#define threadIdx (machine::self->thread)
#define blockIdx (machine::self->block)
#define gridDim (machine::grid)
#define blockDim (machine::Index{(unsigned)machine::self->home->warps.size() * machine::LANES, 1, 1})

// --- CUDA's functions ------------------------------------------------------------------------------------------------

inline unsigned __float_as_uint(float v) { return machine::bits_of<unsigned>(v); }
inline float __uint_as_float(unsigned v) { return machine::bits_of<float>(v); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __ffs(unsigned v) { return __builtin_ffs(v); }
inline unsigned __funnelshift_l(unsigned low, unsigned high, int by) { return (unsigned)((((uint64_t)high << 32 | low) << by) >> 32); }
template <class T>
inline T __ldcg(const T* from) { return *from; }
template <class T>
inline T __ldcs(const T* from) { return *from; }
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
inline u32 to_signed_e4m3(float v) { return to_e4m3(std::fabs(v)) | (std::signbit(v) ? 0x80 : 0); }
inline float from_signed_e4m3(u32 v) { return v >> 7 ? -from_e4m3(v & 0x7F) : from_e4m3(v); }

inline void cvt_f32_f16(float& to, u16 v) { to = from_half(v); }
inline void cvt_rn_bf16_f32(u16& to, float v) { to = to_bf16(v); }
inline void cvt_rn_f16_f32(u16& to, float v) { to = to_half(v); }
inline void cvt_rn_bf16x2_f32(u32& to, float high, float low) { to = (u32)to_bf16(high) << 16 | to_bf16(low); }
inline void cvt_rn_f16x2_f32(u32& to, float high, float low) { to = (u32)to_half(high) << 16 | to_half(low); }
inline void cvt_rn_satfinite_e4m3x2_f32(u32& to, float v0, float v1, float v2, float v3) {
    to = to_signed_e4m3(v0) | to_signed_e4m3(v1) << 8 | to_signed_e4m3(v2) << 16 | to_signed_e4m3(v3) << 24;
}
inline void cvt_rn_satfinite_e4m3x2_f32(u16& to, float, float low) { to = to_e4m3(low); }
inline void cvt_rn_f16x2_e4m3x2(u32& to, u16 v) { to = to_half(from_e4m3(v & 255)); }
inline void cvt_rn_f16x2_e4m3x2(u32& low, u32& high, u32 quad) {
    auto half = [=](int i) { return (u32)to_half(from_signed_e4m3(quad >> 8 * i & 255)); };
    low = half(0) | half(1) << 16, high = half(2) | half(3) << 16;
}
inline void min_NaN_f32(float& v, float limit) { v = std::isnan(v) ? v : std::min(v, limit); }
inline void max_NaN_f32(float& v, float limit) { v = std::isnan(v) ? v : std::max(v, limit); }
inline void ex2_approx_ftz_f32(float& to, float v) { to = std::exp2(v); }
inline void rcp_approx_ftz_f32(float& to, float v) { to = 1.0f / v; }
inline u32 bf16x2_times(u32 pair, float v) {
    return (u32)to_bf16(from_bf16(pair >> 16) * v) << 16 | to_bf16(from_bf16(pair & 0xFFFF) * v);
}
inline void mul_rn_bf16x2_low(u32& to, u32 pair, u32 scales) { to = bf16x2_times(pair, from_bf16(scales & 0xFFFF)); }
inline void mul_rn_bf16x2_high(u32& to, u32 pair, u32 scales) { to = bf16x2_times(pair, from_bf16(scales >> 16)); }

inline const u32* load_shared(u32 place, u32 bytes) {
    self->loads.push_back({place, bytes});
    return reinterpret_cast<const u32*>(self->home->shared + place);
}
inline void ld_shared_v4_u32(u32& x, u32& y, u32& z, u32& w, u32 from) {
    const u32* v = load_shared(from, 16);
    x = v[0], y = v[1], z = v[2], w = v[3];
}
inline void ld_shared_v2_u32(u32& x, u32& y, u32 from) {
    const u32* v = load_shared(from, 8);
    x = v[0], y = v[1];
}
inline void ld_shared_u32(u32& v, u32 from) { v = *load_shared(from, 4); }
inline void ld_shared_u16(u16& v, u32 from) { v = (u16)*load_shared(from, 2); }
inline void st_release_cta_shared_cta_u32(u32 to, u32 v) { *reinterpret_cast<u32*>(self->home->shared + to) = v; }
inline void ld_acquire_cta_shared_cta_u32(u32& v, u32 from) { yield(), v = *reinterpret_cast<const u32*>(self->home->shared + from); }

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
    self->loads.clear();
}
inline void bar_sync(u32 name, u32 threads) { meet(self->home->barriers[name], threads); }
inline void griddepcontrol_launch_dependents() {}
inline void griddepcontrol_wait() {}
inline void setmaxnreg_dec_sync_aligned_u32(int = 0) {}
inline void setmaxnreg_inc_sync_aligned_u32(int = 0) {}
inline void nanosleep_u32() { yield(); }
inline void cp_async_bulk_shared_cluster_global_mbarrier_complete_tx_bytes(u32 to, const void* from, u32 bytes,
                                                                           u32 barrier) {
    unsigned char* place = self->home->shared + to;
    copies.push_back({[=] { std::memcpy(place, from, bytes); }, self->home, {to, bytes}, barrier});
}

// What the tests write where the driver would describe a tensor: sizes and box in bytes, then rows, then layers of rows. A
// place in it is told in values, then rows, then layers.
struct Map {
    const unsigned char* tensor;
    u64 sizes[3], strides[2], box[3], is_swizzled, value_bytes;
};
// Where a byte of rows of 128 lies when they are swizzled.
inline u32 swizzled(u32 place) { return place ^ (place >> 3 & 0x70); }
inline void copy_box(u32 to, const void* map, int x, int y, int z, u32 barrier) {
    const Map of = *(const Map*)map;
    x *= of.value_bytes;
    Block* home = self->home;
    auto make = [=] {
        u32 place = to;
        for (u64 k = 0; k < of.box[2]; k++)
            for (u64 j = 0; j < of.box[1]; j++)
                for (u64 i = 0; i < of.box[0]; i++, place++) {
                    const u64 a = x + i, b = y + j, c = z + k;
                    const bool is_inside = a < of.sizes[0] && b < of.sizes[1] && c < of.sizes[2];
                    home->shared[of.is_swizzled ? swizzled(place) : place] =
                        is_inside ? of.tensor[a + b * of.strides[0] + c * of.strides[1]] : 0;
                }
    };
    copies.push_back({make, home, {to, (u32)(of.box[0] * of.box[1] * of.box[2])}, barrier});
}
inline void cp_async_bulk_tensor_2d_shared_cluster_global_mbarrier_complete_tx_bytes(u32 to, const void* map, int x, int y,
                                                                                     u32 barrier) {
    copy_box(to, map, x, y, 0, barrier);
}
inline void cp_async_bulk_tensor_3d_shared_cluster_global_mbarrier_complete_tx_bytes(u32 to, const void* map, int x, int y,
                                                                                     int z, u32 barrier) {
    copy_box(to, map, x, y, z, barrier);
}

inline void mov_u32(u32& rank) { rank = self->home->rank; }  // of the block in its cluster
inline void barrier_cluster_wait_aligned() { meet_cluster(); }
inline void mbarrier_try_wait_parity_acquire_cluster_shared_cta_b64(u32 at, u32 parity) {
    mbarrier_try_wait_parity_shared_cta_b64(at, parity);
}
inline void st_async_shared_cluster_mbarrier_complete_tx_bytes_v4_f32(u32 to, u32 barrier, u32 rank, float x, float y,
                                                                      float z, float w) {
    Block* there = self->home->cluster + rank;
    const float4 v = {x, y, z, w};
    copies.push_back({[=] { std::memcpy(there->shared + to, &v, sizeof(v)); }, there, {to, sizeof(v)}, barrier});
}

// Products of a warpgroup; each warp has 16 of the 64 rows, as with mma. Operands in shared memory are read when they are
// waited for: as late as may be.
inline void wgmma_fence_sync_aligned() {}
inline void wgmma_commit_group_sync_aligned() {
    self->products.groups.push_back(std::move(self->products.open));
    self->products.open.clear();
}
inline void wgmma_wait_group_sync_aligned(size_t pending) {
    for (auto& groups = self->products.groups; groups.size() > pending; groups.pop_front())
        for (auto& product : groups.front()) product();
    if (pending == 0) self->loads.clear();  // operands were made of them
    __syncwarp();
}
// A value of BYTES bytes: bf16 or e4m3.
template <int BYTES>
inline float operand_at(const void* bytes, int k) {
    return BYTES == 2 ? from_bf16(((const u16*)bytes)[k]) : from_signed_e4m3(((const unsigned char*)bytes)[k]);
}
template <int N, int BYTES>
inline void wgmma(float (&sums)[N / 2], const u32 (&a)[4], u32 operand) {
    constexpr int K = 32 / BYTES, OF_WORD = 4 / BYTES;
    const auto all = show<4>({a[0], a[1], a[2], a[3]});
    const int g = lane() / 4, c = lane() % 4;
    std::array<float, 2 * K> rows;  // of g and of g + 8
    for (int k = 0; k < K; k++)
        for (int h = 0; h < 2; h++)
            rows[K * h + k] = operand_at<BYTES>(&all[4 * g + k % (K / 2) / OF_WORD][h + k / (K / 2) * 2], k % OF_WORD);
    const unsigned char* shared = self->home->shared;
    const u32 tile = (operand & 0x3FFF) << 4;
    float* to = sums;
    self->products.open.push_back([=] {
        for (int i = 0; i < N / 8; i++)
            for (int e = 0; e < 2; e++)
                for (int k = 0; k < K; k++) {
                    const u32 place = swizzled(tile + (8 * i + 2 * c + e) * 128 + k * BYTES);
                    const float b = operand_at<BYTES>(shared + place, 0);
                    for (int h = 0; h < 2; h++) to[4 * i + 2 * h + e] += rows[K * h + k] * b;
                }
    });
}
// Column c of what the lanes of row c show.
inline void movmatrix_sync_aligned_m8n8_trans_b16(u32& to, u32 pair) {
    const auto all = show<1>({pair});
    const int g = lane() / 4, c = lane() % 4;
    auto value = [&](int row) { return all[4 * row + g / 2][0] >> 16 * (g % 2) & 0xFFFF; };
    to = value(2 * c) | value(2 * c + 1) << 16;
}
inline void prmt_b32(u32& to, u32 low, u32 high, u32 selectors) {
    const u64 bytes = (u64)high << 32 | low;
    to = 0;
    for (int i = 0; i < 4; i++) to |= (u32)(bytes >> 8 * (selectors >> 4 * i & 7) & 255) << 8 * i;
}

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
inline void mma_of(float (*from)(u32), float& d0, float& d1, float& d2, float& d3, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    const auto all = show<6>({a0, a1, a2, a3, b0, b1});
    const int g = lane() / 4, c = lane() % 4;
    float* sums[2][2] = {{&d0, &d1}, {&d2, &d3}};
    auto value = [=](u32 pair, int k) { return from(k % 2 ? pair >> 16 : pair & 0xFFFF); };
    for (int h = 0; h < 2; h++)
        for (int e = 0; e < 2; e++)
            for (int k = 0; k < 16; k++) {
                const u32 a = all[4 * g + k % 8 / 2][h + k / 8 * 2], b = all[4 * (2 * c + e) + k % 8 / 2][4 + k / 8];
                *sums[h][e] += value(a, k) * value(b, k);
            }
}
template <class... Operands>
void mma_sync_aligned_m16n8k16_row_col_f32_bf16_bf16_f32(Operands&&... operands) { mma_of(from_bf16, operands...); }
template <class... Operands>
void mma_sync_aligned_m16n8k16_row_col_f32_f16_f16_f32(Operands&&... operands) {
    mma_of([](u32 v) { return from_half((u16)v); }, operands...);
}
}  // namespace ptx
