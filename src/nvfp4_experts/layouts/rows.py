# SPDX-License-Identifier: Apache-2.0
"""Weights as vector lanes: lane r of a vector register is output row r, for every width of register.

A matrix (N, K) is cut into tiles of 16 rows. A tile is its codes, block after block of 16 columns, and then its scales:

    tile(n)     = (n // 16) * K * 9
    code(n, k)  : byte tile + 128 (k // 16) + 64 (k % 16 // 8) + 4 (n % 16) + k % 4, high nibble if k % 8 >= 4
    scale(n, k) : byte tile + 8 K + k // 16 * 16 + n % 16, the e4m3 byte itself

so 4 V bytes at 128 b + 64 j + 4 r are V lanes: rows r .. r + V - 1, four columns 16 b + 8 j + 0..3 in the low nibbles
and four columns 16 b + 8 j + 4..7 in the high ones. One mask and one shift give a 32-bit lane four codes in a row of K,
which is what an int8 dot-product instruction takes, whatever its width: 16 lanes (AVX-512), 8 (AVX2) or 4 (NEON).
Bytes: 0.5625 per weight, none of them padding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import LayoutError
from ..formats.codes import BLOCK_SIZE, pack_codes, unpack_codes

ROWS = 16


def row_tile_bytes(rows: int, columns: int) -> int:
    """Size of the packed form of a (rows, columns) matrix."""
    return rows * columns // 2 + rows * columns // BLOCK_SIZE


def pack_rows(codes: Tensor, block_scales: Tensor) -> Tensor:
    """Pack (N, K/2) codes and (N, K/16) block scales into the byte order above.

    Args:
        codes: (N, K/2) uint8; N a multiple of 16.
        block_scales: (N, K/16) float8_e4m3fn.

    Returns:
        uint8, flat, `row_tile_bytes(N, K)` long.

    Raises:
        LayoutError: N not a multiple of 16.

    Cost: temporaries of 3 bytes per weight.
    """
    rows, half = codes.shape
    if rows % ROWS:
        raise LayoutError("codes", f"rows must be a multiple of {ROWS}", tuple(codes.shape), "pad with zero rows")
    tiles, blocks = rows // ROWS, 2 * half // BLOCK_SIZE
    # (tile, lane, block, j, high, i) -> (tile, block, j, lane, i, high); a byte is its last dimension
    nibbles = unpack_codes(codes).view(tiles, ROWS, blocks, 2, 2, 4).permute(0, 2, 3, 1, 5, 4)
    code_bytes = pack_codes(nibbles.reshape(tiles, -1))
    scale_bytes = block_scales.view(torch.uint8).view(tiles, ROWS, blocks).permute(0, 2, 1).reshape(tiles, -1)
    return torch.cat((code_bytes, scale_bytes), dim=1).flatten()


def unpack_rows(packed: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Codes (rows, columns/2) and block scales (rows, columns/16) from what `pack_rows` made; its inverse.

    Raises:
        LayoutError: the size is not `row_tile_bytes(rows, columns)`.
    """
    if packed.numel() != row_tile_bytes(rows, columns):
        expected = f"must be {row_tile_bytes(rows, columns)} bytes for ({rows}, {columns})"
        raise LayoutError("packed", expected, packed.numel(), "pass the shape it was packed with")
    tiles, blocks = rows // ROWS, columns // BLOCK_SIZE
    parts = packed.view(tiles, -1)
    code_bytes, scale_bytes = parts.split((ROWS * columns // 2, ROWS * blocks), dim=1)
    nibbles = unpack_codes(code_bytes).view(tiles, blocks, 2, ROWS, 4, 2).permute(0, 3, 1, 2, 5, 4)
    scales = scale_bytes.reshape(tiles, blocks, ROWS).permute(0, 2, 1).reshape(rows, blocks)
    return pack_codes(nibbles.reshape(rows, columns)), scales.contiguous().view(torch.float8_e4m3fn)
