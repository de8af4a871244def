# SPDX-License-Identifier: Apache-2.0
"""One half of the layer for all groups in one persistent launch: a block-scaled GEMM and what follows it.

    GATE_UP   h = silu(min(gate, L)) * clamp(up, -L, L); gate and up interleaved by 8 rows (layouts/weights.py)
              static      h is quantised in registers: codes and swizzled block scales leave, nothing else
              per_token   h leaves as fp32 with its rows' amax; who finishes the last tile of some rows quantises them
              dynamic     h leaves as fp32 with its amax; what reads it quantises it
    else      y = the sum times its scales, rounded once to the dtype of y

    Routed experts: `gather` is the row of a of each row of a group, `slots` its row of y, `factors` what multiplies
    the row of a slot where `weighted`: h before it enters, or y.

    a unit    TOKENS rows of one group x ROWS weight rows x one of `split` runs of K
    the sum   of the parts of a tile is made by who finishes the last of them, in the order of K: always the same bits

No program waits for another: "the last one goes on" is a ticket that starts at zero (enter.py sets it) and is drawn
after a barrier with acquire and release at the scope of the device. What others have written is read past the L1
cache. SWAP makes the weights the left operand of the dot, so that few tokens are the narrow dimension of the
instruction. QUANTIZE_A: a is h in fp32, and is quantised on its way into the dot.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .dot import block_scaled_dot
from .numbers import magnitude_bits, quantize, scales_from_amax, scales_from_static
from .tiles import blocks_of, find_group, load_codes, load_scale_tiles, load_scales, store_quantized


@triton.jit
def activation_scales(source, group, rows, inside, MODE: tl.constexpr, PER_GROUP: tl.constexpr):
    """Global scales (g, s) of a tile's activations: scalars or, per token, (TOKENS,)."""
    if MODE == "static":
        return scales_from_static(tl.load(source + (group if PER_GROUP else 0)))
    elif MODE == "dynamic":
        return scales_from_amax(tl.load(source + (group if PER_GROUP else 0)))
    else:
        return scales_from_amax(tl.load(source + rows, mask=inside, other=0, cache_modifier=".cg"))


@triton.jit
def draw_ticket(counter):
    """How many came here before; everything they wrote before is visible after."""
    tl.debug_barrier()
    ticket = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
    tl.debug_barrier()
    return ticket


@triton.jit
def swiglu(total, scale, gate_scale, up_scale, limit):
    """(R, 2C) fp32 sums of interleaved gate and up rows: (R, C) fp32."""
    rows: tl.constexpr = total.shape[0]
    columns: tl.constexpr = total.shape[1]
    gate, up = tl.split(total.reshape(rows, columns // 16, 2, 8).trans(0, 1, 3, 2))
    gate = gate.reshape(rows, columns // 2) * (scale * gate_scale)[:, None]
    up = up.reshape(rows, columns // 2) * (scale * up_scale)[:, None]
    gate = tl.where(gate > limit, limit, gate)
    up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    return gate * tl.div_rn(1.0, 1.0 + tl.exp(-gate)) * up


@triton.jit
def factors_of(slots, factors, weighted, rows, inside):
    """(R, 1) fp32 factors of rows; 1 where they are not `weighted`."""
    inside = inside & (weighted != 0)
    return tl.load(factors + tl.load(slots + rows, mask=inside, other=0), mask=inside, other=1.0)[:, None]


@triton.jit
def finish(
    total,
    group,
    begin,
    end,
    row,
    padded,
    column_block,
    block,
    a_rows,
    a_source,
    w_global,
    out,
    codes,
    scales,
    h_source,
    tickets,
    slots,
    factors,
    weighted,
    limit,
    N: tl.constexpr,
    MODE: tl.constexpr,
    A_PER_GROUP: tl.constexpr,
    H_PER_GROUP: tl.constexpr,
    GATE_UP: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """What follows the sum of a tile, (TOKENS, ROWS) fp32."""
    rows = begin + row + tl.arange(0, TOKENS)
    inside = rows < end
    _, s = activation_scales(a_source, group, a_rows, inside, MODE, A_PER_GROUP)
    s = s + tl.zeros((TOKENS,), tl.float32)
    if not GATE_UP:
        columns = column_block * ROWS + tl.arange(0, ROWS)
        y = total * (s * tl.load(w_global + group))[:, None]
        out_rows = rows
        if slots is not None:
            y = y * factors_of(slots, factors, weighted, rows, inside)
            out_rows = tl.load(slots + rows, mask=inside, other=0)
        place = out_rows.to(tl.int64)[:, None] * N + columns[None, :]
        tl.store(out + place, y.to(out.dtype.element_ty), mask=inside[:, None] & (columns < N)[None, :])
    else:
        channels: tl.constexpr = ROWS // 2
        size: tl.constexpr = N // 2
        columns = column_block * channels + tl.arange(0, channels)
        mask = inside[:, None] & (columns < size)[None, :]
        h = swiglu(total, s, tl.load(w_global + 2 * group), tl.load(w_global + 2 * group + 1), limit)
        if slots is not None:
            h = h * factors_of(slots, factors, weighted, rows, inside)
        if MODE == "static":
            g, s = activation_scales(h_source, group, rows, inside, MODE, H_PER_GROUP)
            tile_codes, tile_scales = quantize(h, g, s)
            store_quantized(
                codes,
                scales,
                tile_codes,
                tile_scales,
                begin,
                end,
                row,
                padded,
                column_block * channels,
                TOKENS,
                channels,
                size,
            )
        else:
            tl.store(out + rows.to(tl.int64)[:, None] * size + columns[None, :], h, mask=mask)
            if MODE == "dynamic":
                amax = h_source + (group if H_PER_GROUP else 0)
                tl.atomic_max(amax, tl.max(magnitude_bits(h)), sem="relaxed")
            else:
                tl.atomic_max(h_source + rows, tl.max(magnitude_bits(h), axis=1), mask=inside, sem="relaxed")
                tiles: tl.constexpr = (N + ROWS - 1) // ROWS
                if draw_ticket(tickets + block) == tiles - 1:
                    g, s = activation_scales(h_source, group, rows, inside, MODE, H_PER_GROUP)
                    for tile in range(tiles):
                        columns = tile * channels + tl.arange(0, channels)
                        mask = inside[:, None] & (columns < size)[None, :]
                        place = rows.to(tl.int64)[:, None] * size + columns[None, :]
                        h = tl.load(out + place, mask=mask, other=0.0, cache_modifier=".cg")
                        tile_codes, tile_scales = quantize(h, g, s)
                        store_quantized(
                            codes,
                            scales,
                            tile_codes,
                            tile_scales,
                            begin,
                            end,
                            row,
                            padded,
                            tile * channels,
                            TOKENS,
                            channels,
                            size,
                        )


@triton.jit(do_not_specialize=["weighted", "tokens", "split", "limit"], do_not_specialize_on_alignment=["factors"])
def gemm(
    a,
    a_scales,
    a_source,
    w,
    w_scales,
    w_global,
    out,
    codes,
    scales,
    h_source,
    partials,
    part_tickets,
    block_tickets,
    offsets,
    gather,
    slots,
    factors,
    weighted,
    tokens,
    split,
    limit,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
    MODE: tl.constexpr,
    A_PER_GROUP: tl.constexpr,
    H_PER_GROUP: tl.constexpr,
    GATE_UP: tl.constexpr,
    QUANTIZE_A: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLIT: tl.constexpr,
    SWAP: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """a: codes (T, K/2), or h (T, K) fp32 with QUANTIZE_A; w: codes (E, N, K/2); scales swizzled.

    Block scales of a: each group padded by itself or, with `gather`, as the rows of a lie.
    a_source, h_source: what `activation_scales` reads, for a and for h. SPLIT: split > 1. Grid: any number of programs.
    """
    steps: tl.constexpr = (K + COLUMNS - 1) // COLUMNS
    weight_scale_bytes: tl.constexpr = (N + 127) // 128 * ((K + 63) // 64) * 512
    blocks = blocks_of(offsets, tokens, TOKENS, GROUPS)
    units = blocks * ((N + ROWS - 1) // ROWS) * split
    for unit in range(tl.program_id(0), units, tl.num_programs(0)):
        tile, part = unit // split, unit % split
        block, column_block = tile % blocks, tile // blocks
        group, begin, end, in_group, padded = find_group(block, offsets, tokens, TOKENS, GROUPS)
        row = in_group * TOKENS
        rows = begin + row + tl.arange(0, TOKENS)
        inside = rows < end
        a_rows, a_scale_rows = rows, padded + row + tl.arange(0, TOKENS)
        if gather is not None:
            a_rows = tl.load(gather + rows, mask=inside, other=0)
            a_scale_rows = a_rows
        w_rows = column_block * ROWS + tl.arange(0, ROWS)
        group_w = w + tl.cast(group, tl.int64) * (N * K // 2)
        group_w_scales = w_scales + tl.cast(group, tl.int64) * weight_scale_bytes
        if QUANTIZE_A:
            g, s = activation_scales(a_source, group, rows, inside, MODE, A_PER_GROUP)
        total = tl.zeros((ROWS, TOKENS) if SWAP else (TOKENS, ROWS), tl.float32)
        first = part * steps // split
        if not QUANTIZE_A and TOKENS % 128:
            next_a_scales = load_scales(a_scales, a_scale_rows, inside, first, COLUMNS, K)
        for step in range(first, (part + 1) * steps // split):
            if QUANTIZE_A:
                columns = step * COLUMNS + tl.arange(0, COLUMNS)
                mask = inside[:, None] & (columns < K)[None, :]
                place = rows.to(tl.int64)[:, None] * K + columns[None, :]
                tile_a, tile_a_scales = quantize(tl.load(a + place, mask=mask, other=0.0), g, s)
            else:
                tile_a = load_codes(a, a_rows, inside, step, COLUMNS, K)
                if TOKENS % 128:
                    # These go through registers; loaded a step ahead, nothing waits for them.
                    tile_a_scales = next_a_scales
                    next_a_scales = load_scales(a_scales, a_scale_rows, inside, step + 1, COLUMNS, K)
                else:
                    tile_a_scales = load_scale_tiles(
                        a_scales, padded + row, padded + end - begin, step, TOKENS, COLUMNS, K, NATIVE
                    )
            tile_w = load_codes(group_w, w_rows, w_rows < N, step, COLUMNS, K)
            tile_w_scales = load_scale_tiles(group_w_scales, column_block * ROWS, N, step, ROWS, COLUMNS, K, NATIVE)
            if SWAP:
                total = block_scaled_dot(tile_w, tile_w_scales, tile_a, tile_a_scales, total, NATIVE)
            else:
                total = block_scaled_dot(tile_a, tile_a_scales, tile_w, tile_w_scales, total, NATIVE)
        if SWAP:
            total = total.T
        last = True
        if SPLIT:
            within = tl.arange(0, TOKENS)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
            tl.store(partials + tl.cast(unit, tl.int64) * (TOKENS * ROWS) + within, total)
            last = draw_ticket(part_tickets + tile) == split - 1
            if last:
                total = tl.zeros((TOKENS, ROWS), tl.float32)
                for other in range(split):
                    place = tl.cast(tile * split + other, tl.int64) * (TOKENS * ROWS) + within
                    total += tl.load(partials + place, cache_modifier=".cg")
        if last:
            finish(
                total,
                group,
                begin,
                end,
                row,
                padded,
                column_block,
                block,
                a_rows,
                a_source,
                w_global,
                out,
                codes,
                scales,
                h_source,
                block_tickets,
                slots,
                factors,
                weighted,
                limit,
                N,
                MODE,
                A_PER_GROUP,
                H_PER_GROUP,
                GATE_UP,
                TOKENS,
                ROWS,
            )
