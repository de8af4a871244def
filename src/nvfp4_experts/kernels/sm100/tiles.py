# SPDX-License-Identifier: Apache-2.0
"""Device functions that find a tile's group and move tiles of codes and of swizzled block scales.

Rows of activations are sorted by group: group e has rows offsets[e] .. offsets[e + 1]. Codes lie row after row; block
scales lie in the 128x4 order of layouts/scales.py, each group padded to 128 rows by itself.
"""

from __future__ import annotations

import triton
import triton.language as tl

SCALE_ROWS = tl.constexpr(128)


@triton.jit
def blocks_of(offsets, tokens, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """How many blocks of ROWS rows all groups have together; no block spans two groups. No offsets: one group."""
    if offsets is None:
        return tl.cdiv(tokens, ROWS)
    else:
        group = tl.arange(0, triton.next_power_of_2(GROUPS))
        begin = tl.load(offsets + group, mask=group < GROUPS, other=0)
        end = tl.load(offsets + group + 1, mask=group < GROUPS, other=0)
        return tl.sum((end - begin + ROWS - 1) // ROWS, axis=0)


@triton.jit
def find_group(block, offsets, tokens, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """Where the block-th block of ROWS rows lies.

    Returns its group, the group's first row and the row after its last, the block's number within the group, and the
    row at which the group begins where groups are padded to 128 rows.
    """
    if offsets is None:
        return 0, 0, tokens, block, 0
    else:
        index = tl.arange(0, triton.next_power_of_2(GROUPS))
        begin = tl.load(offsets + index, mask=index < GROUPS, other=0)
        end = tl.load(offsets + index + 1, mask=index < GROUPS, other=0)
        blocks = (end - begin + ROWS - 1) // ROWS
        up_to = tl.cumsum(blocks, axis=0)
        group = tl.sum(tl.where(up_to <= block, 1, 0), axis=0)
        here, before = index == group, index < group
        first = tl.sum(tl.where(before, blocks, 0), axis=0)
        padded = tl.sum(tl.where(before, (end - begin + SCALE_ROWS - 1) // SCALE_ROWS * SCALE_ROWS, 0), axis=0)
        begin = tl.sum(tl.where(here, begin, 0), axis=0)
        end = tl.sum(tl.where(here, end, 0), axis=0)
        return group, begin, end, block - first, padded


@triton.jit
def swizzled_offset(m, k, K: tl.constexpr):
    """Byte offset of scale (m, k) of a matrix of K columns (K/16 scales); layouts/scales.py has the formula."""
    column_tiles: tl.constexpr = (K + 63) // 64
    tile = (m // 128).to(tl.int64) * column_tiles + k // 4
    return tile * 512 + (m % 32) * 16 + (m % 128) // 32 * 4 + k % 4


@triton.jit
def load_codes(codes, rows, inside, step, COLUMNS: tl.constexpr, K: tl.constexpr):
    """(R, COLUMNS/2) bytes of codes (rows, K/2): those rows, the step-th run of columns; zeros outside."""
    bytes_ = step * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)
    inside = inside[:, None]
    if K % COLUMNS:
        inside = inside & (bytes_ < K // 2)[None, :]
    return tl.load(codes + rows.to(tl.int64)[:, None] * (K // 2) + bytes_[None, :], mask=inside, other=0)


@triton.jit
def load_scales(scales, rows, inside, step, COLUMNS: tl.constexpr, K: tl.constexpr):
    """(R, COLUMNS/16) block scales of a swizzled matrix, as `load_codes`."""
    k = step * (COLUMNS // 16) + tl.arange(0, COLUMNS // 16)
    inside = inside[:, None] & (k < (K + 63) // 64 * 4)[None, :]
    return tl.load(scales + swizzled_offset(rows[:, None], k[None, :], K), mask=inside, other=0)


@triton.jit
def load_scale_tiles(
    scales, row, rows_end, step, ROWS: tl.constexpr, COLUMNS: tl.constexpr, K: tl.constexpr, NATIVE: tl.constexpr
):
    """ROWS x COLUMNS/16 block scales, ROWS and `row` multiples of 128: whole tiles, read as they lie; zeros beyond.

    `rows_end`: how many rows the matrix has, without its padding. NATIVE: as e4m3, what the tensor core takes; bytes
    that are cast in registers would not be copied to its memory as they lie.
    """
    column_tiles: tl.constexpr = (K + 63) // 64
    row_tiles: tl.constexpr = ROWS // 128
    steps: tl.constexpr = COLUMNS // 64
    if NATIVE:
        scales = scales.to(tl.pointer_type(tl.float8e4nv), bitcast=True)
    m = row // 128 + tl.arange(0, row_tiles)
    within = tl.arange(0, steps * 512)
    k = step * steps + within // 512
    inside = (m * 128 < rows_end)[:, None]
    if column_tiles % steps:
        inside = inside & (k < column_tiles)[None, :]
    place = (m.to(tl.int64) * (column_tiles * 512))[:, None] + (step * (steps * 512) + within)[None, :]
    tiles = tl.load(scales + place, mask=inside, other=0.0 if NATIVE else 0).reshape(row_tiles, steps, 32, 4, 4)
    return tiles.trans(0, 3, 2, 1, 4).reshape(ROWS, COLUMNS // 16)


@triton.jit
def store_scales(scales, tile_scales, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr, K: tl.constexpr):
    """Write (ROWS, COLUMNS/16) block scales into a swizzled matrix, from a row and a column on."""
    k = column // 16 + tl.arange(0, COLUMNS // 16)
    place = swizzled_offset((row + tl.arange(0, ROWS))[:, None], k[None, :], K)
    tl.store(scales + place, tile_scales, mask=(k < (K + 63) // 64 * 4)[None, :])


@triton.jit
def store_quantized(
    codes,
    scales,
    tile_codes,
    tile_scales,
    begin,
    end,
    row,
    padded,
    column,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    K: tl.constexpr,
):
    """Write a tile of codes and block scales of one group; scales of rows and columns beyond the matrix are zero.

    begin, end: the group's rows; row: of the tile within the group; padded: as from `find_group`; column: its first.
    """
    rows = begin + row + tl.arange(0, ROWS)
    bytes_ = column // 2 + tl.arange(0, COLUMNS // 2)
    inside = (rows < end)[:, None] & (bytes_ < K // 2)[None, :]
    tl.store(codes + rows.to(tl.int64)[:, None] * (K // 2) + bytes_[None, :], tile_codes, mask=inside)
    k = column // 16 + tl.arange(0, COLUMNS // 16)
    inside = (rows < end)[:, None] & (k < K // 16)[None, :]
    store_scales(scales, tl.where(inside, tile_scales, 0), padded + row, column, ROWS, COLUMNS, K)
