// SPDX-License-Identifier: Apache-2.0
// What the kernels of this folder share: element types, the activation quantiser, SwiGLU, and packed weights to bf16.
// Nothing here needs a CUDA header at run time.
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

// Element types as bits.
struct BFloat16 {
    u16 bits;
};
struct Float16 {
    u16 bits;
};
struct Float32 {
    float value;
};

template <class T>
__device__ constexpr bool is_bf16() { return false; }
template <>
__device__ constexpr bool is_bf16<BFloat16>() { return true; }

__device__ __forceinline__ float to_float(BFloat16 v) { return __uint_as_float((u32)v.bits << 16); }
__device__ __forceinline__ float to_float(Float32 v) { return v.value; }
__device__ __forceinline__ float to_float(Float16 v) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v.bits));
    return f;
}
__device__ __forceinline__ void store(BFloat16* to, float v) {
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to->bits) : "f"(v));
}
__device__ __forceinline__ void store(Float16* to, float v) {
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to->bits) : "f"(v));
}
__device__ __forceinline__ void store(Float32* to, float v) { to->value = v; }

__device__ __forceinline__ u32 bf16_pair(float low, float high) {
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

// 16 consecutive columns of one token, as they lie in memory.
template <class Source>
union Raw {
    uint4 words[sizeof(Source)];
    Source element[16];
};

// Past the L1 cache: h was written by other blocks during this launch.
template <class Source>
__device__ __forceinline__ Raw<Source> load16(const Source* from) {
    Raw<Source> raw;
#pragma unroll
    for (int i = 0; i < (int)sizeof(Source); i++) raw.words[i] = __ldcg(reinterpret_cast<const uint4*>(from) + i);
    return raw;
}

template <class Source>
__device__ __forceinline__ void unpack16(const Raw<Source>& raw, float (&v)[16]) {
#pragma unroll
    for (int i = 0; i < 16; i++) v[i] = to_float(raw.element[i]);
}

// Keeps the compiler from holding unpacked floats from one use of `raw` to the next: they would not fit the registers.
template <class Source>
__device__ __forceinline__ void forget(Raw<Source>& raw) {
#pragma unroll
    for (int i = 0; i < (int)sizeof(Source); i++)
        asm volatile("" : "+r"(raw.words[i].x), "+r"(raw.words[i].y), "+r"(raw.words[i].z), "+r"(raw.words[i].w));
}

__device__ __forceinline__ u32 amax16(const float (&v)[16]) {
    u32 largest = 0;
#pragma unroll
    for (int i = 0; i < 16; i++) largest = max(largest, __float_as_uint(v[i]) & 0x7FFFFFFFu);
    return largest;
}

// One NVFP4 block in place, bit for bit as formats/activations.py: v becomes e2m1(v / scales) * block scale, which bf16 holds exactly.
__device__ __forceinline__ void quantize_block(float (&v)[16], float g, float s) {
    const float amax = __uint_as_float(amax16(v));
    const float wanted = __fmul_rn(g, __fmul_rn(amax, 1.0f / 6.0f));
    u16 byte;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(byte) : "f"(0.0f), "f"(wanted));
    u32 pair;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(pair) : "h"(byte));
    const float scale = to_float(Float16{(u16)pair});
    const float inverse = scale == 0.0f ? 0.0f : __frcp_rn(__fmul_rn(scale, s));
#pragma unroll
    for (int i = 0; i < 16; i++) {
        const float magnitude = fminf(__fmul_rn(fabsf(v[i]), inverse), 6.0f);
        // The e2m1 grid at p = 2^e <= |.|, 1 <= p <= 4, has step p / 2, and so has fp32 around 1.5 * 2^22 p.
        const float power = fmaxf(__uint_as_float(__float_as_uint(magnitude) & 0x7F800000u), 1.0f);
        const float magic = 6291456.0f * power;
        v[i] = copysignf(__fsub_rn(__fadd_rn(magnitude, magic), magic), v[i]) * scale;
    }
}

__device__ __forceinline__ float swiglu(float gate, float up, float limit) {
    if (limit > 0.0f) {  // NaN passes, as in torch.clamp
        gate = gate > limit ? limit : gate;
        up = up > limit ? limit : (up < -limit ? -limit : up);
    }
    return gate / (1.0f + expf(-gate)) * up;
}

__device__ __forceinline__ u32 scaled(u32 codes, u32 scale) {
    u32 product;
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(product) : "r"(codes), "r"(scale));
    return product;
}

// Eight codes in a word as four bf16 pairs, e2m1 * 2^-126; bit places as in layouts/fragments.py.
__device__ __forceinline__ void decode(u32 word, u32 (&pairs)[4]) {
    pairs[0] = word & 0x81C081C0u;
    pairs[1] = (word << 3) & 0x81C081C0u;
    pairs[2] = (word << 6) & 0x81C081C0u;
    pairs[3] = ((word << 4) & 0x80008000u) | ((word >> 6) & 0x01800180u) | ((word >> 4) & 0x00400040u);
}

// A scale byte as bf16 twice, scale * 2^119: the byte is the upper part of fp16(scale * 2^7), whose exponent is moved.
__device__ __forceinline__ u32 scale_pair(u32 byte) { return byte * 0x00100010u + 0x70007000u; }
