# SPDX-License-Identifier: Apache-2.0
"""Many tokens on Hopper: unpack weights to bf16, the vendor's GEMM with an fp32 result, one pass for what lies between.

    unpack.cu        a tile of gate and up rows to bf16 (for "fp8" rounded to e4m3, which bf16 holds)
    torch.mm         (T, H) x (2 rows, H).T -> fp32 sums
    elementwise.cu   scales, clamp and SwiGLU: sums -> h; quantisation of x and of h to NVFP4 values
    ...              and the same for down

Every operand is exact in bf16 and every sum fp32, as in kernels/reference.py. Scratch: a tile of TILE_VALUES weights of
one matrix (twice that for gate and up), its sums, h. Floor: 2 * T * 3HI flops, and 2.5625 bytes per weight to unpack.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...formats.activations import activation_global_scales, quantize_fp8_rows
from ...formats.codes import AMAX_FLOOR, BLOCK_SIZE, E4M3_MAX
from ...layouts.fragments import COLUMNS, ROWS
from ..dispatch import Call, Problem
from .compile import current_stream, load_kernel

TILE_VALUES = 1 << 24
_THREADS = 256


def prepare(problem: Problem, device: torch.device) -> None:
    """Compile and load the kernels that `shared_expert` runs for bf16 hidden states."""
    fp8 = problem.activations == "fp8"
    _unpack_kernel(problem.hidden, ROWS // 2, fp8, device)
    _unpack_kernel(problem.intermediate, ROWS, fp8, device)
    _elementwise_kernel("swiglu_of_sums", "WIDE", int(problem.activations != "bf16"), device)
    if problem.activations == "nvfp4":
        for element in (0, 2):
            _elementwise_kernel("enter_nvfp4", "ELEMENT", element, device)


def shared_expert(x: Tensor, weights: list[Tensor], call: Call, size: int, out: Tensor) -> None:
    """x (T, H) to out (T, H); weights as `Sm90Backend.pack` made them."""
    gate_up, global_scales, row_amax, down, down_global_scale, down_row_amax = weights
    fp8 = call.activations == "fp8"
    if fp8:
        row_amax, down_row_amax = row_amax.float(), down_row_amax.float()
    scales, down_scales = (
        (_row_scales(row_amax) * global_scales[:, None], _row_scales(down_row_amax) * down_global_scale)
        if fp8
        else (global_scales[:, None], down_global_scale)
    )
    values, scale = _enter(x, call, call.input_scale)
    h = torch.empty(
        x.shape[0], size, dtype=torch.bfloat16 if call.activations == "bf16" else torch.float32, device=x.device
    )
    for rows in _tiles(size, x.shape[1]):
        amax = row_amax[:, rows] if fp8 else None
        sums = _matmul(values, _unpack(gate_up, 2 * rows.start, 2 * rows.stop, x.shape[1], ROWS // 2, amax))
        _swiglu(sums, scales[:, rows] if fp8 else scales, scale, call.swiglu_limit, h[:, rows])
    values, scale = _enter(h, call, call.hidden_scale)
    for rows in _tiles(out.shape[1], size):
        amax = down_row_amax[None, rows] if fp8 else None
        sums = _matmul(values, _unpack(down, rows.start, rows.stop, size, ROWS, amax))
        factor = down_scales[rows] if fp8 else down_scales
        torch.mul(sums, factor if scale is None else scale * factor, out=out[:, rows])


def _tiles(rows: int, columns: int) -> Iterator[slice]:
    step = max(ROWS, TILE_VALUES // columns // ROWS * ROWS)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _row_scales(row_amax: Tensor) -> Tensor:
    """The scale that quantize_fp8_rows gives a row of that amax."""
    return row_amax.clamp(min=AMAX_FLOOR) / torch.full_like(row_amax, E4M3_MAX)


def _matmul(values: Tensor, tile: Tensor) -> Tensor:
    """values (T, K) @ tile (N, K).T, fp32; the tile is free again when this returns."""
    return torch.mm(values, tile.T, out_dtype=torch.float32)


def _enter(x: Tensor, call: Call, static_scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """x (T, K) as bf16 values and their scale, () or (T, 1) fp32; None stands for 1."""
    if call.activations == "bf16":
        return x.to(torch.bfloat16), None
    if call.activations == "fp8":
        rounded, row_scale = quantize_fp8_rows(x)
        return rounded.to(torch.bfloat16), row_scale
    mode = call.activation_scale
    if mode == "static":
        assert static_scale is not None  # the layer has checked
        g, s = static_scale.reciprocal(), static_scale
    else:
        g, s = activation_global_scales(x, mode)
    x = x if x.dtype == torch.bfloat16 else x.float()
    values = torch.empty(x.shape, dtype=torch.bfloat16, device=x.device)
    kernel = _elementwise_kernel("enter_nvfp4", "ELEMENT", 0 if x.dtype == torch.bfloat16 else 2, x.device)
    sizes = np.int32(mode == "per_token"), np.int32(x.shape[0]), np.int32(x.shape[1])
    blocks = x.numel() // BLOCK_SIZE
    _launch(kernel, (-(-blocks // _THREADS),), x, g, s, *sizes, values)
    return values, s


def _swiglu(sums: Tensor, scales: Tensor, token_scale: Tensor | None, limit: float, h: Tensor) -> None:
    """sums (T, 2 rows) to h (T, rows), a view of the whole h; scales (2, rows) or (2, 1)."""
    tokens, columns = h.shape
    kernel = _elementwise_kernel("swiglu_of_sums", "WIDE", int(h.dtype == torch.float32), h.device)
    per_token = token_scale is not None and token_scale.numel() > 1
    grid = (tokens, -(-columns // (4 * _THREADS)))
    _launch(
        kernel,
        grid,
        sums,
        scales[0],
        scales[1],
        np.int32(scales.shape[1] > 1),
        token_scale,
        np.int32(per_token),
        np.float32(limit),
        np.int32(tokens),
        np.int32(columns),
        np.int32(h.stride(0)),
        h,
    )


def _unpack(packed: Tensor, start: int, stop: int, columns: int, split: int, row_amax: Tensor | None) -> Tensor:
    """Packed rows start..stop as bf16 (stop - start, columns): plain order, or gate's and then up's.

    row_amax: (ROWS / split, rows) for e4m3 rounding, rows contiguous; None leaves the values exact.
    """
    tiles = (stop - start) // ROWS
    out = torch.empty(stop - start, columns, dtype=torch.bfloat16, device=packed.device)
    kernel = _unpack_kernel(columns, split, row_amax is not None, packed.device)
    warps = tiles * -(-columns // COLUMNS)
    stride = np.int32(0 if row_amax is None else row_amax.stride(0))
    _launch(
        kernel, (-(-warps * 32 // _THREADS),), packed, np.int32(start // ROWS), np.int32(tiles), row_amax, stride, out
    )
    return out


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: Any) -> None:
    """Launch on the current stream; tensors pass as their address, None as a null pointer."""
    from cuda.core import LaunchConfig, launch

    device = next(a.device for a in arguments if isinstance(a, Tensor))
    passed = [a.data_ptr() if isinstance(a, Tensor) else 0 if a is None else a for a in arguments]
    launch(current_stream(device), LaunchConfig(grid=grid, block=_THREADS), kernel, *passed)


def _unpack_kernel(columns: int, split: int, fp8: bool, device: torch.device) -> Any:
    macros = (("COLUMNS", columns), ("SPLIT", split), ("FP8", int(fp8)))
    return load_kernel("unpack_fragments", "unpack.cu", macros, device)


def _elementwise_kernel(name: str, macro: str, value: int, device: torch.device) -> Any:
    other = {"ELEMENT": "WIDE", "WIDE": "ELEMENT"}[macro]
    return load_kernel(name, "elementwise.cu", ((macro, value), (other, 0)), device)
