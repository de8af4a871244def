# SPDX-License-Identifier: Apache-2.0
"""Routed experts: slots to the rows of each expert, and rows back to tokens.

    slot t * k + s    the s-th expert of token t, indices[t, s]; outside [0, E) it has no row
    group_slots       offsets (E + 1,), and of each row its token and its slot; an expert's rows in ascending order of
                      slots: always the same
    add_slots         y[t] = ((0 + row of slot 0) + row of slot 1) + ...    fp32, rounded once to the dtype of y

A program of `group_slots` asks all indices for one expert: nothing is counted in memory, and one launch does it for any
number of slots. Indices are compared as they come, int32 or int64, never narrowed.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["slot_count", "top_k"], do_not_specialize_on_alignment=["indices"])
def group_slots(indices, offsets, tokens, slots, slot_count, top_k, BLOCK: tl.constexpr):
    """Grid: (E,). Cost: E times slot_count indices read, from the cache; two passes of BLOCK at a time."""
    expert = tl.program_id(0)
    lower = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, slot_count, BLOCK):
        slot = first + tl.arange(0, BLOCK)
        index = tl.load(indices + slot, mask=slot < slot_count, other=-1)
        lower += tl.where((index >= 0) & (index < expert), 1, 0)
    begin = tl.sum(lower, axis=0)
    tl.store(offsets + expert, begin)
    for first in range(0, slot_count, BLOCK):
        slot = first + tl.arange(0, BLOCK)
        here = tl.load(indices + slot, mask=slot < slot_count, other=-1) == expert
        count = tl.where(here, 1, 0)
        row = begin + tl.cumsum(count, axis=0) - 1
        tl.store(tokens + row, slot // top_k, mask=here)
        tl.store(slots + row, slot, mask=here)
        begin += tl.sum(count, axis=0)
    if expert == tl.num_programs(0) - 1:
        tl.store(offsets + expert + 1, begin)


@triton.jit(do_not_specialize=["tokens", "top_k"], do_not_specialize_on_alignment=["indices"])
def add_slots(
    rows,
    indices,
    y,
    tokens,
    top_k,
    EXPERTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    AT_A_TIME: tl.constexpr,
):
    """rows (T * k, COLUMNS) fp32 to y (T, COLUMNS), `tokens` being T. Grid: (T or more, runs of BLOCK columns).

    Rows of slots whose expert is not here are not read. They count as 0, which changes no sum: none is ever -0.
    """
    token = tl.cast(tl.program_id(0), tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (columns < COLUMNS) & (token < tokens)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, top_k, AT_A_TIME):
        for other in tl.static_range(AT_A_TIME):  # so many loads under way at a time
            slot = token * top_k + first + other
            index = tl.load(indices + slot, mask=(first + other < top_k) & (token < tokens), other=-1)
            here = inside & (index >= 0) & (index < EXPERTS)
            total += tl.load(rows + slot * COLUMNS + columns, mask=here, other=0.0)
    tl.store(y + token * COLUMNS + columns, total.to(y.dtype.element_ty), mask=inside)
