# SPDX-License-Identifier: Apache-2.0
"""The sum over K of Blackwell's FP4 tensor core (mxf4nvf4, K = 64 a step), bit for bit by a published model of it.

    term_g = (sum of 16 products of codes) * sa_g * sb_g          of the four groups g of a step, exact
    P      = max(power(sum), power(sa_g) * power(sb_g))           over the sum so far and the four groups
    sum    = fp32(cut(sum) + cut(term_0) + ... + cut(term_3))     starts at 0

    power(v)   the power of two at or below |v|; none of zero
    cut(v)     v toward zero to a multiple of P * 2^-35: 35 fractional bits under the largest power
    fp32(v)    v toward zero to 24 significant bits

A group counts in P by its scales, whatever its dot product is: codes that cancel still push low bits of the others out.
Scales are unsigned: their sign bit is not looked at. A NaN scale makes every sum it meets 0x7FFFFFFF. K that is no
multiple of 64 goes on with zeros. Terms and sums are multiples of 2^-20, so a cut is felt from P = 2^16 on (two scales
of 2^8 or more, or a sum of that size), and no sum is subnormal, infinite or -0. Hence it makes no difference that the
source gives subnormal scales the power 2^-6, and zero 2^-126.

Both forms below compute in fp64, and exactly: a cut value has at most 47 bits (|term_g| < 2^11.2 of its power), a sum
of five 50. cpu/csrc/exact.h is the native form; tests hold both to a scalar port in fractions, bit for bit.

Source: microsoft/MMA-Sim (arXiv 2511.10909), a published model; not yet compared with hardware by this project.
"""

from __future__ import annotations

from ctypes import byref

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...errors import LayoutError
from ...formats.codes import BLOCK_SIZE, decode_blocks
from .. import native
from ..target import cpu_threads

STEP = 64
GROUPS = STEP // BLOCK_SIZE
FRACTION_BITS = 35
TILE_SUMS = 1 << 18
"""Sums that are computed together in torch: some 20 temporaries of that many fp64 values live at a time."""
TILE_VALUES = 1 << 22
"""Decoded fp32 values of b, and of a, at a time."""
CHUNK = 1024
"""Tokens of one native call, which keeps 1.75 bytes for each value of theirs."""

_EXPONENT_FIELD = 0x7F80_0000  # of fp32
_NAN = 0x7FFF_FFFF
_LEAST_POWER = 2.0**-126  # stands for that of zero where it divides


def exact_matmul(a_codes: Tensor, a_block_scales: Tensor, b_codes: Tensor, b_block_scales: Tensor) -> Tensor:
    """a @ b.T as Blackwell's FP4 tensor core sums it, without the global scales.

    Args:
        a_codes: (T, K/2) uint8; a_block_scales: (T, K/16) float8_e4m3fn, linear order. K a multiple of 16.
        b_codes: (N, K/2) uint8; b_block_scales: (N, K/16) float8_e4m3fn; on the device of a.

    Returns:
        (T, N) fp32 sums; global scales multiply them afterwards, in fp32.

    Raises:
        LayoutError: shapes that do not go together.

    Numerics: see the module docstring; the same bits on every device and by either form.
    Cost: on a CPU with the native library 1.75 bytes of scratch per value of a, of at most CHUNK tokens; else the
        temporaries of a tile (TILE_SUMS) and some 25 operations on it for each 64 of K, without a sync.
    Source: microsoft/MMA-Sim.
    """
    for name, codes, block_scales in (("a", a_codes, a_block_scales), ("b", b_codes, b_block_scales)):
        shape = (codes.shape[0], codes.shape[-1] * 2 // BLOCK_SIZE)
        if codes.ndim != 2 or codes.shape[1] % (BLOCK_SIZE // 2) or block_scales.shape != shape:
            got = f"codes {tuple(codes.shape)}, block scales {tuple(block_scales.shape)}"
            raise LayoutError(
                name, "must be codes (rows, K/2) and block scales (rows, K/16)", got, "pass linear scales"
            )
    if a_codes.shape[1] != b_codes.shape[1]:
        got = f"{2 * a_codes.shape[1]} and {2 * b_codes.shape[1]}"
        raise LayoutError("a and b", "must have one K", got, "transpose one of them")
    operands = (a_codes, a_block_scales.view(torch.uint8), b_codes, b_block_scales.view(torch.uint8))
    if a_codes.is_cpu and native.load()[0] is not None:
        return native_matmul(*operands)
    return torch_matmul(*operands)


def form(device: torch.device) -> str:
    """What computes it on a device, in words: both forms give the same bits, at very different speed."""
    if device.type != "cpu":
        return "in torch"
    loaded, reason = native.load()
    return f"in torch, slowly: the native library {reason}" if loaded is None else f"native, {native.tier().name}"


def native_matmul(a_codes: Tensor, a_scales: Tensor, b_codes: Tensor, b_scales: Tensor) -> Tensor:
    """`exact_matmul` by the native library, on bytes of the CPU's memory."""
    loaded, reason = native.load()
    assert loaded is not None, reason
    a_codes, a_scales, b_codes, b_scales = (t.contiguous() for t in (a_codes, a_scales, b_codes, b_scales))
    (tokens, half), rows = a_codes.shape, b_codes.shape[0]
    out = torch.empty(tokens, rows)
    entered = torch.empty(loaded.exact_entered_bytes(min(CHUNK, tokens), 2 * half), dtype=torch.uint8)
    for first in range(0, tokens, CHUNK):
        chunk = slice(first, min(first + CHUNK, tokens))
        loaded.exact(
            byref(
                native.Exact(
                    a_codes=a_codes[chunk].data_ptr(),
                    a_scales=a_scales[chunk].data_ptr(),
                    b_codes=b_codes.data_ptr(),
                    b_scales=b_scales.data_ptr(),
                    out=out[chunk].data_ptr(),
                    entered=entered.data_ptr(),
                    tokens=chunk.stop - chunk.start,
                    rows=rows,
                    columns=2 * half,
                    threads=cpu_threads(),
                    tier=native.tier().index,
                )
            )
        )
    return out


def torch_matmul(a_codes: Tensor, a_scales: Tensor, b_codes: Tensor, b_scales: Tensor) -> Tensor:
    """`exact_matmul` in torch, on bytes on any device that has fp64, a tile of sums at a time."""
    (tokens, half), rows = a_codes.shape, b_codes.shape[0]
    out = torch.empty(tokens, rows, device=a_codes.device)
    most = max(1, TILE_VALUES // (2 * half))
    height = min(tokens, most, 512)
    width = min(rows, most, max(1, TILE_SUMS // max(height, 1)))
    for top in range(0, tokens, height or 1):
        high = slice(top, top + height)
        a = _groups(a_codes[high], a_scales[high])
        for left in range(0, rows, width or 1):
            wide = slice(left, left + width)
            out[high, wide] = _tile(*a, *_groups(b_codes[wide], b_scales[wide]))
    return out


def _groups(codes: Tensor, scale_bytes: Tensor) -> tuple[Tensor, Tensor]:
    """Values (steps, groups, rows, 16) and powers of their scales (steps, groups, rows), fp32; K padded to steps."""
    missing = -scale_bytes.shape[1] % GROUPS
    scales = pad(scale_bytes & 0x7F, (0, missing)).view(torch.float8_e4m3fn)
    values = decode_blocks(pad(codes, (0, missing * BLOCK_SIZE // 2)), scales, torch.float32)
    rows, blocks = scales.shape
    steps = blocks // GROUPS
    powers = _power(scales.float())
    return (
        values.view(rows, steps, GROUPS, BLOCK_SIZE).permute(1, 2, 0, 3),
        powers.view(rows, steps, GROUPS).permute(1, 2, 0),
    )


def _tile(a: Tensor, a_power: Tensor, b: Tensor, b_power: Tensor) -> Tensor:
    """Sums (rows of a, rows of b) fp32 of groups as `_groups` makes them."""
    sums = torch.zeros(a.shape[2], b.shape[2], device=a.device)
    for step in range(a.shape[0]):
        # 20 bits in any order of the sum: 16 * 12 * 12 quarters times two significands of 4 bits.
        terms = a[step] @ b[step].transpose(1, 2)
        powers = a_power[step][:, :, None] * b_power[step][:, None, :]
        largest = torch.maximum(powers.amax(0), _power(sums)).clamp(min=_LEAST_POWER)
        grid = largest.double() * 2.0**-FRACTION_BITS
        total = (terms / grid).trunc().sum(0) + (sums / grid).trunc()
        sums = _cut_to_fp32(total * grid + 0.0)  # + 0.0: no result is -0
    nan = torch.tensor(_NAN, dtype=torch.int32, device=a.device).view(torch.float32)
    return torch.where(sums.isnan(), nan, sums)


def _power(values: Tensor) -> Tensor:
    """The power of two at or below normal fp32 values: the exponent field alone; zero gives zero, NaN infinity."""
    return (values.view(torch.int32) & _EXPONENT_FIELD).view(torch.float32)


def _cut_to_fp32(values: Tensor) -> Tensor:
    """fp64 in the normal range of fp32, toward zero: bits that fp32 lacks are cleared, so the cast is exact."""
    return (values.view(torch.int64) & ~((1 << 29) - 1)).view(torch.float64).float()
