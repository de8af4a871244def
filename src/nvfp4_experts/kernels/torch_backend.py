# SPDX-License-Identifier: Apache-2.0
"""The backend that runs anywhere: plain torch, weights kept packed, decoded a tile of output rows at a time.

    resident   0.5625 bytes per weight (a nibble, and an e4m3 scale per 16)
    scratch    decoded tiles of TILE_VALUES weights (one of gate and one of up, or one of down), their fp32 sums
               (T, rows), h (T, I)

Weights lie as plain.py says. Floor of a call: 0.5625 * 3HI bytes
read, 2 * T * 3HI flops.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats.codes import decode_blocks
from . import tiled
from .dispatch import Call, Problem
from .plain import PlainWeights

TILE_VALUES = 1 << 20


class TorchBackend(PlainWeights):
    """See the module docstring."""

    name = "torch"

    def refusal(self, problem: Problem) -> str | None:
        return None

    def prepare(self, problem: Problem, device: torch.device, max_tokens: int) -> None:
        """Build the decoding table, which the first call would otherwise do."""
        empty = torch.zeros(1, 8, dtype=torch.uint8, device=device)
        decode_blocks(empty, empty[:, :1].view(torch.float8_e4m3fn), tiled.operand_dtype(device))

    def shared_expert(self, x: Tensor, weights: list[Tensor], call: Call, out: Tensor) -> None:
        size = weights[0].shape[0] // 2
        gate, up, down = self.unpack(dict(enumerate(weights)), x.shape[1], size)
        tiled.shared_expert(x, tiled.tiles_of(gate, up, down, TILE_VALUES), size, call, out)


BACKEND = TorchBackend()
