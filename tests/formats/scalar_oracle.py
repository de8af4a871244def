# SPDX-License-Identifier: Apache-2.0
"""The number formats by definition, in float64 and numpy, sharing nothing with the library.

Codes are values computed from their bits; rounding is a search for the nearest value, a tie going to the even code.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def small_float(code: int, exponent_bits: int, mantissa_bits: int, bias: int) -> float:
    """Value of a minifloat from its bits, IEEE-style with subnormals; special codes are the caller's business."""
    sign = -1.0 if code >> (exponent_bits + mantissa_bits) else 1.0
    exponent = (code >> mantissa_bits) & (2**exponent_bits - 1)
    fraction = (code & (2**mantissa_bits - 1)) / 2**mantissa_bits
    if exponent == 0:
        return sign * fraction * 2.0 ** (1 - bias)
    return sign * (1 + fraction) * 2.0 ** (exponent - bias)


def e2m1(code: int) -> float:
    return small_float(code, 2, 1, bias=1)


def e4m3(byte: int) -> float:
    return float("nan") if byte & 0x7F == 0x7F else small_float(byte, 4, 3, bias=7)


E2M1 = np.array([e2m1(c) for c in range(8)])
E4M3 = np.array([e4m3(b) for b in range(0x7F)])


def nearest(magnitudes: NDArray[np.float64], values: NDArray[np.float64]) -> NDArray[np.int64]:
    """Index of the nearest of ascending `values` to each magnitude; ties to the even index; saturating; not for NaN."""
    distance = np.abs(np.minimum(magnitudes, values[-1])[..., None] - values)
    best = distance.min(axis=-1, keepdims=True)
    even_first = np.argsort(np.arange(len(values)) % 2, kind="stable")
    return even_first[(distance == best)[..., even_first].argmax(axis=-1)]


def encode_e2m1(x: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Codes with the sign of x kept, also that of zero; not for NaN."""
    return (nearest(np.abs(x.astype(np.float64)), E2M1) + 8 * np.signbit(x)).astype(np.uint8)


def pack(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return codes[..., 0::2] + 16 * codes[..., 1::2]


def kernel_recipe(
    x: NDArray[np.float32], g: NDArray[np.float32], s: NDArray[np.float32]
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Packed codes and scale bytes of finite fp32 rows (T, K); g and s broadcast against (T, 1)."""
    blocks = x.reshape(x.shape[0], -1, 16)
    with np.errstate(over="ignore"):
        scale = np.minimum(g * (np.abs(blocks).max(axis=-1) * np.float32(1 / 6)), np.float32(448))
    scale_bytes = nearest(scale.astype(np.float64), E4M3).astype(np.uint8)
    decoded = E4M3[scale_bytes].astype(np.float32)
    with np.errstate(divide="ignore"):
        inverse = np.where(decoded == 0, np.float32(0), np.float32(1) / (decoded * s))
    codes = encode_e2m1(blocks * inverse[..., None])
    return pack(codes.reshape(x.shape)), scale_bytes
