# SPDX-License-Identifier: Apache-2.0
"""The code tables: e2m1, e4m3 and e8m0, each stated once, here.

e2m1 (FP4): sign, 2 exponent bits, 1 mantissa bit; no infinity, no NaN. Codes 0..7 are 0, .5, 1, 1.5, 2, 3, 4, 6;
bit 3 is the sign. Two codes share a byte, the even k in the low nibble:

    byte[k // 2] = code[k + 1] << 4 | code[k]            (k even)

e4m3 (FP8, the `fn` variant): largest 448, smallest normal 2^-6, smallest 2^-9, NaN at 0x7F and 0xFF, no infinity.
e8m0: a power of two, 2^(byte - 127); 0xFF is NaN.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ..errors import FormatError

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
E2M1_MAX = 6.0
E4M3_MAX = 448.0
BLOCK_SIZE = 16
AMAX_FLOOR = 2.0**-100
"""An amax below this counts as zero; above it no step of any recipe overflows, underflows or meets a subnormal."""

_E4M3_ONE = 0x38  # the byte of 1.0
_E4M3_NAN, _SIGN_AND_MAGNITUDE = 0x7F << 7, 0xBF80 - 0x10000  # where decode_e4m3 has moved them in 16 bits
_PAIR_VIEW = {torch.bfloat16: torch.int32, torch.float16: torch.int32, torch.float32: torch.int64}  # holds two


def encode_e2m1(x: Tensor) -> Tensor:
    """Round fp32 values to e2m1 codes: to nearest, ties to the even code, saturating at 6.

    Let p = 2^e be the power of two at or below |x|, held to 1 <= p <= 4: the e2m1 grid around |x| has step p/2, and
    so has fp32 around 2^22 p. Hence |x| + 2^22 p is rounded by the adder: its low bits become |x| / (p/2), its
    exponent field 149 + e, and the code is |x| / (p/2) + 2 e. The 3 in 2^22 + 3 adds 6 to the low bits, which
    makes 2 * 149 + 6 a multiple of 8.

    Args:
        x: fp32, any shape and strides.

    Returns:
        uint8 of the same shape, one code 0..15 per value.

    Raises:
        FormatError: another dtype; its bits mean something else.

    Numerics: infinities saturate (codes 7 and 15); -0 and negatives that round to zero give code 8; NaN gives code 7
        whatever its sign bit, so a caller that must keep NaN carries it in a scale.
    Cost: elementwise, no sync; temporaries of three times x, so feed a large tensor in tiles.
    Source: OCP Microscaling Formats 1.0, 5.3.3; the result equals PTX `cvt.rn.satfinite.e2m1x2.f32`.
    """
    if x.dtype != torch.float32:
        raise FormatError("x", "must be float32", x.dtype, "cast it with .float()")
    bits = x.view(torch.int32)
    magnitude = (bits & 0x7FFF_FFFF).clamp_(max=0x40C0_0000)  # min(|x|, 6) as integers, where NaN sorts above 6
    power = (magnitude & 0x7F80_0000).clamp_(min=0x3F80_0000)  # p: the exponent field alone, at least that of 1
    rounded = torch.add(magnitude.view(torch.float32), power.view(torch.float32), alpha=2.0**22 + 3)
    rounded = rounded.view(torch.int32)
    code = (rounded >> 22).add_(rounded).to(torch.uint8).bitwise_and_(7)
    negative = bits <= -0x0080_0000  # sign bit set and not NaN: at or below the bits of -infinity
    return code.bitwise_or_(negative.view(torch.uint8) << 3)


def decode_e2m1(nibbles: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Value of each code; `nibbles` is uint8 0..15, one code per element, any shape."""
    return torch.tensor(E2M1_VALUES, dtype=dtype, device=nibbles.device)[nibbles.int()]


def pack_codes(nibbles: Tensor) -> Tensor:
    """Pack (..., K) codes, one per uint8, into (..., K/2) bytes: byte j = code[2j + 1] << 4 | code[2j]."""
    if nibbles.shape[-1] % 2:
        raise FormatError("nibbles", "the last dimension must be even", tuple(nibbles.shape), "append a zero code")
    pairs = nibbles.reshape(-1).view(torch.int16)  # odd << 8 | even
    # The cast keeps the low byte of each pair.
    return (pairs | (pairs >> 4)).to(torch.uint8).view(*nibbles.shape[:-1], nibbles.shape[-1] // 2)


def unpack_codes(packed: Tensor) -> Tensor:
    """Unpack (..., K/2) bytes into (..., K) codes; the inverse of `pack_codes`."""
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)


def decode_codes(packed: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values of packed codes: (..., K/2) bytes to (..., K) values of `dtype` (bf16, fp16 or fp32)."""
    table = _pair_table(packed, dtype)[_E4M3_ONE << 8 : (_E4M3_ONE + 1) << 8]
    values = table.index_select(0, packed.flatten().int()).view(dtype)
    return values.view(*packed.shape[:-1], 2 * packed.shape[-1])


def decode_blocks(codes: Tensor, block_scales: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Decode codes times block scales, without the global scale, exactly.

        value[..., k] = e2m1(codes[..., k]) * block_scales[..., k // 16]

    Exact in bf16: an e2m1 significand has 2 bits and an e4m3 significand 4, so a product has at most 6, and bf16
    holds 8; nonzero magnitudes lie in [2^-10, 2688], far inside its exponent range. fp16 (11 bits, subnormal below
    2^-14) and fp32 hold them for the same reason. The fp32 global scale belongs after the sum over K.

    Args:
        codes: (..., K/2) uint8.
        block_scales: (..., K/16) float8_e4m3fn, linear order.
        dtype: bf16, fp16 or fp32.

    Returns:
        (..., K) of `dtype`.

    Raises:
        FormatError: shapes that do not go together, or another dtype.

    Numerics: a NaN scale gives NaN in its 16 values, also where the code is zero; -0 keeps its sign.
    Cost: one gather of two values at a time from a table of every scale byte and code byte (256 KiB for bf16, built
        once per dtype and device), through a 4-byte index per pair; no sync after the first call.
    """
    *leading, half = codes.shape
    if half % (BLOCK_SIZE // 2) or list(block_scales.shape) != [*leading, half // (BLOCK_SIZE // 2)]:
        raise FormatError(
            "block_scales", f"one per 16 values of codes {tuple(codes.shape)}", tuple(block_scales.shape),
            "pass linear scales of shape (..., K/16) for codes of shape (..., K/2)",
        )  # fmt: skip
    blocks = codes.reshape(*block_scales.shape, BLOCK_SIZE // 2)
    index = blocks + (block_scales.view(torch.uint8).int() << 8).unsqueeze(-1)
    values = _pair_table(codes, dtype).index_select(0, index.flatten()).view(dtype)
    return values.view(*leading, 2 * half)


def _pair_table(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """`_scaled_pairs` for the device of codes; a fake one, made while a program is traced, is not kept."""
    table = _scaled_pairs(dtype, codes.device)
    if type(table) is not Tensor:
        _scaled_pairs.cache_clear()
    return table


@lru_cache(maxsize=32)
def _scaled_pairs(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Both decoded values of code byte c under scale byte s, viewed as one integer, at index s << 8 | c."""
    if dtype not in _PAIR_VIEW:
        raise FormatError("dtype", "must be bfloat16, float16 or float32", dtype, "decode to float32 and cast")
    byte = torch.arange(256, dtype=torch.uint8, device=device)
    values = decode_e2m1(unpack_codes(byte.unsqueeze(-1)))  # (256, 2)
    products = byte.view(torch.float8_e4m3fn).float()[:, None, None] * values
    return products.to(dtype).view(_PAIR_VIEW[dtype]).flatten()


def encode_e4m3(x: Tensor) -> Tensor:
    """Round fp32 values to e4m3 to nearest even, saturating at +-448; NaN stays NaN.

    The clamp comes first because the cast alone saturates in some torch builds and gives NaN in others.
    """
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def decode_e4m3(values: Tensor) -> Tensor:
    """fp32 of float8_e4m3fn values of any shape and strides, exact; NaN stays NaN.

    On a CPU with integers, which vectorise as torch's cast does not: a byte's seven lower bits, moved up by seven in an
    fp16, are its magnitude times 2^-8. (fp16 to fp32 heeds subnormals whatever a thread does with those of fp32.)
    """
    if values.device.type != "cpu":
        return values.float()
    bits = values.view(torch.int8).to(torch.int16)  # its sign in all upper bits
    bits <<= 7
    bits &= _SIGN_AND_MAGNITUDE
    wide = bits.view(torch.float16).float().mul_(2.0**8)
    bits &= _E4M3_NAN
    if bits.numel() and bits.amax() == _E4M3_NAN:
        wide.masked_fill_(bits == _E4M3_NAN, torch.nan)
    return wide


def decode_e8m0(scales: Tensor) -> Tensor:
    """fp32 value 2^(byte - 127) of each e8m0 byte (uint8 or float8_e8m0fnu); byte 0 is 2^-127, 0xFF is NaN."""
    byte = scales.view(torch.uint8).int()
    # The byte is the fp32 exponent field itself, but for the two ends: 2^-127 is subnormal, 0xFF is NaN.
    bits = torch.where(byte == 0, 0x0040_0000, torch.where(byte == 255, 0x7FC0_0000, byte << 23))
    return bits.to(torch.int32).view(torch.float32)
