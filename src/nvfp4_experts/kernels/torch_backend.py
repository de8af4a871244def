# SPDX-License-Identifier: Apache-2.0
"""The backend that runs anywhere: plain torch, weights kept packed, decoded a tile of output rows at a time.

    resident   0.5625 bytes per weight (a nibble, and an e4m3 scale per 16)
    scratch    one decoded tile of at most TILE_VALUES weights, gate and up of the tile (T, rows) fp32, h (T, I)

Every decoded value (e2m1 * block scale) and every entered activation is exact in bf16 (`formats.codes.decode_blocks`
proves it), so the operands are bf16 where the device multiplies bf16 into an fp32 result and fp32 elsewhere: the
products are the same. Floor of a call: 0.5625 * 3HI bytes read, 2 * T * 3HI flops.

The sum over k is the vendor library's; it may depend on T and so may the last bit of a result.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..formats.activations import quantize_activation, quantize_fp8_rows
from ..formats.codes import decode_blocks
from ..formats.nvfp4 import Nvfp4Tensor
from .dispatch import Call, Problem
from .target import target_of

TILE_VALUES = 1 << 20


def _row_tiles(rows: int, columns: int) -> Iterator[slice]:
    step = max(1, TILE_VALUES // columns)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _operand_dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if target_of(device).has_bf16_matmul_with_fp32_result else torch.float32


def enter(x: Tensor, call: Call, static_scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """x (T, K) as operand values and their scale, () or (T, 1); None stands for 1."""
    dtype = _operand_dtype(x.device)
    if call.activations == "bf16":
        return x.to(torch.bfloat16).to(dtype), None
    if call.activations == "fp8":
        values, scale = quantize_fp8_rows(x)
        return values.to(dtype), scale
    q = quantize_activation(x, call.activation_scale, static_scale if call.activation_scale == "static" else None)
    return decode_blocks(q.codes, q.block_scales, dtype), q.global_scale


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """a (T, K) @ b (N, K).T with an fp32 result, never rounded on the way."""
    if a.dtype == torch.float32:
        return a @ b.T
    return torch.mm(a, b.T, out_dtype=torch.float32)


def _linear(
    values: Tensor,
    scale: Tensor | None,
    codes: Tensor,
    block_scales: Tensor,
    global_scale: Tensor,
    activations: str,
) -> Tensor:
    """(T, K) values times one tile of weight rows (N, K): (T, N) fp32, scales applied to the sum."""
    tile = decode_blocks(codes, block_scales, values.dtype)
    if activations == "fp8":
        rounded, row_scale = quantize_fp8_rows(tile)
        tile, global_scale = rounded.to(values.dtype), row_scale[:, 0] * global_scale
    return _matmul(values, tile).mul_(global_scale if scale is None else scale * global_scale)


def _swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    if limit > 0:
        gate, up = gate.clamp_(max=limit), up.clamp_(-limit, limit)
    return torch.nn.functional.silu(gate).mul_(up)


def intermediate(
    values: Tensor,
    scale: Tensor | None,
    weights: list[Tensor],
    swiglu_limit: float,
    activations: str,
    h_dtype: torch.dtype,
) -> Tensor:
    """L1 and SwiGLU: entered values (T, H) to h (T, I) of `h_dtype`.

    weights: codes (2I, H/2) and block scale bytes (2I, H/16), gate's rows then up's; global scales (2,), gate's, up's.
    """
    codes, scale_bytes, global_scales = weights
    block_scales, size = scale_bytes.view(torch.float8_e4m3fn), codes.shape[0] // 2
    h = torch.empty(values.shape[0], size, dtype=h_dtype, device=values.device)
    for rows in _row_tiles(size, values.shape[1]):
        gate, up = (
            _linear(values, scale, codes[half][rows], block_scales[half][rows], global_scales[index], activations)
            for index, half in enumerate((slice(0, size), slice(size, None)))
        )
        h[:, rows] = _swiglu(gate, up, swiglu_limit)
    return h


class TorchBackend:
    """See the module docstring; weights are stacked (gate rows, then up rows) and otherwise as in a checkpoint."""

    name = "torch"

    def refusal(self, problem: Problem) -> str | None:
        return None

    def pack(self, gate: Nvfp4Tensor, up: Nvfp4Tensor, down: Nvfp4Tensor) -> dict[str, Tensor]:
        return {
            "gate_up_codes": torch.cat((gate.codes, up.codes)),
            "gate_up_block_scales": torch.cat((gate.block_scales.view(torch.uint8), up.block_scales.view(torch.uint8))),
            "gate_up_global_scales": torch.stack((gate.global_scale, up.global_scale)),
            "down_codes": down.codes.contiguous(),
            "down_block_scales": down.block_scales.view(torch.uint8).contiguous(),
            "down_global_scale": down.global_scale.reshape(1),
        }

    def unpack(self, weights: dict[str, Tensor]) -> tuple[Nvfp4Tensor, Nvfp4Tensor, Nvfp4Tensor]:
        codes, scale_bytes, global_scales, down_codes, down_scale_bytes, down_global_scale = weights.values()
        block_scales, down_block_scales = (b.view(torch.float8_e4m3fn) for b in (scale_bytes, down_scale_bytes))
        size = codes.shape[0] // 2
        return (
            Nvfp4Tensor(codes[:size], block_scales[:size], global_scales[0]),
            Nvfp4Tensor(codes[size:], block_scales[size:], global_scales[1]),
            Nvfp4Tensor(down_codes, down_block_scales, down_global_scale[0]),
        )

    def shared_expert(self, x: Tensor, weights: list[Tensor], call: Call, out: Tensor) -> None:
        down_codes, down_scale_bytes, down_global_scale = weights[3:]
        down_block_scales = down_scale_bytes.view(torch.float8_e4m3fn)
        values, scale = enter(x, call, call.input_scale)
        # h is quantised from fp32; in bf16 it is rounded once, on the way into this buffer.
        h_dtype = torch.bfloat16 if call.activations == "bf16" else torch.float32
        h = intermediate(values, scale, weights[:3], call.swiglu_limit, call.activations, h_dtype)
        values, scale = enter(h, call, call.hidden_scale)
        for rows in _row_tiles(out.shape[1], h.shape[1]):
            out[:, rows] = _linear(
                values, scale, down_codes[rows], down_block_scales[rows], down_global_scale, call.activations
            )


BACKEND = TorchBackend()
