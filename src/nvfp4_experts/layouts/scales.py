# SPDX-License-Identifier: Apache-2.0
"""Block scales: linear (M, Ks), Ks = K/16, to and from the 128x4 swizzled order of cuBLAS and CUTLASS.

A tile of 128 rows and 4 columns is 512 consecutive bytes; tiles follow each other along k, then along m:

    offset(m, k) = ((m // 128) * ceil(Ks / 4) + k // 4) * 512 + (m % 32) * 16 + (m % 128) // 32 * 4 + k % 4

So 16 consecutive bytes hold rows m, m + 32, m + 64, m + 96 of one tile, four scales each. Rows are padded to a
multiple of 128 and columns to a multiple of 4 with zero bytes; each expert of a batch is padded by itself.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..errors import LayoutError

TILE_ROWS, TILE_COLUMNS = 128, 4
_GROUPS, _LANES = 4, 32  # the 128 rows of a tile are 4 groups of 32


def swizzled_shape(rows: int, columns: int) -> tuple[int, int]:
    """Padded shape (ceil(rows / 128) * 128, ceil(columns / 4) * 4); its product is the size in bytes."""
    return -(-rows // TILE_ROWS) * TILE_ROWS, -(-columns // TILE_COLUMNS) * TILE_COLUMNS


def swizzled_offset(m: int, k: int, columns: int) -> int:
    """Byte offset of scale (m, k) in swizzled order, for `columns` = Ks unpadded; the formula of this module."""
    tile = (m // TILE_ROWS) * -(-columns // TILE_COLUMNS) + k // TILE_COLUMNS
    return tile * 512 + (m % 32) * 16 + (m % TILE_ROWS) // 32 * 4 + k % TILE_COLUMNS


def swizzle_scales(scales: Tensor) -> Tensor:
    """Reorder linear block scales into 128x4 tiles, padded with zero bytes.

    Args:
        scales: (M, Ks) or (E, M, Ks), float8_e4m3fn or uint8, any strides; M may be 0.

    Returns:
        New contiguous tensor of that dtype, shape `swizzled_shape(M, Ks)`, with E in front where given. The shape
        says how many bytes there are; their order is flat, by `swizzled_offset`.

    Raises:
        LayoutError: another number of dimensions, or elements that are not one byte.

    Cost: one read and two writes of the scales, no sync.
    Source: cuBLAS documentation, "1D block scaling factors layout"; equal to torchao's `to_blocked`.
    """
    _check("scales", scales)
    rows, columns = scales.shape[-2:]
    padded_rows, padded_columns = swizzled_shape(rows, columns)
    padded = pad(scales.view(torch.uint8), (0, padded_columns - columns, 0, padded_rows - rows))
    tiles = padded.view(
        *scales.shape[:-2], padded_rows // TILE_ROWS, _GROUPS, _LANES, padded_columns // TILE_COLUMNS, TILE_COLUMNS
    )
    return tiles.transpose(-4, -2).contiguous().view(padded.shape).view(scales.dtype)


def unswizzle_scales(swizzled: Tensor, rows: int, columns: int) -> Tensor:
    """Reorder swizzled block scales back to linear and cut the padding; the inverse of `swizzle_scales`.

    Args:
        swizzled: `swizzled_shape(rows, columns)`, with E in front for a batch; float8_e4m3fn or uint8.
        rows, columns: M and Ks without padding.

    Returns:
        New contiguous tensor (M, Ks) or (E, M, Ks) of that dtype. Padding bytes are not looked at.

    Raises:
        LayoutError: a shape that is not the padded shape of (rows, columns), or elements that are not one byte.
    """
    _check("swizzled", swizzled)
    expected = swizzled_shape(rows, columns)
    if tuple(swizzled.shape[-2:]) != expected:
        raise LayoutError(
            "swizzled", f"expected {expected} for {rows} rows and {columns} columns", tuple(swizzled.shape),
            "reshape a flat buffer to that shape; linear scales need no unswizzling",
        )  # fmt: skip
    tiles = swizzled.contiguous().view(torch.uint8).view(
        *swizzled.shape[:-2], expected[0] // TILE_ROWS, expected[1] // TILE_COLUMNS, _LANES, _GROUPS, TILE_COLUMNS
    )  # fmt: skip
    linear = tiles.transpose(-4, -2).reshape(swizzled.shape)
    return linear[..., :rows, :columns].contiguous().view(swizzled.dtype)


def _check(name: str, scales: Tensor) -> None:
    if scales.ndim not in (2, 3):
        raise LayoutError(name, "must be (M, Ks) or (E, M, Ks)", tuple(scales.shape), "reshape it")
    if scales.dtype not in (torch.float8_e4m3fn, torch.uint8):
        raise LayoutError(
            name, "must be float8_e4m3fn or uint8", scales.dtype, "convert the scales to e4m3 bytes first"
        )
