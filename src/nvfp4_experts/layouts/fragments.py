# SPDX-License-Identifier: Apache-2.0
"""Weights as tensor-core fragments: a lane's 16-byte load is its operand for four k16 steps of mma or wgmma.

A matrix (N, K) is cut into tiles of 16 rows and chunks of 64 columns (K padded with zeros). A chunk of a tile is 576
bytes, 512 of codes and then 64 of scales; the chunks of a tile follow each other, and the tiles:

    offset(tile, chunk) = (tile * ceil(K / 64) + chunk) * 576
    codes  : lane l = 4 g + c owns bytes 16 l .. 16 l + 15, four 32-bit words; words 2 m, 2 m + 1 hold 16 codes, the
             registers i = 0..7 that mma.m16n8k16 and wgmma.m64nNk16 want of a lane for columns 32 m .. 32 m + 31:
             two codes e = 0, 1 each, row g + 8 (i % 2), columns 32 m + 16 (i // 4) + 8 (i // 2 % 2) + 2 c + e
    scales : byte 8 g + 4 h + j is the scale of row g + 8 h, block j of the chunk

A register is a pair of bf16 halves, and reads as e2m1 * 2^-126 with a code's sign at bit 15 of its half and its
exponent and mantissa at bits 8..6. All 64 bits of the two words are codes, so that register i is a rotation and a mask:

    register i = (word rotated left by 2 i) & 0x81C081C0            word: (first, second, mixed)[i % 3]
    mixed      = (first & 0x60306030) | (second & ~0x60306030)

for the sets of bits {15, 8, 7, 6} - 2 i, modulo 16, cover each word without overlap: the first has i = 0, 3, 6, the
second i = 1, 4, 7, and what is left of the two is i = 2, 5.

A scale byte is the upper byte of fp16(scale * 2^7) without its sign, exact for every e4m3 scale. Moved by 4 bits and
raised by 224 exponents it is bf16(scale * 2^119), NaN included; zero is not, so the codes under a zero scale are stored
with magnitude zero. Bytes: 0.5625 per weight (with K padded to 64).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..errors import LayoutError
from ..formats.codes import BLOCK_SIZE, pack_codes, unpack_codes

ROWS, COLUMNS = 16, 64
CHUNK_BYTES = ROWS * COLUMNS // 2 + ROWS * COLUMNS // BLOCK_SIZE
REGISTERS = 8  # of two words
FROM_FIRST = 0x60306030  # bits of a mixed word that are the first one's
_CODE_BITS = 15, 8, 7, 6  # of the low half of a register: sign, exponent, mantissa
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
    nibbles, scales = stored_nibbles(codes, block_scales), scale_bytes(block_scales)
    tiles, chunks = len(nibbles) // ROWS, nibbles.shape[1] // COLUMNS
    # (tile, h, g, chunk, m, i // 2, c, e) -> (tile, chunk, g, c, m, i // 2, h, e): register i is (i // 2, h)
    nibbles = nibbles.view(tiles, 2, 8, chunks, 2, 4, 4, 2).permute(0, 3, 2, 6, 4, 5, 1, 7)
    nibbles = nibbles.reshape(tiles, chunks, ROWS * 2, 2, 2 * REGISTERS)
    words = torch.zeros(*nibbles.shape[:-1], 2, dtype=torch.int32, device=nibbles.device)
    for code, word, places in _code_places():
        for bit, place in enumerate(places):
            words[..., word[bit]] |= (nibbles[..., code] >> 3 - bit & 1) << place
    halves = words.view(torch.uint8).view(tiles, chunks, ROWS * COLUMNS // 2)
    # (tile, h, g, chunk, j) -> (tile, chunk, g, h, j)
    scales = scales.view(tiles, 2, 8, chunks, 4).permute(0, 3, 2, 1, 4).reshape(tiles, chunks, -1)
    return torch.cat((halves, scales), dim=2).flatten()


def unpack_fragments(packed: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Codes (rows, columns/2) and block scales (rows, columns/16) from what `pack_fragments` made; its inverse,
    but for the magnitude of codes under a zero scale, whose value is zero either way.

    Raises:
        LayoutError: the size is not `fragment_bytes(rows, columns)`.
    """
    check_fragments(packed, rows, columns)
    tiles, chunks = rows // ROWS, -(-columns // COLUMNS)
    code_bytes = ROWS * COLUMNS // 2
    parts = packed.view(tiles, chunks, CHUNK_BYTES)
    words = parts[:, :, :code_bytes].contiguous().view(torch.int32).view(tiles, chunks, ROWS * 2, 2, 2)
    nibbles = torch.zeros(*words.shape[:-1], 2 * REGISTERS, dtype=torch.int32, device=packed.device)
    for code, word, places in _code_places():
        for bit, place in enumerate(places):
            nibbles[..., code] |= (words[..., word[bit]] >> place & 1) << 3 - bit
    nibbles = (
        nibbles.view(tiles, chunks, 8, 4, 2, 4, 2, 2).permute(0, 6, 2, 1, 4, 5, 3, 7).reshape(rows, -1)[:, :columns]
    )
    scales = parts[:, :, code_bytes:].reshape(tiles, chunks, 8, 2, 4).permute(0, 3, 2, 1, 4).reshape(rows, -1)
    return pack_codes(nibbles.to(torch.uint8)), scales_of_bytes(scales, columns)


def stored_nibbles(codes: Tensor, block_scales: Tensor) -> Tensor:
    """Codes (N, K/2) as (N, K) int32, K padded with zeros to 64, those under a zero scale with magnitude zero.

    Raises:
        LayoutError: N not a multiple of 16, or a negative scale.
    """
    if len(codes) % ROWS:
        raise LayoutError("codes", f"rows must be a multiple of {ROWS}", tuple(codes.shape), "pad with zero rows")
    if (block_scales.view(torch.uint8) & 0x80).any():
        raise LayoutError("block_scales", "must not be negative", "a set sign bit", "quantise the weight again")
    under_zero = (block_scales.float() == 0).repeat_interleave(BLOCK_SIZE, dim=-1)
    nibbles = unpack_codes(codes)
    nibbles = torch.where(under_zero, nibbles & 8, nibbles)
    return torch.nn.functional.pad(nibbles, (0, -nibbles.shape[1] % COLUMNS)).int()


def scale_bytes(block_scales: Tensor) -> Tensor:
    """Block scales (N, K/16) as their bytes, uint8, K padded with zeros to 64."""
    bits = (block_scales.float() * _SCALE_SHIFT).half().view(torch.int16) >> 7
    return torch.nn.functional.pad(bits.to(torch.uint8), (0, -bits.shape[1] % (COLUMNS // BLOCK_SIZE)))


def scales_of_bytes(scales: Tensor, columns: int) -> Tensor:
    """Block scales (N, columns/16) of their bytes; the inverse of `scale_bytes`."""
    bits = scales[:, : columns // BLOCK_SIZE].to(torch.int16) << 7
    return (bits.view(torch.float16).float() / _SCALE_SHIFT).to(torch.float8_e4m3fn)


def check_fragments(packed: Tensor, rows: int, columns: int) -> None:
    """LayoutError unless the size is that of a packed (rows, columns) matrix."""
    if packed.numel() != fragment_bytes(rows, columns):
        expected = f"must be {fragment_bytes(rows, columns)} bytes for ({rows}, {columns})"
        raise LayoutError("packed", expected, packed.numel(), "pass the shape it was packed with")


def _code_places() -> Iterator[tuple[int, list[int], list[int]]]:
    """Code 2 i + e of two words, and for each of its bits, sign first, which word it is in and where."""
    for i in range(REGISTERS):
        for e in range(2):
            places = [(bit + 16 * e - 2 * i) % 32 for bit in _CODE_BITS]
            mixed = [0 if FROM_FIRST >> place & 1 else 1 for place in places]
            yield 2 * i + e, ([0] * 4, [1] * 4, mixed)[i % 3], places
