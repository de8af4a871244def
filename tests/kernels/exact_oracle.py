# SPDX-License-Identifier: Apache-2.0
"""The rule of Blackwell's FP4 tensor core, one sum at a time, in fractions: slow, and right at a glance.

It shares nothing with the library: codes and scales are decoded here, from their definition. fp32 results are bits.
"""

from __future__ import annotations

import struct
from fractions import Fraction

NAN = 0x7FFF_FFFF
FRACTION_BITS = 35


def e2m1(code: int) -> Fraction:
    """Sign, two exponent bits, one mantissa bit."""
    exponent, mantissa = code >> 1 & 3, code & 1
    magnitude = Fraction(mantissa, 2) if exponent == 0 else (1 + Fraction(mantissa, 2)) * 2 ** (exponent - 1)
    return -magnitude if code & 8 else magnitude


def e4m3(byte: int) -> tuple[Fraction, int] | None:
    """Significand and exponent of an unsigned e4m3 scale: the sign is not looked at; None is NaN."""
    exponent, mantissa = byte >> 3 & 15, byte & 7
    if byte & 0x7F == 0x7F:
        return None
    return (Fraction(mantissa, 8), -6) if exponent == 0 else (1 + Fraction(mantissa, 8), exponent - 7)


def fp32(bits: int) -> tuple[Fraction, int]:
    """Significand and exponent of a finite fp32."""
    sign, exponent, mantissa = bits >> 31, bits >> 23 & 255, Fraction(bits & 0x7F_FFFF, 2**23)
    magnitude, power = (mantissa, -126) if exponent == 0 else (1 + mantissa, exponent - 127)
    return (-magnitude if sign else magnitude), power


def two_to(exponent: int) -> Fraction:
    return Fraction(2) ** exponent


def fp32_toward_zero(value: Fraction) -> int:
    """The bits of the fp32 next to a value, on the side of zero; zero is +0."""
    if value == 0:
        return 0
    exponent = -126
    while two_to(exponent + 1) <= abs(value):
        exponent += 1
    units = int(abs(value) / two_to(exponent - 23))  # of the last place; int() cuts
    assert units < 2**24 and exponent < 128
    bits = units if units < 2**23 else (exponent + 127) << 23 | units - 2**23
    return bits | (1 << 31 if value < 0 else 0)


def exact_sum(a_codes: list[int], a_scales: list[int], b_codes: list[int], b_scales: list[int]) -> int:
    """The bits of one sum over K: codes 0..15 (K of them), scale bytes (K / 16)."""
    accumulator = 0
    blocks = len(a_scales)
    assert len(a_codes) == len(b_codes) == 16 * blocks and len(b_scales) == blocks
    for step in range(0, blocks, 4):
        addends = [fp32(accumulator)]
        for block in range(step, step + 4):
            if block >= blocks:
                continue  # zeros under zero scales: nothing to add, and no exponent that could be the largest
            a_scale, b_scale = e4m3(a_scales[block]), e4m3(b_scales[block])
            if a_scale is None or b_scale is None:
                return NAN
            columns = range(16 * block, 16 * block + 16)
            dot = sum((e2m1(a_codes[k]) * e2m1(b_codes[k]) for k in columns), Fraction(0))
            if a_scale[0] and b_scale[0]:
                addends.append((dot * a_scale[0] * b_scale[0], a_scale[1] + b_scale[1]))
        largest = max(exponent for _, exponent in addends)
        grid = two_to(largest - FRACTION_BITS)
        accumulator = fp32_toward_zero(sum((int(s * two_to(e) / grid) * grid for s, e in addends), Fraction(0)))
    return accumulator


def bits_of(value: float) -> int:
    return int(struct.unpack("<I", struct.pack("<f", value))[0])
