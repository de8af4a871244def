// SPDX-License-Identifier: Apache-2.0
// Rounding to e4m3 in units of a row's amax / 448, as quantize_fp8_rows of formats/activations.py does it: of four values
// (activations), and of packed weights by way of a table of their eight magnitudes. Needs common.cuh.

// Four values as e4m3, to nearest even, saturating at 448; NaN stays NaN.
__device__ __forceinline__ u32 e4m3_quad(float v0, float v1, float v2, float v3) {
    u32 quad;
    asm("{.reg .b16 l, h;\ncvt.rn.satfinite.e4m3x2.f32 l, %2, %1;\ncvt.rn.satfinite.e4m3x2.f32 h, %4, %3;\n"
        "mov.b32 %0, {l, h};}"
        : "=r"(quad)
        : "f"(v0), "f"(v1), "f"(v2), "f"(v3));
    return quad;
}

// Four e4m3 as two pairs of fp16, which hold them exactly.
__device__ __forceinline__ void f16_pairs(u32 quad, u32& low, u32& high) {
    asm("{.reg .b16 l, h;\nmov.b32 {l, h}, %2;\ncvt.rn.f16x2.e4m3x2 %0, l;\ncvt.rn.f16x2.e4m3x2 %1, h;}"
        : "=r"(low), "=r"(high)
        : "r"(quad));
}

// The amax that a row's scale comes from; NaN stays NaN.
__device__ __forceinline__ float amax_or_floor(float amax) {
    asm("max.NaN.f32 %0, %0, %1;" : "+f"(amax) : "f"(0x1p-100f));
    return amax;
}

// What a row is in units of.
__device__ __forceinline__ float unit_of(float amax) { return __fdiv_rn(amax, 448.0f); }

// e4m3 of the magnitudes 0, .5, 1, 1.5 (low) and 2, 3, 4, 6 (high), times a block scale and 448 / amax.
struct Magnitudes {
    u32 low, high;
};

// scale: 2^7 times it; inverse: 448 / amax * 2^-7. Only the products with 1 and 1.5 round; the others are these times a
// power of two. NaN makes NaN of code 0 too.
__device__ __forceinline__ Magnitudes magnitudes(float scale, float inverse) {
    const float one = __fmul_rn(scale, inverse), one_and_half = __fmul_rn(1.5f * scale, inverse);
    return {e4m3_quad(0.0f * one, 0.5f * one, one, one_and_half),
            e4m3_quad(2.0f * one, 2.0f * one_and_half, 4.0f * one, 4.0f * one_and_half)};
}

// The inverse of a weight row: the quotient to nearest, without what a division has for other numbers. amax is bf16's, and
// for each of its mantissas one step from a reciprocal two units off still rounds to the same (test_sm90_fp8.py).
__device__ __forceinline__ float inverse_of(float amax) {
    constexpr float LARGEST = 448.0f * 0x1p-7f;
    float reciprocal;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(amax));
    const float quotient = __fmul_rn(LARGEST, reciprocal);
    return __fmaf_rn(__fmaf_rn(-quotient, amax, LARGEST), reciprocal, quotient);
}

// Four codes as e4m3: a magnitude in each of the lower four nibbles of `selectors`, whose bits 3 are 0; a sign in bit 7 of
// each byte of `signs`.
__device__ __forceinline__ u32 pick(Magnitudes table, u32 selectors, u32 signs) {
    u32 bytes;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(table.low), "r"(table.high), "r"(selectors));
    return bytes | (signs & 0x80808080u);
}

// A lane's share of a chunk (layouts/e4m3_fragments.py), of rows g and g + 8, as the A operands of two k32 steps, each row
// in units of its amax / 448. scales: a byte a row; moved by 20 bits and raised by 112 exponents it is fp32. That makes a
// number of NaN, but the row's amax is NaN then.
__device__ __forceinline__ void decode_chunk_e4m3(uint4 codes, u32 scales, const float (&inverses)[2], u32 (&a)[2][4]) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const float scale = __uint_as_float(((h ? scales << 12 : scales << 20) & 0x0FF00000u) + (112 << 23));
        const Magnitudes table = magnitudes(scale, inverses[h]);
#pragma unroll
        for (int step = 0; step < 2; step++) {
            const u32 word = h ? (step ? codes.w : codes.z) : (step ? codes.y : codes.x);
            const u32 selectors = word & 0x77777777u;
            a[step][h] = pick(table, selectors, word);
            a[step][2 + h] = pick(table, selectors >> 16, word << 4);
        }
    }
}
