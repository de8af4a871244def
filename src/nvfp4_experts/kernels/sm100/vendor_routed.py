# SPDX-License-Identifier: Apache-2.0
"""Routed experts on Blackwell through a vendor's grouped block-scaled GEMM; everything else is plain torch.

    rows     one a slot, sorted by expert; those of slots that are not here come last and no group has them
    sums     codes of rows * block scales  @  codes of the row's expert * block scales         without global scales
    scales   gate's, up's and down's of each row's expert, and of x and h, on the sums, in fp32, in torch

Nothing is read on the host. Block scales of rows lie in 128x4 order, each group padded to 128 rows by itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import UnsupportedError
from ...formats.activations import (
    Nvfp4Activation,
    global_scales_from_static,
    global_scales_of,
    quantize_activation,
    quantize_under,
)
from ...layouts.scales import swizzle_scales
from ..dispatch import Call, Problem, Routing
from ..one_by_one import StackedExperts, add_slots
from .config import SCALE_TILE
from .vendor import swiglu


@dataclass(frozen=True)
class Rows:
    """Slots sorted by expert, R = T * k of them.

    Args:
        slots: (R,) int64: of each row.
        group: (R,) int64: the row's expert, E where that is not here.
        expert: the same with another expert in place of E.
        ends: (E,) int32: the row after an expert's last.
        scale_rows: (R,) int64: of the row's block scales.
        padded: how many rows of block scales there are room for.
    """

    slots: Tensor
    group: Tensor
    expert: Tensor
    ends: Tensor
    scale_rows: Tensor
    padded: int

    @classmethod
    def of(cls, indices: Tensor, experts: int) -> Rows:
        """From indices (T, k)."""
        flat = indices.flatten().long()
        here = (flat >= 0) & (flat < experts)
        group, slots = torch.where(here, flat, experts).sort(stable=True)
        ends = torch.searchsorted(group, torch.arange(experts + 1, device=flat.device), right=True)
        begins = torch.nn.functional.pad(ends[:-1], (1, 0))
        padded = (ends - begins + SCALE_TILE - 1) // SCALE_TILE * SCALE_TILE
        places = padded.cumsum(0) - padded - begins
        room = -(-(len(flat) + (experts + 1) * (SCALE_TILE - 1)) // SCALE_TILE) * SCALE_TILE
        position = torch.arange(len(flat), device=flat.device)
        expert = group.clamp(max=experts - 1)
        return cls(slots, group, expert, ends[:-1].int(), position + places[group], room)

    def swizzled(self, block_scales: Tensor) -> Tensor:
        """Block scales (R, K/16) of rows where the GEMM reads them."""
        linear = torch.zeros(self.padded, block_scales.shape[1], dtype=torch.uint8, device=block_scales.device)
        linear[self.scale_rows] = block_scales.view(torch.uint8)
        return swizzle_scales(linear)


class VendorRoutedExperts(StackedExperts):
    """See the module docstring; a vendor is `missing` and `multiply`."""

    def missing(self, problem: Problem) -> str | None:
        """What the vendor's grouped GEMM lacks here, as a clause; None if nothing."""
        raise NotImplementedError

    def multiply(self, a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, ends: Tensor) -> Tensor:
        """(R, N) fp32 sums of codes (R, K/2) and (E, N, K/2) uint8 under swizzled block scales.

        Expert e multiplies the rows from ends[e - 1] to ends[e]; rows after the last end may hold anything.
        """
        raise NotImplementedError

    def refusal(self, problem: Problem) -> str | None:
        return self.one.refusal(problem) or self.missing(problem)

    def prepare(self, problem: Problem, device: torch.device, max_tokens: int) -> None:
        """Multiply zeros of one token: whether this build of the library has the GEMM shows in a product alone.

        Raises:
            UnsupportedError: it has not.
        """
        rows = columns = 128
        codes = torch.zeros(1, rows, columns // 2, dtype=torch.uint8, device=device)
        scales = torch.zeros(1, rows, columns // 16, dtype=torch.uint8, device=device)
        try:
            self.multiply(codes[0, :1], scales[0], codes, scales, torch.ones(1, dtype=torch.int32, device=device))
        except RuntimeError as problem_found:
            way_out = "use 'sm100', or another build"
            raise UnsupportedError(
                f"backend {self.name!r}", "needs its GEMM", problem_found, way_out
            ) from problem_found

    def routed_experts(self, x: Tensor, weights: list[Tensor], routing: Routing, call: Call, out: Tensor) -> None:
        gate_up, gate_up_scales, global_scales, down, down_scales, down_global_scale = weights
        (tokens, top_k), experts = routing.indices.shape, len(gate_up)
        rows = Rows.of(routing.indices, experts)
        factors = routing.weights.flatten()[rows.slots, None]
        gate_scale, up_scale, down_scale = torch.cat((global_scales, down_global_scale), 1)[rows.expert].split(1, 1)

        q = self._enter_x(x, rows, top_k, call)
        sums = self.multiply(q.codes, rows.swizzled(q.block_scales), gate_up, gate_up_scales, rows.ends)
        h = swiglu(sums, q.global_scale * gate_scale, q.global_scale * up_scale, call.clamp)
        if routing.weighting == "before_down":
            h = h * factors
        q = self._enter_h(h, rows, experts, call)
        sums = self.multiply(q.codes, rows.swizzled(q.block_scales), down, down_scales, rows.ends)
        y = sums * (q.global_scale * down_scale)
        if routing.weighting == "after_down":
            y = y * factors
        results = torch.empty_like(y)
        results[rows.slots] = torch.where((rows.group < experts)[:, None], y, 0.0)
        add_slots(results.view(tokens, top_k, -1), out)

    def _enter_x(self, x: Tensor, rows: Rows, top_k: int, call: Call) -> Nvfp4Activation:
        """Rows of x in NVFP4, their scales () or (R, 1)."""
        token = rows.slots // top_k
        if call.activation_scale == "static":
            assert call.input_scale is not None
            return quantize_under(x[token], *_scales_of_rows(call.input_scale, rows))
        q = quantize_activation(x, call.activation_scale)
        return Nvfp4Activation(
            q.codes[token], q.block_scales[token], q.global_scale[token] if q.global_scale.ndim else q.global_scale
        )

    def _enter_h(self, h: Tensor, rows: Rows, experts: int, call: Call) -> Nvfp4Activation:
        """h in NVFP4, its scales (R, 1)."""
        if call.activation_scale == "static":
            assert call.hidden_scale is not None
            return quantize_under(h, *_scales_of_rows(call.hidden_scale, rows))
        if call.activation_scale == "per_token":
            return quantize_activation(h, "per_token")
        # As integers, so that NaN is the largest.
        amax = h.abs().amax(1).view(torch.int32)
        largest = torch.zeros(experts + 1, dtype=torch.int32, device=h.device).scatter_reduce_(
            0, rows.group, amax, "amax"
        )
        return quantize_under(h, *global_scales_of(largest.view(torch.float32)[rows.group, None]))


def _scales_of_rows(static: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """Global scales (g, s), (R, 1) each, from those of the experts, (E,)."""
    g, s = global_scales_from_static(static)
    return g[rows.expert, None], s[rows.expert, None]
