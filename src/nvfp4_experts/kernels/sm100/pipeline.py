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
from collections.abc import Callable, Mapping
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
_FEW_TOKENS = 32
_PROGRAMS = 2  # of a GEMM, for each multiprocessor
_CELL_STEP = 64  # cells of one kind begin at a multiple of it: pointers keep their alignment, kernels their kind
# numbers.py needs each operation rounded by itself; left alone, the assembler stops at 128 or 168 registers and spills.
_OPTIONS = {"enable_fp_fusion": False, "maxnreg": 255}


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


@dataclass(frozen=True)
class Plan:
    """How one call is cut up.

    Args:
        chip: what it runs on.
        mode: where activations' global scales come from, one of dispatch.ACTIVATION_SCALES.
        hidden, intermediate, groups: H, I, E.
        tokens: T, rows of the result, or more.
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
        return self.mode == "dynamic" and self.down[0].tokens <= _FEW_TOKENS

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


Launch = Callable[..., None]


def launch_now(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Launch a kernel on the current stream of the current device."""
    kernel[grid](*arguments, **constants)


def run(
    x: Tensor,
    experts: Experts,
    activations: Activations,
    plan: Plan,
    made: Mapping[str, Tensor],
    y: Tensor,
    launch: Launch = launch_now,
) -> None:
    """The layer: x (any rows, H) to y (T, H), dtype of y.

    Args:
        x, y: contiguous; addresses that are multiples of 16, as of all tensors here.
        experts, activations, plan: see there. plan.tokens is T, but where T is 0: then every kernel is compiled and
            loaded, and does nothing.
        made: tensors of `plan.scratch()`, in any state.
        launch: what is done with each kernel; compile.py compiles it for another machine.
    """
    sizes = [_rounded(count) for count in plan.cells().values()]
    cells = dict(zip(plan.cells(), made["cells"].split(sizes), strict=True))
    _Call(experts, activations, plan, made, cells, y, launch).run(x)


@dataclass(frozen=True)
class _Call:
    """The arguments of `run`, and its launches."""

    experts: Experts
    activations: Activations
    plan: Plan
    made: Mapping[str, Tensor]
    cells: Mapping[str, Tensor]
    y: Tensor
    launch: Launch

    def run(self, x: Tensor) -> None:
        mode, made = self.plan.mode, self.made
        h_amax = self.cells["h_amax"]
        if mode == "static":
            x_source, h_source = self.activations.input_scale, self.activations.hidden_scale
            self.enter(x, "x", x_source, None)
        elif mode == "dynamic":
            x_source, h_source = made["x_amax"], h_amax
            partials = made["amax_partials"]
            options = {"BLOCK": _AMAX_BLOCK, "num_warps": 4, **_OPTIONS}
            self.launch(amax_partials, (PARTIALS,), x, partials, x.numel(), **options)
            self.enter(x, "x", partials, x_source)
        else:
            x_source, h_source = made["x_amax"], h_amax
            self.enter(x, "x", None, x_source)
        self.gemm(x_source, h_source, gate_up=True)
        if mode == "dynamic" and not self.plan.quantizes_on_the_way:
            self.enter(made["h"], "h", h_source, None)
        self.gemm(h_source, None, gate_up=False)

    def enter(self, values: Tensor, name: str, source: Tensor | None, amax: Tensor | None) -> None:
        """x or h to codes and block scales; with x, cells to zero."""
        plan, of_x = self.plan, name == "x"
        columns = values.shape[1]
        per_token = plan.mode == "per_token"
        rows, width = (4, 512) if per_token else (32, 128)
        steps = -(-columns // width) if per_token else 1
        self.launch(
            enter,
            (plan.blocks(SCALE_TILE) * (SCALE_TILE // rows), -(-columns // (width * steps))),
            values,
            self.activations.gather if of_x else None,
            self.activations.offsets,
            source,
            amax,
            self.made[f"{name}_codes"],
            self.made[f"{name}_scales"],
            self.made["cells"] if of_x else None,
            self.made["cells"].numel() if of_x else 0,
            self.y.shape[0],
            K=columns,
            GROUPS=plan.groups,
            MODE=plan.mode,
            SCALE_PER_GROUP=self._scale_per_group,
            PARTIALS=PARTIALS if of_x else 1,
            ROWS=rows,
            COLUMNS=width,
            STEPS=steps,
            num_warps=4,
            **_OPTIONS,
        )

    def gemm(self, a_source: Tensor | None, h_source: Tensor | None, gate_up: bool) -> None:
        """One half of the layer."""
        plan, made, experts = self.plan, self.made, self.experts
        config, split = plan.gate_up if gate_up else plan.down
        rows, columns = (2 * plan.intermediate, plan.hidden) if gate_up else (plan.hidden, plan.intermediate)
        name = "x" if gate_up else "h"
        quantize_a = plan.quantizes_on_the_way and not gate_up
        units = plan.blocks(config.tokens) * -(-rows // config.rows) * split
        weights = (
            (experts.gate_up, experts.gate_up_scales, experts.gate_up_global_scales)
            if gate_up
            else (experts.down, experts.down_scales, experts.down_global_scales)
        )
        self.launch(
            gemm,
            (min(units, _PROGRAMS * plan.multiprocessors),),
            made["h"] if quantize_a else made[f"{name}_codes"],
            None if quantize_a else made[f"{name}_scales"],
            a_source,
            *weights,
            made.get("h") if gate_up else self.y,
            made.get("h_codes") if gate_up else None,
            made.get("h_scales") if gate_up else None,
            h_source,
            made["sums"] if split > 1 else None,
            self.cells["gate_up_parts" if gate_up else "down_parts"] if split > 1 else None,
            self.cells["gate_up_blocks"] if gate_up else None,
            self.activations.offsets,
            self.y.shape[0],
            split,
            self.activations.limit,
            N=rows,
            K=columns,
            GROUPS=plan.groups,
            MODE=plan.mode,
            SCALE_PER_GROUP=self._scale_per_group,
            GATE_UP=gate_up,
            QUANTIZE_A=quantize_a,
            TOKENS=config.tokens,
            ROWS=config.rows,
            COLUMNS=config.columns,
            SPLIT=split > 1,
            SWAP=config.swap,
            NATIVE=plan.chip.native,
            num_warps=config.warps,
            num_stages=config.stages,
            **_OPTIONS,
        )

    @property
    def _scale_per_group(self) -> bool:
        """Static scales are one for each expert."""
        scale = self.activations.input_scale
        return scale is not None and scale.ndim == 1


def _rounded(cells: int) -> int:
    return math.ceil(cells / _CELL_STEP) * _CELL_STEP
