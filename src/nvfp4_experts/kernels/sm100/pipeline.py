# SPDX-License-Identifier: Apache-2.0
"""The launches of one call, for one shared expert or for routed ones.

    group_slots        routed: which rows each expert has, a row for each slot whose expert is here
    amax_partials      dynamic alone
    enter              x to codes and block scales; cells to zero. Routed, static: a row of x for each slot, under its
                       expert's scale; else every token once
    gemm, GATE_UP      x @ W1.T, x @ W3.T, clamp, SwiGLU; h quantised there (static, per_token); rows of x are gathered
    enter              dynamic, many tokens: h to codes and block scales
    gemm               h @ W2.T to y, or routed to a row of results for each slot, fp32; dynamic, few tokens: h
                       quantised on its way into the dot
    add_slots          routed: the results of a token's slots to y

No launch waits for the host, allocates, or depends on what an earlier call left behind.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...layouts.scales import swizzled_shape
from ..cuda import workspace
from ..cuda.workspace import Part
from ..dispatch import Routing
from .config import SCALE_TILE, Chip, GemmConfig, choose, choose_routed
from .enter import amax_partials, enter
from .gemm import gemm
from .slots import add_slots, group_slots

PARTIALS = 256
_AMAX_BLOCK = 2048
_FEW_TOKENS, _FEW_ROWS = 32, 16  # with 32 rows of an expert the kernel spills on sm_100
_SLOTS_BLOCK, _SUM_BLOCK, _SUM_SLOTS = 2048, 1024, 4
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
        tokens: T, rows of x, or more.
        multiprocessors: of the device.
        slots: T * k, of routed experts; 0 for a shared one.
    """

    chip: Chip
    mode: str
    hidden: int
    intermediate: int
    groups: int
    tokens: int
    multiprocessors: int
    slots: int = 0

    @property
    def rows(self) -> int:
        """The most rows that all groups have together."""
        return self.slots or self.tokens

    @functools.cached_property
    def gathers(self) -> bool:
        """Routed, x enters once a token and the first half gathers; otherwise a row of x enters for each slot.

        Static scales are those of the slot's expert. And scales of whole tiles must lie together: where they are copied
        to tensor memory as they lie, a product overlaps with the next one, which is worth more than a smaller `enter`.
        """
        return self.slots > 0 and self.mode != "static" and self.gate_up[0].tokens < SCALE_TILE

    @property
    def x_rows(self) -> int:
        """How many rows of x enter."""
        return self.tokens if self.gathers else self.rows

    @functools.cached_property
    def gate_up(self) -> tuple[GemmConfig, int]:
        """Cut and split of the first half."""
        return self._choose(2 * self.intermediate, self.hidden)

    @functools.cached_property
    def down(self) -> tuple[GemmConfig, int]:
        """Cut and split of the second half."""
        return self._choose(self.hidden, self.intermediate)

    def _choose(self, rows: int, columns: int) -> tuple[GemmConfig, int]:
        if self.slots:
            return choose_routed(self.chip, rows, columns, self.slots, self.groups, self.multiprocessors)
        return choose(self.chip, rows, columns, self.tokens, self.multiprocessors)

    @functools.cached_property
    def quantizes_on_the_way(self) -> bool:
        """h is quantised by each tile of the second half for itself: cheaper than a launch while tokens are few."""
        return self.mode == "dynamic" and self.down[0].tokens <= (_FEW_ROWS if self.slots else _FEW_TOKENS)

    @property
    def results_follow_h(self) -> bool:
        """Routed, results of slots take the place of h in fp32, which nobody reads by then."""
        return self.slots > 0 and self.mode != "static" and not self.quantizes_on_the_way

    def blocks(self, rows: int) -> int:
        """The most blocks of `rows` rows that the groups can have together."""
        return (self.rows + min(self.groups, self.rows) * (rows - 1)) // rows

    @property
    def x_blocks(self) -> int:
        """The most tiles of scales that x has."""
        return -(-self.tokens // SCALE_TILE) if self.gathers else self.blocks(SCALE_TILE)

    @functools.cached_property
    def cells(self) -> dict[str, int]:
        """Cells that must be zero before the first half, by name."""
        first, second = self.gate_up[0], self.down[0]
        return {
            "h_amax": {"static": 0, "dynamic": self.groups, "per_token": self.rows}[self.mode],
            "gate_up_parts": self.blocks(first.tokens) * -(-2 * self.intermediate // first.rows),
            "gate_up_blocks": self.blocks(first.tokens),
            "down_parts": self.blocks(second.tokens) * -(-self.hidden // second.rows),
        }

    @functools.cached_property
    def scratch(self) -> dict[str, Part]:
        """What a call needs beside its result, by name."""
        padded = self.blocks(SCALE_TILE) * SCALE_TILE
        parts: dict[str, Part] = {
            "cells": ((sum(_rounded(n) for n in self.cells.values()),), torch.int32),
            "x_codes": ((self.x_rows, self.hidden // 2), torch.uint8),
            "x_scales": (swizzled_shape(self.x_blocks * SCALE_TILE, self.hidden // 16), torch.uint8),
        }
        if self.mode == "dynamic":
            parts["amax_partials"] = (PARTIALS,), torch.int32
        if self.mode != "static":
            parts["x_amax"] = (self.x_rows if self.mode == "per_token" else 1,), torch.int32
            if not self.results_follow_h:
                parts["h"] = (self.rows, self.intermediate), torch.float32
        if not self.quantizes_on_the_way:
            parts["h_codes"] = (self.rows, self.intermediate // 2), torch.uint8
            parts["h_scales"] = swizzled_shape(padded, self.intermediate // 16), torch.uint8
        sums = max(self._sums(*self.gate_up, 2 * self.intermediate), self._sums(*self.down, self.hidden))
        if sums:
            parts["sums"] = (sums,), torch.float32
        if self.slots:
            parts["offsets"] = (self.groups + 1,), torch.int32
            parts["row_tokens"] = parts["row_slots"] = (self.slots,), torch.int32
            columns = max(self.hidden, self.intermediate) if self.results_follow_h else self.hidden
            parts["results"] = (self.slots * columns,), torch.float32
        return parts

    def _sums(self, config: GemmConfig, split: int, rows: int) -> int:
        tiles = self.blocks(config.tokens) * -(-rows // config.rows)
        return tiles * split * config.tokens * config.rows if split > 1 else 0


@dataclass(frozen=True)
class Activations:
    """What scales activations, and where they go.

    Args:
        input_scale, hidden_scale: () or, routed, (E,) fp32, decode direction, for "static"; else None.
        limit: L of the clamp; infinity is off.
        routing: of routed experts; None for a shared one.
    """

    input_scale: Tensor | None
    hidden_scale: Tensor | None
    limit: float
    routing: Routing | None = None


def scratch_of(plan: Plan, device: torch.device) -> dict[str, Tensor]:
    """What a call needs; on a GPU valid until the next call on the current stream."""
    layout = plan.scratch
    if device.type != "cuda":
        return {name: torch.empty(shape, dtype=dtype, device=device) for name, (shape, dtype) in layout.items()}
    return dict(zip(layout, workspace.carve(device, *layout.values()), strict=True))


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
    """The layer: x (T, H) to y (T, H), of the dtype of x or, routed, any floating one.

    Args:
        x, y: contiguous; addresses that are multiples of 16, as of all tensors here but those of the routing.
        experts, activations, plan: see there. plan.tokens is T, but where T is 0: then every kernel is compiled and
            loaded, and does nothing.
        made: tensors of `plan.scratch`, in any state.
        launch: what is done with each kernel; compile.py compiles it for another machine.
    """
    made = dict(made)
    if plan.slots:
        memory, hidden, intermediate = made["results"], plan.hidden, plan.intermediate
        made["results"] = memory[: plan.slots * hidden].view(plan.slots, hidden)
        if plan.results_follow_h:
            made["h"] = memory[: plan.slots * intermediate].view(plan.slots, intermediate)
    sizes = [_rounded(count) for count in plan.cells.values()]
    cells = dict(zip(plan.cells, made["cells"].split(sizes), strict=True))
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
        mode, made, routing = self.plan.mode, self.made, self.activations.routing
        if routing is not None:
            self.group(routing)
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
        if routing is not None:
            self.add(routing)

    def group(self, routing: Routing) -> None:
        """Slots to the rows of each expert."""
        made, indices = self.made, routing.indices
        outputs = made["offsets"], made["row_tokens"], made["row_slots"]
        options = {"BLOCK": _SLOTS_BLOCK, "num_warps": 8, **_OPTIONS}
        sizes = indices.numel(), indices.shape[1]
        self.launch(group_slots, (self.plan.groups,), indices, *outputs, *sizes, **options)

    def add(self, routing: Routing) -> None:
        """Results of slots to y."""
        plan, indices = self.plan, routing.indices
        self.launch(
            add_slots,
            (max(1, len(indices)), -(-plan.hidden // _SUM_BLOCK)),
            self.made["results"],
            indices,
            self.y,
            len(indices),
            indices.shape[1],
            EXPERTS=plan.groups,
            COLUMNS=plan.hidden,
            BLOCK=_SUM_BLOCK,
            AT_A_TIME=_SUM_SLOTS,
            num_warps=4,
            **_OPTIONS,
        )

    def enter(self, values: Tensor, name: str, source: Tensor | None, amax: Tensor | None) -> None:
        """x or h to codes and block scales; with x, cells to zero."""
        plan, made, of_x = self.plan, self.made, name == "x"
        columns = values.shape[1]
        per_token = plan.mode == "per_token"
        rows, width = (4, 512) if per_token else (32, 128)
        steps = -(-columns // width) if per_token else 1
        blocks = plan.x_blocks if of_x else plan.blocks(SCALE_TILE)
        by_token = of_x and plan.gathers
        self.launch(
            enter,
            (blocks * (SCALE_TILE // rows), -(-columns // (width * steps))),
            values,
            made.get("row_tokens") if of_x and not by_token else None,
            None if by_token else made.get("offsets"),
            source,
            amax,
            made[f"{name}_codes"],
            made[f"{name}_scales"],
            made["cells"] if of_x else None,
            made["cells"].numel() if of_x else 0,
            self.y.shape[0],
            K=columns,
            GROUPS=1 if by_token else plan.groups,
            MODE=plan.mode,
            PER_GROUP=self.per_group(of_x),
            PARTIALS=PARTIALS if of_x else 1,
            ROWS=rows,
            COLUMNS=width,
            STEPS=steps,
            num_warps=4,
            **_OPTIONS,
        )

    def gemm(self, a_source: Tensor | None, h_source: Tensor | None, gate_up: bool) -> None:
        """One half of the layer."""
        plan, made, experts, routing = self.plan, self.made, self.experts, self.activations.routing
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
            made.get("h") if gate_up else made.get("results", self.y),
            made.get("h_codes") if gate_up else None,
            made.get("h_scales") if gate_up else None,
            h_source,
            made["sums"] if split > 1 else None,
            self.cells["gate_up_parts" if gate_up else "down_parts"] if split > 1 else None,
            self.cells["gate_up_blocks"] if gate_up else None,
            made.get("offsets"),
            made["row_tokens"] if gate_up and plan.gathers else None,
            made.get("row_slots"),
            None if routing is None else routing.weights,
            int(routing is not None and (routing.weighting == "before_down") == gate_up),
            self.y.shape[0],
            split,
            self.activations.limit,
            N=rows,
            K=columns,
            GROUPS=plan.groups,
            MODE=plan.mode,
            A_PER_GROUP=self.per_group(gate_up),
            H_PER_GROUP=self.per_group(False),
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

    def per_group(self, of_x: bool) -> bool:
        """Whether the global scale of x or of h is one for each expert."""
        return self.plan.slots > 0 and (self.plan.mode == "static" or (self.plan.mode == "dynamic" and not of_x))


def _rounded(cells: int) -> int:
    return math.ceil(cells / _CELL_STEP) * _CELL_STEP
