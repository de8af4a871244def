# SPDX-License-Identifier: Apache-2.0
"""FP8 activations of a shared expert on Hopper, of more tokens than decode.cu takes.

Weights are packed as layouts/e4m3_fragments.py says.

up to FEW tokens: gemm.cu, straight from packed weights

    fp8.cu       x -> e4m3 and a scale per token
    gemm.cu      x @ W1.T, x @ W3.T, clamp and SwiGLU -> h in bf16
    fp8.cu       h -> e4m3 and a scale per token
    gemm.cu      h @ W2.T -> y

more: weights to e4m3, and the vendor's FP8 GEMM with a scale per row

    fp8.cu       x -> e4m3 and a scale per token
    unpack.cu    W1, W3 -> e4m3 and a scale per output row
    _scaled_mm   gate and up, in bf16
    fp8.cu       clamp and SwiGLU in fp32 -> h in e4m3 and a scale per token
    unpack.cu    W2 -> e4m3, over the weights before
    _scaled_mm   y, in bf16

Routed experts are gemm.cu's (grouped.py); `enter_rows` brings their rows to e4m3 for it.

Operands are those of kernels/reference.py. Two things differ from it: h (few tokens) or gate, up and y (more) are
rounded to bf16 out of the sum (in fp32 there would be twice the traffic between the GEMMs), and the tensor cores keep
13 fractional bits of a running sum. Both are small beside e4m3 itself; tests/tolerances.py has the figures.

Scratch: x and h in e4m3; h in bf16, or gate and up and e4m3 weights, WEIGHTS_AT_ONCE at most. Floor: 2 * T * 3HI flops
at the FP8 rate, and around the GEMMs 0.5625 bytes a weight (more tokens: 1.5625), 3 (bf16) a value of x and 5 a value
of h.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...layouts.fragments import COLUMNS, ROWS, fragment_bytes
from ..cuda.workspace import Part, bytes_of, carve
from ..dispatch import Call, Problem
from ..target import target_of
from . import gemm
from .choice import choose
from .compile import launch_kernel, load_kernel

FEW = 256  # tokens; from the next range on the vendor's GEMM is faster on V4-Flash (docs/measured.md)
WEIGHTS_AT_ONCE = 1 << 26
_QUANTIZE_ROWS = {
    torch.bfloat16: "quantize_rows_bf16",
    torch.float16: "quantize_rows_fp16",
    torch.float32: "quantize_rows_fp32",
}
_ENTER_ROWS = {dtype: name.replace("quantize", "enter") for dtype, name in _QUANTIZE_ROWS.items()}
_UNPACK_THREADS, _CHUNKS_OF_BLOCK = 256, 16  # as in unpack.cu
_VALUES_OF_THREAD, _WARP, _MOST_THREADS = 32, 32, 1024  # as in fp8.cu


def prepare(problem: Problem, device: torch.device, max_tokens: int, result: torch.dtype) -> None:
    """Compile and load what `shared_expert` runs for bf16 hidden states, up to a number of tokens."""
    prepare_rows(device)
    gemm.prepare(problem, device, min(max_tokens, FEW), result)
    if max_tokens > FEW:
        for name in ("unpack_fragments", _QUANTIZE_ROWS[torch.bfloat16], "swiglu_quantize"):
            _kernel(name, device)


def shared_expert(x: Tensor, weights: list[Tensor], call: Call, size: int, out: Tensor) -> None:
    """x (T, H) to out (T, H), both aligned to 16 bytes; weights as `Sm90Fp8Backend.pack` made them."""
    (_few if len(x) <= FEW else _many)(x, weights, call, size, out)


def most_scratch(hidden: int, intermediate: int, max_tokens: int, dtype: torch.dtype) -> int:
    """The most that `shared_expert` carves, up to a number of tokens, for a result of that dtype."""
    few = bytes_of(_scratch_of_few(hidden, intermediate, min(max_tokens, FEW)))
    if max_tokens <= FEW:
        return few
    return max(few, bytes_of(_scratch_of_many(hidden, intermediate, max_tokens, dtype)))


def _few(x: Tensor, weights: list[Tensor], call: Call, size: int, out: Tensor) -> None:
    gate_up, global_scales, row_amax, down, down_global_scale, down_row_amax = weights
    tokens, hidden = x.shape
    first, second = (replace(config, fp8=True) for config in choose(hidden, size, tokens, target_of(x.device)))
    values, h, h_values, scales = carve(x.device, *_scratch_of_few(hidden, size, tokens))

    half = functools.partial(gemm.run_half, token_scales=scales, scaling=gemm.SCALE_OF_TOKEN)
    enter_rows(x, values, scales)
    half(values, gate_up, 2 * size, global_scales, h, first, gate_up=True, limit=call.clamp, row_amax=row_amax)
    enter_rows(h, h_values, scales)
    half(h_values, down, hidden, down_global_scale, out, second, gate_up=False, row_amax=down_row_amax)


def _scratch_of_few(hidden: int, intermediate: int, tokens: int) -> list[Part]:
    of_x, of_h = (-(-columns // COLUMNS) * COLUMNS for columns in (hidden, intermediate))
    return [
        ((tokens, of_x), torch.float8_e4m3fn),
        ((tokens, intermediate), torch.bfloat16),
        ((tokens, of_h), torch.float8_e4m3fn),
        ((tokens,), torch.float32),
    ]


def _many(x: Tensor, weights: list[Tensor], call: Call, size: int, out: Tensor) -> None:
    gate_up, global_scales, row_amax, down, down_global_scale, down_row_amax = weights
    tokens, hidden = x.shape
    values, scales, sums, h, h_scales, decoded, row_scales, *cast = carve(
        x.device, *_scratch_of_many(hidden, size, tokens, out.dtype)
    )
    y = cast[0] if cast else out

    quantize_rows(x, values, scales)
    for start, stop in _tiles(size, 2 * hidden):
        count = stop - start
        w, w_scales = decoded[: 2 * count * hidden].view(2 * count, hidden), row_scales[: 2 * count]
        packed = _rows_of(gate_up, 2 * start, 2 * stop, hidden)
        unpack_rows(packed, row_amax[:, start:stop], global_scales, w, w_scales)
        if count == size:
            _multiply(values, scales, w, w_scales, sums)
        else:  # gate's columns and up's are no neighbours in the result
            _multiply(values, scales, w[:count], w_scales[:count], sums[:, start:stop])
            _multiply(values, scales, w[count:], w_scales[count:], sums[:, size + start : size + stop])
    swiglu_quantize(sums, call.clamp, h, h_scales)
    for start, stop in _tiles(hidden, size):
        count = stop - start
        w, w_scales = decoded[: count * size].view(count, size), row_scales[:count]
        packed = _rows_of(down, start, stop, size)
        unpack_rows(packed, down_row_amax[None, start:stop], down_global_scale, w, w_scales)
        _multiply(h, h_scales, w, w_scales, y[:, start:stop])
    if y is not out:
        out.copy_(y)


def _scratch_of_many(hidden: int, intermediate: int, tokens: int, dtype: torch.dtype) -> list[Part]:
    rows = 2 * _tile_rows(intermediate, 2 * hidden), _tile_rows(hidden, intermediate)
    parts: list[Part] = [
        ((tokens, hidden), torch.float8_e4m3fn),
        ((tokens, 1), torch.float32),
        ((tokens, 2 * intermediate), torch.bfloat16),
        ((tokens, intermediate), torch.float8_e4m3fn),
        ((tokens, 1), torch.float32),
        ((max(rows[0] * hidden, rows[1] * intermediate),), torch.float8_e4m3fn),
        ((max(rows),), torch.float32),
    ]
    if dtype != torch.bfloat16:
        parts.append(((tokens, hidden), torch.bfloat16))
    return parts


def quantize_rows(x: Tensor, values: Tensor, scales: Tensor) -> None:
    """x (T, K) bf16, fp16 or fp32 to values (T, K) e4m3 and scales (T, 1) fp32: `quantize_fp8_rows`, byte for byte."""
    kernel = _kernel(_QUANTIZE_ROWS[x.dtype], x.device)
    launch_kernel(kernel, (x.shape[0],), _threads(x.shape[1]), x, np.int32(x.shape[1]), values, scales)


def enter_rows(
    x: Tensor, values: Tensor, scales: Tensor, *, count: Tensor | None = None, row_of_slot: Tensor | None = None
) -> None:
    """As `quantize_rows`, in the order of layouts/e4m3_fragments.py, to the rows of each token's slots.

    Args:
        values: (R, K up to a multiple of 64) e4m3, zero where x has no column.
        count: (1,) int32: how many rows of x, without row_of_slot; None: all.
        row_of_slot: (T * top_k,) int32: where the rows of token 0 go, of token 1, ..; -1: nowhere; None: to row t.
    """
    kernel = _kernel(_ENTER_ROWS[x.dtype], x.device)
    threads = _threads(values.shape[1])
    top_k = 1 if row_of_slot is None else len(row_of_slot) // len(x)
    sizes = np.int32(x.shape[1]), np.int32(top_k)
    launch_kernel(kernel, (len(x),), threads, x, sizes[0], count, row_of_slot, sizes[1], values, scales)


def prepare_rows(device: torch.device) -> None:
    """Compile and load `enter_rows` for bf16."""
    _kernel(_ENTER_ROWS[torch.bfloat16], device)


def swiglu_quantize(gate_up: Tensor, limit: float, h: Tensor, scales: Tensor) -> None:
    """gate_up (T, 2I) bf16, gate's then up's columns, to h (T, I) e4m3 and scales (T, 1) fp32; infinity is no limit."""
    tokens, columns = h.shape
    kernel = _kernel("swiglu_quantize", h.device)
    sizes = np.int32(columns), np.float32(limit)
    launch_kernel(kernel, (tokens,), _threads(columns), gate_up, *sizes, h, scales)


def unpack_rows(packed: Tensor, row_amax: Tensor, global_scales: Tensor, values: Tensor, scales: Tensor) -> None:
    """Packed rows to values (N, K) e4m3 and scales (N,) fp32.

    Args:
        packed: N rows as `pack_e4m3_fragments` made them.
        row_amax: (1, N) bf16; or (2, N / 2), of gate and of up, whose packed rows interleave and are taken apart.
        global_scales: (1,) or (2,) fp32.
    """
    (rows, columns), (halves, of_half) = values.shape, row_amax.shape
    # Where a tile's last eight rows are, behind its first eight: in the other half, or next to them.
    behind = (row_amax.stride(0), of_half) if halves == 2 else (ROWS // 2, ROWS // 2)
    chunks = -(-columns // COLUMNS)
    launch_kernel(
        _kernel("unpack_fragments", values.device),
        (-(-chunks // _CHUNKS_OF_BLOCK), rows // ROWS),
        _UNPACK_THREADS,
        packed,
        np.int32(chunks),
        np.int32(columns),
        row_amax,
        np.int32(behind[0]),
        global_scales,
        np.int32(ROWS // halves),
        np.int32(behind[1]),
        values,
        scales,
    )


def _multiply(a: Tensor, a_scales: Tensor, w: Tensor, w_scales: Tensor, out: Tensor) -> None:
    """out (T, N) bf16, or columns of more = a (T, K) @ w (N, K).T * a_scales (T, 1) * w_scales (N,); a and w e4m3."""
    torch._scaled_mm(
        a, w.t(), scale_a=a_scales, scale_b=w_scales[None], out_dtype=out.dtype, use_fast_accum=True, out=out
    )


def _tile_rows(rows: int, weights_of_row: int) -> int:
    return min(rows, max(ROWS, WEIGHTS_AT_ONCE // weights_of_row // ROWS * ROWS))


def _tiles(rows: int, weights_of_row: int) -> Iterator[tuple[int, int]]:
    step = _tile_rows(rows, weights_of_row)
    return ((start, min(start + step, rows)) for start in range(0, rows, step))


def _rows_of(packed: Tensor, start: int, stop: int, columns: int) -> Tensor:
    return packed[fragment_bytes(start, columns) : fragment_bytes(stop, columns)]


def _threads(columns: int) -> int:
    return min(_MOST_THREADS, -(-columns // (_VALUES_OF_THREAD * _WARP)) * _WARP)


def _kernel(name: str, device: torch.device) -> Any:
    return load_kernel(name, "unpack.cu" if name == "unpack_fragments" else "fp8.cu", (), device)
