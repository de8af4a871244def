# SPDX-License-Identifier: Apache-2.0
"""Weights for FP8 tensor cores: a lane's 16-byte load picks its operands for two k32 steps of wgmma from small tables.

e2m1 times a scale has eight magnitudes, so a block of 16 needs eight roundings to e4m3, and then every code is a choice
of one byte of eight: what the instruction prmt does with three bits of a nibble, four choices at a time.

A matrix (N, K) is cut into tiles of 16 rows and chunks of 64 columns (K padded with zeros), as in fragments.py and in
the same 576 bytes a chunk; within a chunk

    codes  : lane l = 4 g + c owns bytes 16 l .. 16 l + 15, four 32-bit words: columns 0..7 and 8..15 of block c of
             row g, then of row g + 8. In a word, code q = 0..7 has its magnitude at bits 4 q .. 4 q + 2 and its sign at
             bit 8 (q % 4) + 7 - 4 (q // 4): that of byte q % 4 of a register, for the second four after a shift by 4
    scales : byte 512 + 2 l + h is the scale of row g + 8 h, block c

A lane's block is then its k = 4 c .. 4 c + 3 and 16 + 4 c .. 16 + 4 c + 3 of two steps, if activations have each 64
columns in the same order: taken as a 4 x 4 matrix of words of four bytes, transposed.

A scale byte is bits 14..7 of fp16(scale * 2^7), exact for every e4m3 scale; the codes under a zero scale are stored
with magnitude zero, as in fragments.py. Bytes: 0.5625 per weight (with K padded to 64).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats.codes import pack_codes
from .fragments import CHUNK_BYTES, COLUMNS, ROWS, check_fragments, scale_bytes, scales_of_bytes, stored_nibbles

_WORD, _CODE_BYTES = 8, ROWS * COLUMNS // 2  # codes of a word; of a chunk
_MAGNITUDE_AT = [4 * q for q in range(_WORD)]
_SIGN_AT = [8 * (q % 4) + 7 - 4 * (q // 4) for q in range(_WORD)]


def pack_e4m3_fragments(codes: Tensor, block_scales: Tensor) -> Tensor:
    """Pack (N, K/2) codes and (N, K/16) block scales into the byte order above.

    Args:
        codes: (N, K/2) uint8; N a multiple of 16.
        block_scales: (N, K/16) float8_e4m3fn, not negative.

    Returns:
        uint8, flat, `fragments.fragment_bytes(N, K)` long.

    Raises:
        LayoutError: N not a multiple of 16, or a negative scale.

    Cost: temporaries of 8 bytes per weight.
    """
    nibbles, scales = stored_nibbles(codes, block_scales), scale_bytes(block_scales)
    tiles, chunks = len(nibbles) // ROWS, nibbles.shape[1] // COLUMNS
    # (tile, h, g, chunk, c, word, q) -> (tile, chunk, g, c, h, word, q)
    nibbles = nibbles.view(tiles, 2, 8, chunks, 4, 2, _WORD).permute(0, 3, 2, 4, 1, 5, 6)
    words = torch.zeros(nibbles.shape[:-1], dtype=torch.int32, device=codes.device)
    for q in range(_WORD):
        words |= (nibbles[..., q] & 7) << _MAGNITUDE_AT[q] | (nibbles[..., q] >> 3) << _SIGN_AT[q]
    parts = words.reshape(tiles, chunks, -1).view(torch.uint8)
    # (tile, h, g, chunk, c) -> (tile, chunk, g, c, h)
    scales = scales.view(tiles, 2, 8, chunks, 4).permute(0, 3, 2, 4, 1).reshape(tiles, chunks, -1)
    return torch.cat((parts, scales), dim=2).flatten()


def unpack_e4m3_fragments(packed: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Codes (rows, columns/2) and block scales (rows, columns/16) from what `pack_e4m3_fragments` made; its inverse,
    but for the magnitude of codes under a zero scale, whose value is zero either way.

    Raises:
        LayoutError: the size is not `fragments.fragment_bytes(rows, columns)`.
    """
    check_fragments(packed, rows, columns)
    tiles, chunks = rows // ROWS, -(-columns // COLUMNS)
    parts = packed.view(tiles, chunks, CHUNK_BYTES)
    words = parts[:, :, :_CODE_BYTES].contiguous().view(torch.int32).view(tiles, chunks, 8, 4, 2, 2)
    each = [words >> _MAGNITUDE_AT[q] & 7 | (words >> _SIGN_AT[q] & 1) << 3 for q in range(_WORD)]
    nibbles = torch.stack(each, dim=-1).permute(0, 4, 2, 1, 3, 5, 6).reshape(rows, -1)[:, :columns]
    scales = parts[:, :, _CODE_BYTES:].reshape(tiles, chunks, 8, 4, 2).permute(0, 4, 2, 1, 3).reshape(rows, -1)
    return pack_codes(nibbles.to(torch.uint8)), scales_of_bytes(scales, columns)
