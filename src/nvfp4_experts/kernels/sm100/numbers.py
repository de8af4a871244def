# SPDX-License-Identifier: Apache-2.0
"""Device functions of the number formats, the same bits on every machine and under Triton's interpreter.

    block_scale = e4m3(min(g * (block_amax * fl(1/6)), 448))        the "kernel" recipe of formats/activations.py
    inverse     = 0 if block_scale == 0 else 1 / (block_scale * s)
    code        = e2m1(x * inverse)

Bytes are made and read with integers: no FP8 or FP4 conversion of a compiler or an interpreter takes part. A maximum
is that of the bits of |x| as integers, where NaN sorts above infinity. Kernels that call these functions are compiled
without contraction of products and sums, and division is IEEE's.
"""

from __future__ import annotations

import triton
import triton.language as tl

E4M3_MAX = tl.constexpr(448.0)
NVFP4_MAX = tl.constexpr(2688.0)
AMAX_FLOOR = tl.constexpr(2.0**-100)
SIXTH = tl.constexpr(1.0 / 6.0)
INFINITY = tl.constexpr(float("inf"))


@triton.jit
def magnitude_bits(x):
    """Bits of |x|, fp32, as integers that sort like the magnitudes, NaN last."""
    return x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def encode_e4m3(x):
    """Bytes of fp32 values >= 0 or NaN: to nearest even, saturating at 448; NaN is 0x7F."""
    x = tl.where(x > E4M3_MAX, E4M3_MAX, x)
    bits = x.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    # Around 2^14 fp32 has a step of 2^-9, that of e4m3 below 2^-6: the adder rounds.
    subnormal = (x + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    byte = tl.where(x < 0.015625, subnormal, normal)
    return tl.where(x != x, 0x7F, byte).to(tl.uint8)


@triton.jit
def decode_e4m3(byte):
    """fp32 values of bytes; exact."""
    bits = byte.to(tl.int32)
    # Exponent and mantissa moved into fp32's read as value * 2^-120, subnormals included.
    moved = ((bits & 0x80) << 24) | ((bits & 0x7F) << 20)
    value = moved.to(tl.float32, bitcast=True) * 1.329227995784916e36
    return tl.where((bits & 0x7F) == 0x7F, float("nan"), value)


@triton.jit
def encode_e2m1(x):
    """Codes 0..15 of fp32 values, as int32: to nearest even, saturating; NaN is 7. formats/codes.py says how."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = tl.minimum(bits & 0x7FFFFFFF, 0x40C00000)
    power = tl.maximum(magnitude & 0x7F800000, 0x3F800000)
    rounded = magnitude.to(tl.float32, bitcast=True) + power.to(tl.float32, bitcast=True) * 4194307.0
    rounded = rounded.to(tl.int32, bitcast=True)
    code = ((rounded >> 22) + rounded) & 7
    return code | tl.where(bits <= -0x00800000, 8, 0)


@triton.jit
def decode_blocks(codes, block_scales):
    """(R, C/2) codes times (R, C/16) block scales, both uint8: (R, C) fp16, exact (formats/codes.py proves it)."""
    rows: tl.constexpr = codes.shape[0]
    columns: tl.constexpr = codes.shape[1] * 2
    pairs = codes.to(tl.int32)
    nibbles = tl.join(pairs & 0xF, pairs >> 4).reshape(rows, columns // 16, 16)
    # Sign and magnitude moved into fp32's read as e2m1 * 2^-126, subnormals included.
    moved = ((nibbles & 8) << 28) | ((nibbles & 7) << 22)
    values = moved.to(tl.float32, bitcast=True) * 8.507059173023462e37
    return (values * decode_e4m3(block_scales)[:, :, None]).reshape(rows, columns).to(tl.float16)


@triton.jit
def scales_from_amax(bits):
    """Global scales (g, s), encode and decode direction, from the bits of an amax."""
    amax = bits.to(tl.float32, bitcast=True)
    counts_as_zero = amax < AMAX_FLOOR
    g = tl.div_rn(NVFP4_MAX, tl.where(counts_as_zero, NVFP4_MAX, amax))
    g = tl.where(amax < INFINITY, g, float("nan"))
    return g, tl.div_rn(1.0, g)


@triton.jit
def scales_from_static(s):
    """Global scales (g, s) from a calibrated s; NaN outside [AMAX_FLOOR / 2688, largest fp32 / 2688]."""
    s = tl.where((s >= AMAX_FLOOR / NVFP4_MAX) & (s <= 3.4028234663852886e38 / NVFP4_MAX), s, float("nan"))
    return tl.div_rn(1.0, s), s


@triton.jit
def quantize(x, g, s):
    """(R, C) fp32 under global scales (g, s), scalars or (R,): codes (R, C/2) and block scales (R, C/16), uint8."""
    rows: tl.constexpr = x.shape[0]
    columns: tl.constexpr = x.shape[1]
    blocks = x.reshape(rows, columns // 16, 16)
    g = (g + tl.zeros((rows,), tl.float32))[:, None]
    s = (s + tl.zeros((rows,), tl.float32))[:, None]
    amax = tl.max(magnitude_bits(blocks), axis=2).to(tl.float32, bitcast=True)
    block_scales = encode_e4m3(g * (amax * SIXTH))
    decoded = decode_e4m3(block_scales)
    inverse = tl.where(decoded == 0.0, 0.0, tl.div_rn(1.0, tl.where(decoded == 0.0, 1.0, decoded * s)))
    nibbles = encode_e2m1(blocks * inverse[:, :, None])
    low, high = tl.split(nibbles.reshape(rows, columns // 2, 2))
    return (low | (high << 4)).to(tl.uint8), block_scales
