# SPDX-License-Identifier: Apache-2.0
"""MXFP4 as a container, and its exact cast to NVFP4.

    value[..., k] = e2m1(codes[..., k]) * 2^(scales[..., k // 32] - 127)

codes   (..., K/2)  uint8, two codes a byte, even k in the low nibble
scales  (..., K/32) uint8, e8m0 bytes; 0xFF is NaN

The cast to NVFP4 keeps every code byte. With j = byte - 127 the exponent of a block and jmax the largest of them:

    global_scale = 2^(jmax - 8)        block_scale = 2^(j - jmax + 8)        (for both halves of 16)

e4m3 holds 2^8 down to 2^-9, so the cast is exact while jmax - j <= 17.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import FormatError
from .codes import decode_codes, decode_e8m0, encode_e4m3
from .nvfp4 import Nvfp4Tensor

MX_BLOCK_SIZE = 32
_TOP, _RANGE = 8, 17  # e4m3 holds the powers of two from 2^8 down to 2^(8 - 17)
_NAN_BYTE, _BIAS = 0xFF, 127


@dataclass(frozen=True, eq=False, repr=False)
class Mxfp4Tensor:
    """A tensor in MXFP4; see the module docstring for the formula.

    Args:
        codes: (..., K/2) uint8.
        scales: (..., K/32) uint8 e8m0 bytes (a float8_e8m0fnu tensor: `.view(torch.uint8)`).

    Raises:
        FormatError: a dtype, shape or device that is not the above.
    """

    codes: Tensor
    scales: Tensor

    def __post_init__(self) -> None:
        for name, tensor in (("codes", self.codes), ("scales", self.scales)):
            if tensor.dtype != torch.uint8:
                raise FormatError(name, "must be uint8", tensor.dtype, "view the bytes as torch.uint8")
        half = MX_BLOCK_SIZE // 2
        if self.codes.ndim == 0 or self.codes.shape[-1] == 0 or self.codes.shape[-1] % half:
            raise FormatError(
                "codes", "the last dimension must be a positive multiple of 16 bytes, which is one block of 32",
                tuple(self.codes.shape), "pack two codes a byte along K",
            )  # fmt: skip
        expected = (*self.codes.shape[:-1], self.codes.shape[-1] // half)
        if tuple(self.scales.shape) != expected:
            raise FormatError(
                "scales", f"expected {expected} for codes {tuple(self.codes.shape)}", tuple(self.scales.shape),
                "pass one e8m0 byte per 32 values along K",
            )  # fmt: skip
        if self.codes.device != self.scales.device:
            raise FormatError(
                "scales", f"must be on the device of the codes, {self.codes.device}", self.scales.device, "move them"
            )

    @property
    def shape(self) -> torch.Size:
        """Shape of the values, (..., K)."""
        return torch.Size((*self.codes.shape[:-1], 2 * self.codes.shape[-1]))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(..., K) values: exact in fp32 but for 6 * 2^127 (infinity) and its like, then one cast to `dtype`."""
        blocks = decode_codes(self.codes).unflatten(-1, (self.scales.shape[-1], MX_BLOCK_SIZE))
        return (blocks * decode_e8m0(self.scales).unsqueeze(-1)).flatten(-2).to(dtype)

    def to(self, device: torch.device | str) -> Mxfp4Tensor:
        """The same tensor on another device."""
        return Mxfp4Tensor(self.codes.to(device), self.scales.to(device))

    def __repr__(self) -> str:
        return f"Mxfp4Tensor(shape={tuple(self.shape)}, device={str(self.codes.device)!r})"


def exponent_max(t: Mxfp4Tensor) -> int:
    """The largest block exponent (byte - 127) among blocks that hold a nonzero value; -127 if there is none.

    Pass the larger one of gate and up to `mxfp4_to_nvfp4` to give both one global scale. A NaN scale raises
    FormatError.
    """
    return _largest(*_exponents(t))


def mxfp4_to_nvfp4(t: Mxfp4Tensor, exponent_max: int | None = None) -> Nvfp4Tensor:
    """Cast MXFP4 to NVFP4 without changing a value: the code bytes are kept, the scales rewritten.

    Args:
        t: the MXFP4 tensor.
        exponent_max: jmax of the module's formula, from that of t up to 127; default: that of t. Anything below -118
            acts as -118, where the global scale is the smallest normal fp32.

    Returns:
        Nvfp4Tensor whose codes are those of t (shared memory).

    Raises:
        FormatError: a NaN scale; a nonzero block more than 17 powers of two below exponent_max, or above it (the
            message names the block); an exponent_max above 127.

    Numerics: blocks of zeros get a scale clamped into range: their values are +-0 under any scale.
    Cost: one read of codes and scales; syncs.
    """
    exponents, nonzero = _exponents(t)
    top = _largest(exponents, nonzero) if exponent_max is None else exponent_max
    if top > _BIAS:
        raise FormatError("exponent_max", "must be at most 127, as in e8m0", top, "pass exponent_max(t)")
    top = max(top, _TOP - 126)
    outside = nonzero & ((exponents < top - _RANGE) | (exponents > top))
    if bool(outside.any()):
        where = tuple(int(i) for i in outside.nonzero()[0])
        raise FormatError(
            f"block {where}", f"under exponent_max {top} NVFP4 holds block exponents {top - _RANGE}..{top} exactly",
            int(exponents[where]), "pass a fitting exponent_max, or dequantize and quantize, which rounds",
        )  # fmt: skip
    scale_bytes = (exponents - top + _TOP).clamp(_TOP - _RANGE, _TOP) + _BIAS
    block_scales = encode_e4m3(decode_e8m0(scale_bytes.to(torch.uint8))).repeat_interleave(2, dim=-1)
    global_scale = torch.full((), 2.0 ** (top - _TOP), dtype=torch.float32, device=t.codes.device)
    return Nvfp4Tensor(t.codes, block_scales, global_scale)


def _exponents(t: Mxfp4Tensor) -> tuple[Tensor, Tensor]:
    """Exponent of each block (int32), and whether the block holds a nonzero value."""
    is_nan = t.scales == _NAN_BYTE
    if bool(is_nan.any()):
        where = tuple(int(i) for i in is_nan.nonzero()[0])
        raise FormatError("scales", "must not be NaN", f"byte 0xFF at {where}", "repair the source tensor")
    nonzero = ((t.codes & 0x77) != 0).unflatten(-1, (t.scales.shape[-1], MX_BLOCK_SIZE // 2)).any(-1)
    return t.scales.int() - _BIAS, nonzero


def _largest(exponents: Tensor, nonzero: Tensor) -> int:
    return int(exponents[nonzero].max()) if bool(nonzero.any()) else -_BIAS
