# SPDX-License-Identifier: Apache-2.0
"""Weights: gate and up interleaved by 8 rows, and codes with K contiguous seen as (K/2, N).

Interleave, granularity 8: row r of `a` goes to row 2r - r % 8, row r of `b` to 2r - r % 8 + 8:

    [a0..a7, b0..b7, a8..a15, b8..b15, ...]

In an m16n8 tensor-core tile rows r and r + 8 sit in the same thread, so with weights as the 16-row operand a thread
holds gate and up of the same channel, and SwiGLU needs no exchange. Codes and block scales interleave alike.

K-major: byte (j, n) of the (K/2, N) view lies at n * K/2 + j.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import LayoutError
from ..formats.codes import decode_blocks
from ..formats.nvfp4 import Nvfp4Tensor

GRANULARITY = 8
_AMAX_ROWS = 512


def interleave_rows(a: Tensor, b: Tensor, granularity: int = GRANULARITY) -> Tensor:
    """Interleave the rows of two tensors in groups of `granularity`, `a` first.

    Args:
        a, b: (..., I, C) of the same shape, dtype and device; I a multiple of granularity.

    Returns:
        New tensor (..., 2I, C).

    Raises:
        LayoutError: shapes, dtypes or devices that differ, or an I that is not a multiple of granularity.
    """
    kinds = [f"{tuple(t.shape)} {t.dtype} on {t.device}" for t in (a, b)]
    if kinds[0] != kinds[1]:
        raise LayoutError(
            "a and b", "must have one shape, dtype and device", " and ".join(kinds),
            "interleave tensors of the same projection size",
        )  # fmt: skip
    groups = _row_groups("a", a, granularity)
    pairs = torch.stack((a.unflatten(-2, (groups, granularity)), b.unflatten(-2, (groups, granularity))), dim=-3)
    return pairs.flatten(-4, -2)


def deinterleave_rows(interleaved: Tensor, granularity: int = GRANULARITY) -> tuple[Tensor, Tensor]:
    """Take interleaved rows apart: (..., 2I, C) to two new tensors (..., I, C); the inverse of `interleave_rows`."""
    groups = _row_groups("interleaved", interleaved, 2 * granularity)
    a, b = interleaved.unflatten(-2, (groups, 2, granularity)).unbind(-3)
    return a.flatten(-3, -2), b.flatten(-3, -2)


def interleave_gate_up(gate: Nvfp4Tensor, up: Nvfp4Tensor) -> tuple[Tensor, Tensor]:
    """Interleave codes and block scales of gate and up, both (..., I, K), by 8 rows.

    Returns:
        codes (..., 2I, K/2) and block_scales (..., 2I, K/16). The two global scales may differ and stay with the
        caller: rows of gate take the one, rows of up the other.

    Raises:
        LayoutError: shapes that differ, or an I that is not a multiple of 8.
    """
    return interleave_rows(gate.codes, up.codes), interleave_rows(gate.block_scales, up.block_scales)


def deinterleave_gate_up(
    codes: Tensor, block_scales: Tensor, gate_global_scale: Tensor, up_global_scale: Tensor
) -> tuple[Nvfp4Tensor, Nvfp4Tensor]:
    """Gate and up from their interleaved codes and block scales; the inverse of `interleave_gate_up`."""
    gate_codes, up_codes = deinterleave_rows(codes)
    gate_scales, up_scales = deinterleave_rows(block_scales)
    gate = Nvfp4Tensor(gate_codes, gate_scales, gate_global_scale)
    return gate, Nvfp4Tensor(up_codes, up_scales, up_global_scale)


def row_amax(w: Nvfp4Tensor) -> Tensor:
    """Largest |e2m1 * block scale| of each row, (N,) bf16, exact: the unit of its e4m3 rounding."""
    rows = zip(w.codes.split(_AMAX_ROWS), w.block_scales.split(_AMAX_ROWS), strict=True)
    return torch.cat([decode_blocks(codes, scales).abs().amax(-1) for codes, scales in rows])


def to_k_major(codes: Tensor) -> Tensor:
    """View codes (..., N, K/2) as (..., K/2, N) with K contiguous, a GEMM's B operand; copies only to pack rows."""
    _check_matrix("codes", codes)
    return codes.contiguous().mT


def from_k_major(k_major: Tensor) -> Tensor:
    """View K-major codes (..., K/2, N) as (..., N, K/2), contiguous; the inverse of `to_k_major`.

    Raises:
        LayoutError: codes whose K is not contiguous: they are not in this layout.
    """
    _check_matrix("k_major", k_major)
    codes = k_major.mT
    if not codes.is_contiguous():
        raise LayoutError(
            "k_major", "K, the dimension before the last, must be contiguous", f"strides {k_major.stride()}",
            "make it with to_k_major, or transpose with .mT if it is a plain matrix",
        )  # fmt: skip
    return codes


def _row_groups(name: str, tensor: Tensor, rows: int) -> int:
    _check_matrix(name, tensor)
    if rows < 1:
        raise LayoutError("granularity", "must be at least 1", rows, "use the default, 8")
    if tensor.shape[-2] % rows:
        raise LayoutError(
            name, f"the number of rows must be a multiple of {rows}", tuple(tensor.shape), "pad with rows of zeros"
        )
    return tensor.shape[-2] // rows


def _check_matrix(name: str, tensor: Tensor) -> None:
    if tensor.ndim < 2:
        raise LayoutError(name, "must have rows and columns", tuple(tensor.shape), "pass a matrix")
