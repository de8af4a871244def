# SPDX-License-Identifier: Apache-2.0
"""A shared expert in plain torch over decoded tiles of weight rows: what backends share that decode, then multiply.

    gate, up = values @ gate_tile.T, values @ up_tile.T         a tile of I
    h[tile]  = silu(min(gate, L)) * clamp(up, -L, L)            fp32, then bf16 or the next quantiser
    y[tile]  = values_of_h @ down_tile.T                        a tile of H

A backend says how its packed weights decode (`TiledWeights`). Every decoded value (e2m1 * block scale) and every
entered activation is exact in bf16 (`formats.codes.decode_blocks` proves it), so the operands are bf16 where the device
multiplies bf16 into an fp32 result and fp32 elsewhere: the products are the same.

The sum over k is the vendor library's; it may depend on T and so may the last bit of a result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..formats.activations import quantize_activation, quantize_fp8_rows
from ..formats.codes import decode_blocks
from ..formats.fp8_block import Fp8BlockTensor
from ..formats.nvfp4 import Nvfp4Tensor
from .dispatch import Call
from .target import target_of


@dataclass(frozen=True)
class TiledWeights:
    """Packed weights as tiles.

    Args:
        gate_up: rows of I -> decoded gate and up tiles, (rows, H) each, without their global scales.
        down: rows of H -> decoded down tile (rows, I), without its global scale.
        global_scales: of gate, up and down, () fp32 each.
        tile_values: how many decoded values a tile may have.
    """

    gate_up: Callable[[slice], tuple[Tensor, Tensor]]
    down: Callable[[slice], Tensor]
    global_scales: tuple[Tensor, Tensor, Tensor]
    tile_values: int


def tiles_of(gate: Nvfp4Tensor, up: Nvfp4Tensor, down: Nvfp4Tensor, tile_values: int) -> TiledWeights:
    """NVFP4 tensors in their plain form as tiles, decoded by `decode_blocks`."""
    dtype = operand_dtype(gate.device)

    def tile(w: Nvfp4Tensor, rows: slice) -> Tensor:
        return decode_blocks(w.codes[rows], w.block_scales[rows], dtype)

    return TiledWeights(
        lambda rows: (tile(gate, rows), tile(up, rows)),
        lambda rows: tile(down, rows),
        (gate.global_scale, up.global_scale, down.global_scale),
        tile_values,
    )


def stored_tiles(
    gate: Tensor | Fp8BlockTensor, up: Tensor | Fp8BlockTensor, down: Tensor | Fp8BlockTensor, tile_values: int
) -> TiledWeights:
    """Floating or FP8 weights as tiles of their exact values.

    Those are operands as others are where bf16 holds them: bf16 weights, and e4m3 times a power of two. fp16, fp32
    and e4m3 times an fp32 scale are fp32.
    """

    def tile(w: Tensor | Fp8BlockTensor, rows: slice) -> Tensor:
        if isinstance(w, Fp8BlockTensor):
            exact = w.scales.dtype == torch.uint8
            dtype = operand_dtype(w.values.device) if exact else torch.float32
            return w.dequantize_rows(rows.start, rows.stop, dtype)
        return w[rows].to(operand_dtype(w.device) if w.dtype == torch.bfloat16 else torch.float32)

    one = torch.ones((), device=(gate.values if isinstance(gate, Fp8BlockTensor) else gate).device)
    return TiledWeights(
        lambda rows: (tile(gate, rows), tile(up, rows)), lambda rows: tile(down, rows), (one, one, one), tile_values
    )


def operand_dtype(device: torch.device) -> torch.dtype:
    """What tiles and activations are decoded to on a device."""
    return torch.bfloat16 if target_of(device).has_bf16_matmul_with_fp32_result else torch.float32


def enter(x: Tensor, call: Call, static_scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """x (T, K) as operand values and their scale, () or (T, 1); None stands for 1."""
    dtype = operand_dtype(x.device)
    if call.activations == "bf16":
        return x.to(torch.bfloat16).to(dtype), None
    if call.activations == "fp8":
        values, scale = quantize_fp8_rows(x)
        return values.to(dtype), scale
    q = quantize_activation(x, call.activation_scale, static_scale if call.activation_scale == "static" else None)
    return decode_blocks(q.codes, q.block_scales, dtype), q.global_scale


def intermediate(
    values: Tensor,
    scale: Tensor | None,
    weights: TiledWeights,
    size: int,
    call: Call,
    h_dtype: torch.dtype,
    factors: Tensor | None = None,
) -> Tensor:
    """L1 and SwiGLU: entered values (T, H) to h (T, size) of `h_dtype`; times `factors` (T, 1) fp32 before rounding."""
    gate_scale, up_scale, _ = weights.global_scales
    h = torch.empty(values.shape[0], size, dtype=h_dtype, device=values.device)
    for rows in _row_tiles(size, values.shape[1], weights.tile_values):
        gate_tile, up_tile = weights.gate_up(rows)
        gate = _linear(values, scale, gate_tile, gate_scale, call.activations)
        up = _linear(values, scale, up_tile, up_scale, call.activations)
        _swiglu(gate, up, call.swiglu_limit, factors, out=h[:, rows])
    return h


def shared_expert(x: Tensor, weights: TiledWeights, size: int, call: Call, out: Tensor) -> None:
    """The whole layer: x (T, H) to out (T, H), with an intermediate of `size` channels."""
    one_expert(*enter(x, call, call.input_scale), weights, size, call, out)


def one_expert(
    values: Tensor,
    scale: Tensor | None,
    weights: TiledWeights,
    size: int,
    call: Call,
    out: Tensor,
    factors: Tensor | None = None,
) -> None:
    """The layer after x has entered: values (T, H) to out (T, H); h times `factors` (T, 1) fp32, if there are any."""
    # h is quantised from fp32; in bf16 it is rounded once, on the way into this buffer.
    h_dtype = torch.bfloat16 if call.activations == "bf16" else torch.float32
    h = intermediate(values, scale, weights, size, call, h_dtype, factors)
    values, scale = enter(h, call, call.hidden_scale)
    for rows in _row_tiles(out.shape[1], size, weights.tile_values):
        _linear(values, scale, weights.down(rows), weights.global_scales[2], call.activations, out=out[:, rows])


def _row_tiles(rows: int, columns: int, tile_values: int) -> Iterator[slice]:
    step = max(16, tile_values // columns // 16 * 16)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _linear(
    values: Tensor,
    scale: Tensor | None,
    tile: Tensor,
    global_scale: Tensor,
    activations: str,
    out: Tensor | None = None,
) -> Tensor:
    """(T, K) values times one tile of weight rows (N, K): (T, N) fp32, scales applied to the sum; or into `out`."""
    if activations == "fp8":
        rounded, row_scale = quantize_fp8_rows(tile)
        tile, global_scale = rounded.to(values.dtype), row_scale[:, 0] * global_scale
    sums = _matmul(values, tile)
    return torch.mul(sums, global_scale if scale is None else scale * global_scale, out=sums if out is None else out)


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """a (T, K) @ b (N, K).T with an fp32 result, never rounded on the way."""
    if torch.float32 in (a.dtype, b.dtype):
        return a.float() @ b.float().T
    return torch.mm(a, b.T, out_dtype=torch.float32)


def _swiglu(gate: Tensor, up: Tensor, limit: float, factors: Tensor | None, out: Tensor) -> None:
    """fp32 gate and up, overwritten, to `out`, rounded once to its dtype; times `factors` (T, 1), if there are any."""
    if limit > 0:
        gate, up = gate.clamp_(max=limit), up.clamp_(-limit, limit)
    h = torch.nn.functional.silu(gate, inplace=True)
    if factors is not None:
        h, up = h.mul_(up), factors
    torch.mul(h, up, out=out)
