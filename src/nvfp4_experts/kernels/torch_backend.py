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
from .dispatch import Call, Problem, Routing
from .one_by_one import StackedExperts, add_slots, hit_experts, of_expert
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


class TorchRoutedExperts(StackedExperts):
    """Routed experts, one hit expert after the other: see one_by_one.py."""

    @torch.no_grad()
    def routed_experts(self, x: Tensor, weights: list[Tensor], routing: Routing, call: Call, out: Tensor) -> None:
        (tokens, hidden), top_k = x.shape, routing.indices.shape[1]
        size = weights[0].shape[1] // 2
        factors = routing.weights.view(-1, 1)
        # Static scales of x are an expert's own; by any other rule x enters once, whole, for all experts.
        static = call.activations == "nvfp4" and call.activation_scale == "static"
        entered = None if static else tiled.enter(x, call, None)
        rows = torch.zeros(tokens * top_k, hidden, device=x.device)
        for expert, slots in hit_experts(routing, len(weights[0])):
            own, token = of_expert(call, expert), slots // top_k
            values, scale = _take(entered, token) if entered else tiled.enter(x[token], own, own.input_scale)
            gate, up, down = self.one.unpack({i: w[expert] for i, w in enumerate(weights)}, hidden, size)
            tiles = tiled.tiles_of(gate, up, down, TILE_VALUES)
            before = factors[slots] if routing.weighting == "before_down" else None
            result = torch.empty(len(slots), hidden, device=x.device)
            tiled.one_expert(values, scale, tiles, size, own, result, before)
            rows[slots] = result if before is not None else result * factors[slots]
        add_slots(rows.view(tokens, top_k, hidden), out)


def _take(entered: tuple[Tensor, Tensor | None], token: Tensor) -> tuple[Tensor, Tensor | None]:
    """Rows of what `tiled.enter` gave, in the order of `token`."""
    values, scale = entered
    return values[token], scale if scale is None or scale.ndim == 0 else scale[token]


BACKEND = TorchBackend()
ROUTED = TorchRoutedExperts(BACKEND)
