# SPDX-License-Identifier: Apache-2.0
"""Weights as tensor-core fragments: a lane's 16-byte load is its operand for four k16 steps of mma or wgmma.

A matrix (N, K) is cut into tiles of 16 rows and chunks of 64 columns (K padded with zeros). A chunk of a tile is 576
bytes, 512 of codes and then 64 of scales; the chunks of a tile follow each other, and the tiles:

    offset(tile, chunk) = (tile * ceil(K / 64) + chunk) * 576
    codes  : lane l = 4 g + c owns bytes 16 l .. 16 l + 15, four 32-bit words j = 0..3; word j holds 8 codes,
             rows g (h = 0) and g + 8 (h = 1), columns 16 j + 2 c + (0, 1, 8, 9)[i], i = 0..3
    scales : byte 8 g + 4 h + j is the scale of row g + 8 h, block j of the chunk

so that word j is what m16n8k16 and m64nNk16 want of a lane for columns 16 j .. 16 j + 15, in the order of memory.
Within a word, code (h, i) is half i % 2 of register q = 2 (i // 2) + h of the mma; its sign goes to bit SIGN_BIT[q] of
that half, its exponent to bits EXPONENT_BIT[q] and the next, its mantissa to MANTISSA_BIT[q]. bf16 wants them at 15,
8..7 and 6, where they read as e2m1 * 2^-126:

    register q      0           1           2           3
    sign            15          12 (<<3)    14 (<<1)    13 (<<2)
    exponent        8..7        5..4 (<<3)  2..1 (<<6)  11..10 (>>3)
    mantissa        6           3 (<<3)     0 (<<6)     9 (>>3)

A scale byte is the upper byte of fp16(scale * 2^7) without its sign, exact for every e4m3 scale. Moved by 4 bits and
raised by 224 exponents it is bf16(scale * 2^119), NaN included; zero is not, so the codes under a zero scale are stored
with magnitude zero. Bytes: 0.5625 per weight (with K padded to 64).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import LayoutError
from ..formats.codes import BLOCK_SIZE, pack_codes, unpack_codes

ROWS, COLUMNS = 16, 64
CHUNK_BYTES = ROWS * COLUMNS // 2 + ROWS * COLUMNS // BLOCK_SIZE
SIGN_BIT = (15, 12, 14, 13)
EXPONENT_BIT = (7, 4, 1, 10)
MANTISSA_BIT = (6, 3, 0, 9)
_SCALE_SHIFT = 2.0**7


def fragment_bytes(rows: int, columns: int) -> int:
    """Size of the packed form of a (rows, columns) matrix."""
    return rows // ROWS * -(-columns // COLUMNS) * CHUNK_BYTES


def pack_fragments(codes: Tensor, block_scales: Tensor) -> Tensor:
    """Pack (N, K/2) codes and (N, K/16) block scales into the byte order above.

    Args:
        codes: (N, K/2) uint8; N a multiple of 16.
        block_scales: (N, K/16) float8_e4m3fn, not negative.

    Returns:
        uint8, flat, `fragment_bytes(N, K)` long.

    Raises:
        LayoutError: N not a multiple of 16, or a negative scale.

    Cost: temporaries of 8 bytes per weight.
    """
    rows, half = codes.shape
    if rows % ROWS:
        raise LayoutError("codes", f"rows must be a multiple of {ROWS}", tuple(codes.shape), "pad with zero rows")
    if (block_scales.view(torch.uint8) & 0x80).any():
        raise LayoutError("block_scales", "must not be negative", "a set sign bit", "quantise the weight again")
    pad = -(2 * half) % COLUMNS
    under_zero = (block_scales.float() == 0).repeat_interleave(BLOCK_SIZE, dim=-1)
    nibbles = unpack_codes(codes)
    nibbles = torch.nn.functional.pad(torch.where(under_zero, nibbles & 8, nibbles), (0, pad)).int()
    bits = (block_scales.float() * _SCALE_SHIFT).half().view(torch.int16) >> 7
    scales = torch.nn.functional.pad(bits.to(torch.uint8), (0, pad // BLOCK_SIZE))
    tiles, chunks = rows // ROWS, nibbles.shape[1] // COLUMNS
    # (tile, h, g, chunk, j, i // 2, c, i % 2) -> (tile, chunk, g, c, j, i // 2, h, i % 2): register q is (i // 2, h)
    nibbles = nibbles.view(tiles, 2, 8, chunks, 4, 2, 4, 2).permute(0, 3, 2, 6, 4, 5, 1, 7)
    sign, exponent, mantissa = _bit_places(nibbles.device)
    places = (nibbles >> 3 << sign) | ((nibbles >> 1 & 3) << exponent) | ((nibbles & 1) << mantissa)
    words = places.sum(dim=(-3, -2))
    halves = words.to(torch.int16).contiguous().view(torch.uint8).view(tiles, chunks, ROWS * COLUMNS // 2)
    # (tile, h, g, chunk, j) -> (tile, chunk, g, h, j)
    scales = scales.view(tiles, 2, 8, chunks, 4).permute(0, 3, 2, 1, 4).reshape(tiles, chunks, -1)
    return torch.cat((halves, scales), dim=2).flatten()


def unpack_fragments(packed: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Codes (rows, columns/2) and block scales (rows, columns/16) from what `pack_fragments` made; its inverse,
    but for the magnitude of codes under a zero scale, whose value is zero either way.

    Raises:
        LayoutError: the size is not `fragment_bytes(rows, columns)`.
    """
    if packed.numel() != fragment_bytes(rows, columns):
        expected = f"must be {fragment_bytes(rows, columns)} bytes for ({rows}, {columns})"
        raise LayoutError("packed", expected, packed.numel(), "pass the shape it was packed with")
    tiles, chunks = rows // ROWS, -(-columns // COLUMNS)
    code_bytes = ROWS * COLUMNS // 2
    parts = packed.view(tiles, chunks, CHUNK_BYTES)
    halves = parts[:, :, :code_bytes].contiguous().view(torch.int16).int().view(tiles, chunks, 8, 4, 4, 1, 1, 2)
    sign, exponent, mantissa = _bit_places(packed.device)
    nibbles = (halves >> sign & 1) << 3 | (halves >> exponent & 3) << 1 | (halves >> mantissa & 1)
    nibbles = nibbles.permute(0, 6, 2, 1, 4, 5, 3, 7).reshape(rows, -1)[:, :columns]
    bits = parts[:, :, code_bytes:].reshape(tiles, chunks, 8, 2, 4).permute(0, 3, 2, 1, 4).reshape(rows, -1)
    scales = (bits[:, : columns // BLOCK_SIZE].to(torch.int16) << 7).view(torch.float16).float() / _SCALE_SHIFT
    return pack_codes(nibbles.to(torch.uint8)), scales.to(torch.float8_e4m3fn)


def _bit_places(device: torch.device) -> Tensor:
    """Sign, exponent and mantissa bit of each register, shaped to broadcast over (i // 2, h, i % 2)."""
    places = (SIGN_BIT, EXPONENT_BIT, MANTISSA_BIT)
    return torch.tensor(places, dtype=torch.int32, device=device).view(3, 2, 2, 1)
