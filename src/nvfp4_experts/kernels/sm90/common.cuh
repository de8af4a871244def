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

// By number: 0 bf16, 1 fp16, 2 fp32.
template <int>
struct ElementOf {
    typedef BFloat16 type;
};
template <>
struct ElementOf<1> {
    typedef Float16 type;
};
template <>
struct ElementOf<2> {
    typedef Float32 type;
};
#ifdef ELEMENT  // of x, where a source is compiled for one
typedef ElementOf<ELEMENT>::type Element;
#endif
#ifdef RESULT  // of y
typedef ElementOf<RESULT>::type Result;
#endif

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

// Two columns, at an even one.
__device__ __forceinline__ void load_pair(const Float32* from, float& low, float& high) {
    const float2 pair = __ldcg(reinterpret_cast<const float2*>(from));
    low = pair.x, high = pair.y;
}
template <class Source>
__device__ __forceinline__ void load_pair(const Source* from, float& low, float& high) {
    const u32 pair = __ldcg(reinterpret_cast<const u32*>(from));
    low = to_float(Source{(u16)pair}), high = to_float(Source{(u16)(pair >> 16)});
}

// Eight consecutive columns, 16 or 32 bytes.
template <class Source>
__device__ __forceinline__ void load8(const Source* from, float (&v)[8]) {
    union {
        uint4 words[sizeof(Source) / 2];
        Source element[8];
    } raw;
#pragma unroll
    for (int i = 0; i < (int)sizeof(Source) / 2; i++) raw.words[i] = __ldcg(reinterpret_cast<const uint4*>(from) + i);
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = to_float(raw.element[i]);
}

template <class Source>
__device__ __forceinline__ void unpack16(const Raw<Source>& raw, float (&v)[16]) {
#pragma unroll
    for (int i = 0; i < 16; i++) v[i] = to_float(raw.element[i]);
}
// By words: as 16-bit halves ptxas keeps them in registers of their own, and spills (entering.cuh, V4-Pro, e4m3).
__device__ __forceinline__ void unpack16(const Raw<BFloat16>& raw, float (&v)[16]) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const u32 word = reinterpret_cast<const u32*>(raw.words)[i];
        v[2 * i] = __uint_as_float(word << 16), v[2 * i + 1] = __uint_as_float(word & 0xFFFF0000u);
    }
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

// The NVFP4 quantiser of formats/activations.py, bit for bit. g, s: global scale in encode and decode direction.
__device__ __forceinline__ void global_scales_of_amax(u32 amax_bits, float& g, float& s) {
    const float amax = __uint_as_float(amax_bits);
    g = __fdiv_rn(2688.0f, amax);
    s = __frcp_rn(g);
    if (amax < 0x1p-100f) g = s = 1.0f;
    if (amax_bits >= 0x7F800000u) g = s = __uint_as_float(0x7FC00000u);
}

struct BlockScale {
    float scale, inverse;
};

__device__ __forceinline__ BlockScale block_scale(u32 amax_bits, float g, float s) {
    const float wanted = __fmul_rn(g, __fmul_rn(__uint_as_float(amax_bits), 1.0f / 6.0f));
    u16 byte;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(byte) : "f"(0.0f), "f"(wanted));
    u32 pair;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(pair) : "h"(byte));
    const float scale = to_float(Float16{(u16)pair});
    return {scale, scale == 0.0f ? 0.0f : __frcp_rn(__fmul_rn(scale, s))};
}

// e2m1(v / scales) * block scale, which bf16 holds exactly.
__device__ __forceinline__ float quantize_value(float v, BlockScale block) {
    const float magnitude = fminf(__fmul_rn(fabsf(v), block.inverse), 6.0f);
    // The e2m1 grid at p = 2^e <= |.|, 1 <= p <= 4, has step p / 2, and so has fp32 around 1.5 * 2^22 p.
    const float power = fmaxf(__uint_as_float(__float_as_uint(magnitude) & 0x7F800000u), 1.0f);
    const float magic = 6291456.0f * power;
    return copysignf(__fsub_rn(__fadd_rn(magnitude, magic), magic), v) * block.scale;
}

__device__ __forceinline__ void quantize_block(float (&v)[16], float g, float s) {
    const BlockScale block = block_scale(amax16(v), g, s);
#pragma unroll
    for (int i = 0; i < 16; i++) v[i] = quantize_value(v[i], block);
}

// silu(min(gate, L)) * clamp(up, -L, L); limit: L, infinity for none. NaN passes, as in torch.clamp. Exponential and
// reciprocal are the hardware's: 2^-22 off each, and the exponential by the |gate| * 2^-24 of its rounded argument, less
// than the order of a sum; the exact ones branch and take several times as long.
__device__ __forceinline__ float swiglu(float gate, float up, float limit) {
    float power, sigmoid;
    asm("min.NaN.f32 %0, %0, %1;" : "+f"(gate) : "f"(limit));
    asm("min.NaN.f32 %0, %0, %1;" : "+f"(up) : "f"(limit));
    asm("max.NaN.f32 %0, %0, %1;" : "+f"(up) : "f"(-limit));
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(gate * -1.44269504f));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(sigmoid) : "f"(1.0f + power));
    return gate * sigmoid * up;
}

// Word j of lane c of a quad goes to word c of lane j.
__device__ __forceinline__ void transpose_quad(u32 (&words)[4]) {
#pragma unroll
    for (int step = 1; step < 4; step *= 2) {
        const bool keeps_upper = threadIdx.x & step;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            if (j & step) continue;
            u32 &lower = words[j], &upper = words[j + step];
            const u32 got = __shfl_xor_sync(~0u, keeps_upper ? lower : upper, step);
            lower = keeps_upper ? got : lower;
            upper = keeps_upper ? upper : got;
        }
    }
}

// --- packed weights (layouts/fragments.py) --------------------------------------------------------------------------

constexpr int CODE_BYTES = 512, CHUNK_BYTES = CODE_BYTES + 64;  // 16 rows x 64 columns: codes, then block scales
constexpr float UNPACKED = 128.0f;  // undoes the 2^-7 that decoded weights carry; exact

// Sixteen codes in two words as the A operands of two k16 steps, bf16 pairs of e2m1 * 2^-126; layouts/fragments.py says
// why this is all of them.
__device__ __forceinline__ void decode(u32 first, u32 second, u32 (&a)[4], u32 (&b)[4]) {
    constexpr u32 CODES = 0x81C081C0;
    const u32 mixed = (first & 0x60306030u) | (second & ~0x60306030u);
    a[0] = first & CODES;
    a[1] = second << 2 & CODES;  // nothing that is kept goes round: a shift, which has more units than a rotation
    a[2] = mixed << 4 & CODES;
    a[3] = first << 6 & CODES;
    b[0] = __funnelshift_l(second, second, 8) & CODES;
    b[1] = __funnelshift_l(mixed, mixed, 10) & CODES;
    b[2] = __funnelshift_l(first, first, 12) & CODES;
    b[3] = __funnelshift_l(second, second, 14) & CODES;
}

// Two of four scale bytes, 0 and 2 or 1 and 3, as bf16(scale * 2^119): a byte is exponent and mantissa of bf16, 112 less
// in the exponent. `offsets` is SCALE_OFFSETS out of a register: one instruction takes a mask and a register, not two
// constants, and the assembler sees through every constant that has not been in memory.
constexpr u32 SCALE_OFFSETS = 0x70007000;
__device__ __forceinline__ u32 even_scales(u32 bytes, u32 offsets) { return (bytes << 4 & 0x0FF00FF0u) | offsets; }
__device__ __forceinline__ u32 odd_scales(u32 bytes, u32 offsets) { return (bytes >> 4 & 0x0FF00FF0u) | offsets; }

// A pair times the low or the high half of `scales`: an operand selector of the multiplication, no instruction of its own.
__device__ __forceinline__ u32 times_low(u32 pair, u32 scales) {
    u32 product;
    asm("{.reg .b16 l, h;\n.reg .b32 twice;\nmov.b32 {l, h}, %2;\nmov.b32 twice, {l, l};\nmul.rn.bf16x2 %0, %1, twice;}"
        : "=r"(product)
        : "r"(pair), "r"(scales));
    return product;
}
__device__ __forceinline__ u32 times_high(u32 pair, u32 scales) {
    u32 product;
    asm("{.reg .b16 l, h;\n.reg .b32 twice;\nmov.b32 {l, h}, %2;\nmov.b32 twice, {h, h};\nmul.rn.bf16x2 %0, %1, twice;}"
        : "=r"(product)
        : "r"(pair), "r"(scales));
    return product;
}

// A lane's share of a chunk as the A operands of four k16 steps: a[j] = columns 16 j + {2c, 2c + 1 | 2c + 8, 2c + 9} of
// rows g and g + 8, each e2m1 * block scale * 2^-7, exact. scales.x, .y: of rows g and g + 8, a byte a step.
__device__ __forceinline__ void decode_chunk(uint4 codes, uint2 scales, u32 offsets, u32 (&a)[4][4]) {
    decode(codes.x, codes.y, a[0], a[1]), decode(codes.z, codes.w, a[2], a[3]);
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const u32 bytes = h ? scales.y : scales.x;
        const u32 even = even_scales(bytes, offsets), odd = odd_scales(bytes, offsets);
#pragma unroll
        for (int q = h; q < 4; q += 2) {
            a[0][q] = times_low(a[0][q], even), a[1][q] = times_low(a[1][q], odd);
            a[2][q] = times_high(a[2][q], even), a[3][q] = times_high(a[3][q], odd);
        }
    }
}
