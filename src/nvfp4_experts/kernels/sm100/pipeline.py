# SPDX-License-Identifier: Apache-2.0
"""The launches of one call, for one shared expert or for groups of tokens with an expert each.

    amax_partials      dynamic alone
    enter              x to codes and block scales; cells to zero
    gemm, GATE_UP      x @ W1.T, x @ W3.T, clamp, SwiGLU; h quantised there (static, per_token)
    enter              dynamic, many tokens: h to codes and block scales
    gemm               h @ W2.T to y; dynamic, few tokens: h quantised on its way into the dot

No launch waits for the host, allocates, or depends on what an earlier call left behind.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...layouts.scales import swizzled_shape
from ..cuda.workspace import Part
from .config import SCALE_TILE, Chip, GemmConfig, choose
from .enter import amax_partials, enter
from .gemm import gemm

PARTIALS = 256
_AMAX_BLOCK = 2048
_CELL_STEP = 64  # cells of one kind begin at a multiple of it: pointers keep their alignment, kernels their kind
OPTIONS = {"enable_fp_fusion": False}  # numbers.py needs each operation rounded by itself


@dataclass(frozen=True)
class Experts:
    """Packed weights of E experts, all contiguous.

    Args:
        gate_up: (E, 2I, H/2) uint8 codes, gate and up interleaved by 8 rows.
        gate_up_scales: their block scales, each expert swizzled by itself.
        gate_up_global_scales: (E, 2) fp32, of gate and of up.
        down, down_scales, down_global_scales: (E, H, I/2), its block scales, (E,) fp32.
    """

    gate_up: Tensor
    gate_up_scales: Tensor
    gate_up_global_scales: Tensor
    down: Tensor
    down_scales: Tensor
    down_global_scales: Tensor

    @property
    def groups(self) -> int:
        """E."""
        return self.gate_up.shape[0]

    @property
    def hidden(self) -> int:
        """H."""
        return self.down.shape[1]

    @property
    def intermediate(self) -> int:
        """I."""
        return self.gate_up.shape[1] // 2


@dataclass(frozen=True)
class Plan:
    """How one call is cut up.

    Args:
        chip: what it runs on.
        mode: where activations' global scales come from, one of dispatch.ACTIVATION_SCALES.
        hidden, intermediate, groups, tokens: H, I, E, and T rows of x, gathered.
        multiprocessors: of the device.
    """

    chip: Chip
    mode: str
    hidden: int
    intermediate: int
    groups: int
    tokens: int
    multiprocessors: int

    @property
    def gate_up(self) -> tuple[GemmConfig, int]:
        """Cut and split of the first half."""
        return choose(self.chip, 2 * self.intermediate, self.hidden, self.tokens, self.multiprocessors)

    @property
    def down(self) -> tuple[GemmConfig, int]:
        """Cut and split of the second half."""
        return choose(self.chip, self.hidden, self.intermediate, self.tokens, self.multiprocessors)

    @property
    def quantizes_on_the_way(self) -> bool:
        """h is quantised by each tile of the second half for itself: cheaper than a launch while tokens are few."""
        return self.mode == "dynamic" and self.down[0].swap

    def blocks(self, rows: int) -> int:
        """The most blocks of `rows` rows that the groups can have together."""
        return (self.tokens + self.groups * (rows - 1)) // rows

    def cells(self) -> dict[str, int]:
        """Cells that must be zero before the first half, by name."""
        first, second = self.gate_up[0], self.down[0]
        return {
            "h_amax": self.tokens if self.mode == "per_token" else 1,
            "gate_up_parts": self.blocks(first.tokens) * -(-2 * self.intermediate // first.rows),
            "gate_up_blocks": self.blocks(first.tokens),
            "down_parts": self.blocks(second.tokens) * -(-self.hidden // second.rows),
        }

    def scratch(self) -> dict[str, Part]:
        """What a call needs beside its result, by name."""
        padded = self.blocks(SCALE_TILE) * SCALE_TILE
        amax = self.tokens if self.mode == "per_token" else 1
        parts: dict[str, Part] = {
            "cells": ((sum(_rounded(n) for n in self.cells().values()),), torch.int32),
            "x_amax": ((amax,), torch.int32),
            "x_codes": ((self.tokens, self.hidden // 2), torch.uint8),
            "x_scales": (swizzled_shape(padded, self.hidden // 16), torch.uint8),
        }
        if self.mode == "dynamic":
            parts["amax_partials"] = (PARTIALS,), torch.int32
        if self.mode != "static":
            parts["h"] = (self.tokens, self.intermediate), torch.float32
        if not self.quantizes_on_the_way:
            parts["h_codes"] = (self.tokens, self.intermediate // 2), torch.uint8
            parts["h_scales"] = swizzled_shape(padded, self.intermediate // 16), torch.uint8
        sums = max(self._sums(*self.gate_up, 2 * self.intermediate), self._sums(*self.down, self.hidden))
        if sums:
            parts["sums"] = (sums,), torch.float32
        return parts

    def _sums(self, config: GemmConfig, split: int, rows: int) -> int:
        tiles = self.blocks(config.tokens) * -(-rows // config.rows)
        return tiles * split * config.tokens * config.rows if split > 1 else 0


@dataclass(frozen=True)
class Activations:
    """Where tokens come from and what scales them.

    Args:
        input_scale, hidden_scale: () or (E,) fp32, decode direction, for "static"; else None.
        limit: L of the clamp; infinity is off.
        offsets: (E + 1,) int32: group e has rows offsets[e] .. offsets[e + 1] of the result; None for one group.
        gather: (T,) int32, the row of x of each row of the result; None: the same row.
    """

    input_scale: Tensor | None
    hidden_scale: Tensor | None
    limit: float
    offsets: Tensor | None = None
    gather: Tensor | None = None


def run(x: Tensor, experts: Experts, activations: Activations, plan: Plan, made: Mapping[str, Tensor], y: Tensor) -> None:
    """The layer: x (T', H) to y (plan.tokens, H), dtype of y; `made`: tensors of `plan.scratch()`."""
    cells = dict(zip(plan.cells(), made["cells"].split([_rounded(n) for n in plan.cells().values()]), strict=True))
    x_source = activations.input_scale if plan.mode == "static" else made["x_amax"]
    h_source = activations.hidden_scale if plan.mode == "static" else cells["h_amax"]
    if plan.mode == "dynamic":
        amax_partials[(PARTIALS,)](x, made["amax_partials"], x.numel(), BLOCK=_AMAX_BLOCK, num_warps=4, **OPTIONS)
    _enter(x, plan, activations, x_source, made, "x", cells=made["cells"])
    _gemm(plan, activations, plan.gate_up, experts, made, cells, x_source, h_source, y=None)
    if plan.mode == "dynamic" and not plan.quantizes_on_the_way:
        _enter(made["h"], plan, activations, h_source, made, "h")
    _gemm(plan, activations, plan.down, experts, made, cells, h_source, None, y)


def _enter(
    values: Tensor,
    plan: Plan,
    activations: Activations,
    source: Tensor | None,
    made: Mapping[str, Tensor],
    name: str,
    cells: Tensor | None = None,
) -> None:
    """values (rows, K) to codes and scales; `cells`: what to set to zero, for x alone."""
    constants = enter_constants(plan, values.shape[1], of_x=name == "x", scale_per_group=_per_group(source))
    if plan.mode == "dynamic" and name == "x":
        source = made["amax_partials"]
    runs = -(-values.shape[1] // (constants["COLUMNS"] * constants["STEPS"]))
    enter[plan.blocks(SCALE_TILE) * (SCALE_TILE // constants["ROWS"]), runs](
        values,
        activations.gather if name == "x" else None,
        activations.offsets,
        source,
        made["x_amax"] if name == "x" and plan.mode != "static" else None,
        made[f"{name}_codes"],
        made[f"{name}_scales"],
        cells,
        0 if cells is None else cells.numel(),
        plan.tokens,
        **constants,
        **OPTIONS,
    )


def _gemm(
    plan: Plan,
    activations: Activations,
    cut: tuple[GemmConfig, int],
    experts: Experts,
    made: Mapping[str, Tensor],
    cells: Mapping[str, Tensor],
    a_source: Tensor | None,
    h_source: Tensor | None,
    y: Tensor | None,
) -> None:
    """One half: the first where y is None."""
    config, split = cut
    gate_up = y is None
    quantize_a = plan.quantizes_on_the_way and not gate_up
    a: Any = made["h"] if quantize_a else made["x_codes" if gate_up else "h_codes"]
    rows = 2 * plan.intermediate if gate_up else plan.hidden
    units = plan.blocks(config.tokens) * -(-rows // config.rows) * split
    grid = (min(units, 2 * plan.multiprocessors),)
    gemm[grid](
        a,
        None if quantize_a else made["x_scales" if gate_up else "h_scales"],
        a_source,
        experts.gate_up if gate_up else experts.down,
        experts.gate_up_scales if gate_up else experts.down_scales,
        experts.gate_up_global_scales if gate_up else experts.down_global_scales,
        made.get("h") if gate_up else y,
        made.get("h_codes") if gate_up else None,
        made.get("h_scales") if gate_up else None,
        h_source,
        made["sums"] if split > 1 else None,
        cells["gate_up_parts" if gate_up else "down_parts"] if split > 1 else None,
        cells["gate_up_blocks"] if gate_up else None,
        activations.offsets,
        plan.tokens,
        split,
        activations.limit,
        **gemm_constants(plan, gate_up, scale_per_group=_per_group(a_source)),
        num_warps=config.warps,
        num_stages=config.stages,
        **OPTIONS,
    )


def enter_constants(plan: Plan, columns: int, of_x: bool, scale_per_group: bool = False) -> dict[str, Any]:
    """What enter.py's kernel is compiled with, for x or for h."""
    per_token = plan.mode == "per_token"
    width = 512 if per_token else 128
    return {
        "K": columns,
        "GROUPS": plan.groups,
        "MODE": plan.mode,
        "SCALE_PER_GROUP": scale_per_group,
        "PARTIALS": PARTIALS if of_x else 1,
        "ROWS": 4 if per_token else 32,
        "COLUMNS": width,
        "STEPS": -(-columns // width) if per_token else 1,
    }


def gemm_constants(plan: Plan, gate_up: bool, scale_per_group: bool = False) -> dict[str, Any]:
    """What gemm.py's kernel is compiled with, for a half."""
    config, split = plan.gate_up if gate_up else plan.down
    return {
        "N": 2 * plan.intermediate if gate_up else plan.hidden,
        "K": plan.hidden if gate_up else plan.intermediate,
        "GROUPS": plan.groups,
        "MODE": plan.mode,
        "SCALE_PER_GROUP": scale_per_group,
        "GATE_UP": gate_up,
        "QUANTIZE_A": plan.quantizes_on_the_way and not gate_up,
        "TOKENS": config.tokens,
        "ROWS": config.rows,
        "COLUMNS": config.columns,
        "SPLIT": split > 1,
        "SWAP": config.swap,
        "NATIVE": plan.chip.native,
    }


def _per_group(source: Tensor | None) -> bool:
    """A static scale for each expert; amax cells are integers."""
    return source is not None and source.ndim == 1 and source.is_floating_point()


def _rounded(cells: int) -> int:
    return math.ceil(cells / _CELL_STEP) * _CELL_STEP
