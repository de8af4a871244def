# SPDX-License-Identifier: Apache-2.0
"""Kernels that bring hidden states into NVFP4: codes, and block scales in the swizzled, zero-padded layout.

    amax_partials   dynamic alone: the largest |x| of each of PARTIALS runs of x
    enter           x to codes and block scales; also sets to zero the cells that the GEMMs after it count in

    MODE        the global scale                        `source`                       written to `amax`
    static      the calibrated one                      () or (E,) fp32                nothing
    dynamic     from the amax of everything, or of a    (PARTIALS,) bits of maxima,    (1,) bits
                group where PER_GROUP                   or (E,) bits
    per_token   from the amax of each row, read twice   nothing                        (T,) bits

Nothing here waits for another block, allocates or asks the host. A program takes ROWS rows, which divide the 128 of a
tile of scales, and STEPS runs of COLUMNS columns: all of them for per_token. Rows of padding get scale bytes of zero.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .numbers import magnitude_bits, quantize, scales_from_amax, scales_from_static
from .tiles import blocks_of, find_group, store_quantized, store_scales


@triton.jit(do_not_specialize=["size"])
def amax_partials(x, partials, size, BLOCK: tl.constexpr):
    """Bits of the largest |x| among every PARTIALS-th block of BLOCK elements, PARTIALS being the grid."""
    largest = tl.zeros((BLOCK,), tl.int32)
    for block in range(tl.program_id(0), tl.cdiv(size, BLOCK), tl.num_programs(0)):
        place = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        largest = tl.maximum(largest, magnitude_bits(tl.load(x + place, mask=place < size, other=0.0)))
    tl.store(partials + tl.program_id(0), tl.max(largest, axis=0))


@triton.jit(do_not_specialize=["cell_count", "tokens"])
def enter(
    x,
    gather,
    offsets,
    source,
    amax,
    codes,
    scales,
    cells,
    cell_count,
    tokens,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
    MODE: tl.constexpr,
    PER_GROUP: tl.constexpr,
    PARTIALS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Grid: (blocks of ROWS rows of all groups padded to 128, or more; runs of STEPS * COLUMNS columns).

    Row r of the result is row r of x, or row gather[r] where gather is given; tokens: rows of the result.
    """
    program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    if cells is not None:
        for first in range(program * 256, cell_count, tl.num_programs(0) * tl.num_programs(1) * 256):
            place = first + tl.arange(0, 256)
            tl.store(cells + place, tl.zeros((256,), tl.int32), mask=place < cell_count)
    block = tl.program_id(0) // (128 // ROWS)
    if block < blocks_of(offsets, tokens, 128, GROUPS):
        group, begin, end, in_group, padded = find_group(block, offsets, tokens, 128, GROUPS)
        row = in_group * 128 + tl.program_id(0) % (128 // ROWS) * ROWS
        first_step = tl.program_id(1) * STEPS
        if row >= end - begin:
            nothing = tl.zeros((ROWS, COLUMNS // 16), tl.uint8)
            for step in range(first_step, first_step + STEPS):
                store_scales(scales, nothing, padded + row, step * COLUMNS, ROWS, COLUMNS, K)
        else:
            rows = begin + row + tl.arange(0, ROWS)
            inside = rows < end
            from_rows = rows.to(tl.int64)
            if gather is not None:
                from_rows = tl.load(gather + rows, mask=inside, other=0).to(tl.int64)
            if MODE == "static":
                g, s = scales_from_static(tl.load(source + (group if PER_GROUP else 0)))
            elif MODE == "dynamic":
                bits = tl.max(tl.load(source + (group if PER_GROUP else 0) + tl.arange(0, PARTIALS)), axis=0)
                if amax is not None:
                    tl.store(amax, bits, mask=program == 0)
                g, s = scales_from_amax(bits)
            else:
                largest = tl.zeros((ROWS,), tl.int32)
                for step in range(first_step, first_step + STEPS):
                    columns = step * COLUMNS + tl.arange(0, COLUMNS)
                    mask = inside[:, None] & (columns < K)[None, :]
                    values = tl.load(x + from_rows[:, None] * K + columns[None, :], mask=mask, other=0.0)
                    largest = tl.maximum(largest, tl.max(magnitude_bits(values), axis=1))
                tl.store(amax + rows, largest, mask=inside)
                g, s = scales_from_amax(largest)
            for step in range(first_step, first_step + STEPS):
                columns = step * COLUMNS + tl.arange(0, COLUMNS)
                mask = inside[:, None] & (columns < K)[None, :]
                values = tl.load(x + from_rows[:, None] * K + columns[None, :], mask=mask, other=0.0)
                tile_codes, tile_scales = quantize(values.to(tl.float32), g, s)
                store_quantized(
                    codes, scales, tile_codes, tile_scales, begin, end, row, padded, step * COLUMNS, ROWS, COLUMNS, K
                )
