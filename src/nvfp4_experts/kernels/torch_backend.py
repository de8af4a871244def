# SPDX-License-Identifier: Apache-2.0
"""The backend that runs anywhere: plain torch, weights kept packed, decoded a tile of output rows at a time.

    resident   0.5625 bytes per weight (a nibble, and an e4m3 scale per 16)
    scratch    decoded tiles of TILE_VALUES weights (one of gate and one of up, or one of down), their fp32 sums
               (T, rows), h (T, I); for routed experts also x as it enters and a row (H,) in fp32 per slot

Weights lie as plain.py says. Floor of a call: 0.5625 * 3HI bytes
read, 2 * T * 3HI flops.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats.codes import decode_blocks
from . import tiled
from .dispatch import Call, Problem
from .one_by_one import OneByOne
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

    @torch.no_grad()
    def shared_expert(self, x: Tensor, weights: list[Tensor], call: Call, out: Tensor) -> None:
        size = weights[0].shape[0] // 2
        gate, up, down = self.unpack(dict(enumerate(weights)), x.shape[1], size)
        tiled.shared_expert(x, tiled.tiles_of(gate, up, down, TILE_VALUES), size, call, out)


class TorchRoutedExperts(OneByOne):
    """Routed experts, one hit expert after the other: see one_by_one.py."""

    def enter(self, x: Tensor, call: Call, static_scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return tiled.enter(x, call, static_scale)

    def take(self, entered: tuple[Tensor, Tensor | None], token: Tensor) -> tuple[Tensor, Tensor | None]:
        values, scale = entered
        return values[token], scale if scale is None or scale.ndim == 0 else scale[token]

    def expert(
        self,
        entered: tuple[Tensor, Tensor | None],
        weights: dict[int, Tensor],
        call: Call,
        factors: Tensor | None,
    ) -> Tensor:
        (values, scale), size = entered, weights[0].shape[0] // 2
        gate, up, down = self.one.unpack(weights, values.shape[1], size)
        tiles = tiled.tiles_of(gate, up, down, TILE_VALUES)
        rows = torch.empty(values.shape, device=values.device)
        tiled.one_expert(values, scale, tiles, size, call, rows, factors)
        return rows


BACKEND = TorchBackend()
ROUTED = TorchRoutedExperts(BACKEND)
