// SPDX-License-Identifier: Apache-2.0
// Rounding to e4m3 in units of a row's amax / 448, as quantize_fp8_rows of formats/activations.py does it.

// Four values as e4m3, to nearest even, saturating at 448; NaN stays NaN.
__device__ __forceinline__ u32 e4m3_quad(float v0, float v1, float v2, float v3) {
    u32 quad;
    asm("{.reg .b16 l, h;\ncvt.rn.satfinite.e4m3x2.f32 l, %2, %1;\ncvt.rn.satfinite.e4m3x2.f32 h, %4, %3;\n"
        "mov.b32 %0, {l, h};}"
        : "=r"(quad)
        : "f"(v0), "f"(v1), "f"(v2), "f"(v3));
    return quad;
}

// The amax that a row's scale comes from; NaN stays NaN.
__device__ __forceinline__ float amax_or_floor(float amax) { return amax < 0x1p-100f ? 0x1p-100f : amax; }
