# SPDX-License-Identifier: Apache-2.0
"""The backend that runs anywhere: plain torch, weights kept packed, decoded a tile of output rows at a time.

    resident   0.5625 bytes per weight (a nibble, and an e4m3 scale per 16)
    scratch    decoded tiles of TILE_VALUES weights (one of gate and one of up, or one of down), their fp32 sums
               (T, rows), h (T, I)

Weights are stacked (gate rows, then up rows) and otherwise as in a checkpoint. Floor of a call: 0.5625 * 3HI bytes
read, 2 * T * 3HI flops.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..formats.codes import decode_blocks
from ..formats.nvfp4 import Nvfp4Tensor
from . import tiled
from .dispatch import Call, Problem

TILE_VALUES = 1 << 20


class TorchBackend:
    """See the module docstring."""

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

    def unpack(self, weights: Mapping[Any, Tensor], hidden: int, intermediate: int) -> tuple[Nvfp4Tensor, ...]:
        codes, scale_bytes, global_scales, down_codes, down_scale_bytes, down_global_scale = weights.values()
        block_scales, down_block_scales = (b.view(torch.float8_e4m3fn) for b in (scale_bytes, down_scale_bytes))
        return (
            Nvfp4Tensor(codes[:intermediate], block_scales[:intermediate], global_scales[0]),
            Nvfp4Tensor(codes[intermediate:], block_scales[intermediate:], global_scales[1]),
            Nvfp4Tensor(down_codes, down_block_scales, down_global_scale[0]),
        )

    def prepare(self, problem: Problem, device: torch.device, max_tokens: int) -> None:
        """Build the decoding table, which the first call would otherwise do."""
        empty = torch.zeros(1, 8, dtype=torch.uint8, device=device)
        decode_blocks(empty, empty[:, :1].view(torch.float8_e4m3fn), tiled.operand_dtype(device))

    def scratch_bytes(self, device: torch.device) -> int:
        return 0  # calls take their temporaries from torch's allocator and give them back

    def shared_expert(self, x: Tensor, weights: list[Tensor], call: Call, out: Tensor) -> None:
        size = weights[0].shape[0] // 2
        gate, up, down = self.unpack(dict(enumerate(weights)), x.shape[1], size)
        tiled.shared_expert(x, tiled.tiles_of(gate, up, down, TILE_VALUES), size, call, out)


BACKEND = TorchBackend()
