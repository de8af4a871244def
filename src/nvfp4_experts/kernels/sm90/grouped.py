# SPDX-License-Identifier: Apache-2.0
"""Routed experts on Hopper, any number of tokens: gemm.cu over rows that lie expert by expert.

    group.cu          slots -> rows, expert by expert; tiles of rows
    enter_rows.cu     x -> a row for each slot: bf16, or NVFP4 values and their scale    (fp8: fp8.cu, e4m3 and a scale)
    gemm.cu           rows @ W1.T, rows @ W3.T, clamp, SwiGLU, routing weight -> h     (static: quantised there)
    enter_rows.cu     nvfp4 dynamic and per_token: h, fp32, to values and scale          (fp8: fp8.cu, h in bf16)
    gemm.cu           h @ W2.T -> fp32 rows
    combine.cu        each token's rows, in the order of its slots -> y

Operands and sums are those of kernels/reference.py, but that with fp8 h is rounded to bf16 before it enters, and the
tensor cores keep 13 fractional bits of a running sum. Nothing is read by the host. Scratch: for each slot of a call
what enters both GEMMs, and an fp32 row.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...layouts.fragments import COLUMNS
from ..cuda.workspace import Part, carve
from ..dispatch import Call, Routing
from . import fp8
from .compile import compile_all, launch_kernel, load_kernel
from .config import GemmConfig
from .gemm import (
    BF16,
    ENTER_THREADS,
    ENTER_VALUES,
    NVFP4,
    OUT,
    SCALE_OF_ALL,
    SCALE_OF_EXPERT,
    SCALE_OF_TOKEN,
    Groups,
    amax_partials,
    enter_kernel,
    gemm_kernel,
    macros_of,
    run_half,
)

_GROUP_THREADS, _COMBINE_THREADS = 1024, 256  # THREADS of group.cu and combine.cu
_FEW_SLOTS, _GROUP_BLOCKS = 1024, 16  # group.cu: up to how many slots by one block; else by how many
# Up to how many slots an expert has on average a configuration runs; one part each.
_CONFIGS = ((8, GemmConfig(4, 1, 32, 1)), (32, GemmConfig(4, 1, 64, 1)), (None, GemmConfig(2, 1, 128, 1, strips=2)))
_FP8_CONFIGS = (
    *((most, replace(config, fp8=True)) for most, config in _CONFIGS[:-1]),
    (None, GemmConfig(4, 1, 128, 1, fp8=True)),  # half of the decoded words in registers: four warpgroups fit
)
# What group.cu makes, in its order.
_LISTS = ("counts", "tiles", "row_of_slot", "expert_of_row", "weight_of_row")
# SCALE of enter_rows.cu by mode, and whose scale it then is for gemm.cu.
_NONE, _STATIC, _OF_ALL, _OF_ROW, _OF_EXPERT = range(5)
_OF_X = {"bf16": _NONE, "static": _STATIC, "dynamic": _OF_ALL, "per_token": _OF_ROW}
_OF_H = {"dynamic": _OF_EXPERT, "per_token": _OF_ROW}
_ENTERS_H = ("fp8", *_OF_H)  # by a launch of its own; else gemm.cu writes h as it enters the second half
_SCALING = {_STATIC: SCALE_OF_EXPERT, _OF_ROW: SCALE_OF_TOKEN, _OF_EXPERT: SCALE_OF_EXPERT}


def routed_experts(
    x: Tensor, weights: list[Tensor], routing: Routing, call: Call, out: Tensor, addend: Tensor | None = None
) -> None:
    """x (T, H) to out (T, H), which may be fp32.

    Args:
        weights: as stacks of what `Sm90Backend.pack` makes.
        addend: (T, H) fp32, added to each token's sum.
    """
    gate_up, global_scales, row_amax, down, down_global_scales, down_row_amax = weights
    (tokens, hidden), top_k = x.shape, routing.indices.shape[1]
    experts, _, size = row_amax.shape
    mode = mode_of(call)
    layout = scratch(mode, hidden, size, experts, tokens, top_k)
    made = dict(zip(layout, carve(x.device, *layout.values()), strict=True))
    config = config_of(tokens * top_k, experts, mode)
    _group(routing, experts, config.tokens, made)
    before, weights_of_rows = routing.weighting == "before_down", made["weight_of_row"]

    scale = _enter(x, mode, call.input_scale, made, made["row_of_slot"], made["values"])
    run_half(
        made["values"],
        gate_up,
        2 * size,
        global_scales,
        made["h"],
        config,
        gate_up=True,
        limit=call.clamp,
        token_scales=scale,
        hidden_scale=call.hidden_scale if mode == "static" else None,
        scaling=_scaling(_OF_X, mode),
        groups=Groups(made["tiles"], made["counts"], weights_of_rows if before else None),
        row_amax=row_amax,
    )
    h, scale = made["h"], call.hidden_scale if mode == "static" else None
    if mode in _ENTERS_H:
        h = made["h_values"]
        scale = _enter(made["h"], mode, None, made, None, h)
    run_half(
        h,
        down,
        hidden,
        down_global_scales,
        made["rows"],
        config,
        gate_up=False,
        token_scales=scale,
        scaling=_scaling(_OF_X | _OF_H, mode),
        groups=Groups(made["tiles"], made["counts"], None if before else weights_of_rows),
        row_amax=down_row_amax,
    )
    combine(made["rows"], made["row_of_slot"], top_k, addend, out)


def mode_of(call: Call) -> str:
    """What x and h enter as: an activation scale for "nvfp4", else the format itself."""
    return call.activation_scale if call.activations == "nvfp4" else call.activations


def config_of(slots: int, experts: int, mode: str) -> GemmConfig:
    """How both halves are cut for a number of slots, by how many an expert has on average."""
    return next(config for most, config in configs_of(mode) if most is None or slots <= most * experts)


def configs_of(mode: str) -> tuple[tuple[int | None, GemmConfig], ...]:
    """Up to how many slots of an expert on average, and how both halves are then cut."""
    return _FP8_CONFIGS if mode == "fp8" else _CONFIGS


def scratch(mode: str, hidden: int, intermediate: int, experts: int, tokens: int, top_k: int) -> dict[str, Part]:
    """What `routed_experts` carves; mode as `mode_of` says it."""
    slots = tokens * top_k
    values, multiple = (torch.float8_e4m3fn, COLUMNS) if mode == "fp8" else (torch.bfloat16, 1)
    of_x, of_h = (-(-columns // multiple) * multiple for columns in (hidden, intermediate))
    parts: dict[str, Part] = {
        "counts": ((2,), torch.int32),
        "tiles": ((slots // config_of(slots, experts, mode).tokens + min(slots, experts), 4), torch.int32),
        "row_of_slot": ((slots,), torch.int32),
        "expert_of_row": ((slots,), torch.int32),
        "weight_of_row": ((slots,), torch.float32),
        "values": ((slots, of_x), values),
        "h": ((slots, intermediate), torch.float32 if mode in _OF_H else torch.bfloat16),
        "rows": ((slots, hidden), torch.float32),
    }
    if mode in _ENTERS_H:
        parts["h_values"] = (slots, of_h), values
        parts["scale"] = (max(slots, experts),), torch.float32
        parts["amax"], parts["partials"] = ((experts,), torch.int32), ((ENTER_THREADS,), torch.int32)
    return parts


def prepare(experts: int, modes: tuple[str, ...], max_slots: int, device: torch.device) -> None:
    """Compile and load what `routed_experts` runs for bf16 hidden states, up to a number of slots."""
    gemms = []
    for mode in modes:
        h = {"bf16": BF16, "fp8": BF16, "static": NVFP4}.get(mode, OUT[torch.float32])
        begin = 0
        for most, config in configs_of(mode):
            if begin < max_slots:
                gemms += [(config, True, h), (config, False, OUT[torch.float32])]
            begin = (most or 0) * experts
    compile_all(("gemm.cu", macros_of(*of, grouped=True)) for of in gemms)
    for of in gemms:
        gemm_kernel(*of, device, grouped=True)
    for dtype in (torch.int32, torch.int64):
        _group_kernel(dtype, experts, device)
    for dtype in (torch.bfloat16, torch.float32):
        _combine_kernel(dtype, device)
    for mode in modes:
        if mode == "fp8":
            fp8.prepare_rows(device)
            continue
        _enter_kernel("enter_rows", _OF_X[mode], torch.bfloat16, device)
        if mode in _OF_H:
            _enter_kernel("enter_rows", _OF_H[mode], torch.float32, device)
        if mode == "dynamic":
            _enter_kernel("amax_of_experts", _OF_EXPERT, torch.float32, device)
            enter_kernel("amax_partials", mode, torch.bfloat16, device)


def _group(routing: Routing, experts: int, tile_rows: int, made: dict[str, Tensor]) -> None:
    """Slots to rows; fills what _LISTS names, and empties amax."""
    indices = routing.indices
    launch_kernel(
        _group_kernel(indices.dtype, experts, indices.device),
        (1 if indices.numel() <= _FEW_SLOTS else _GROUP_BLOCKS,),
        _GROUP_THREADS,
        indices,
        routing.weights,
        *map(np.int32, (indices.numel(), experts, tile_rows)),
        *(made[name] for name in _LISTS),
        made.get("amax"),
        shared_bytes=4 * experts,
    )


def _scaling(of: dict[str, int], mode: str) -> int:
    """Whose the scales of activations are, for gemm.cu."""
    return SCALE_OF_TOKEN if mode == "fp8" else _SCALING.get(of[mode], SCALE_OF_ALL)


def _enter(
    x: Tensor, mode: str, static: Tensor | None, made: dict[str, Tensor], row_of_slot: Tensor | None, values: Tensor
) -> Tensor | None:
    """x to the rows of its slots, or h (None) to its own, in values; returns their scale, None for none."""
    rows = len(x)
    if mode == "fp8":
        fp8.enter_rows(x, values, made["scale"], count=made["counts"][1:], row_of_slot=row_of_slot)
        return made["scale"]
    of = (_OF_H if row_of_slot is None else _OF_X)[mode]
    counts, expert_of_row, columns = made["counts"], made["expert_of_row"], np.int32(x.shape[1])
    amax = made.get("partials" if of == _OF_ALL else "amax")
    if of == _OF_ALL:
        amax_partials(x, made["partials"])
    elif of == _OF_EXPERT:
        kernel = _enter_kernel("amax_of_experts", of, x.dtype, x.device)
        launch_kernel(kernel, (rows,), ENTER_THREADS, x, columns, counts, expert_of_row, amax)
    scale = static if of == _STATIC else made.get("scale")
    along = 1 if of == _OF_ROW else -(-x.shape[1] // (ENTER_THREADS * ENTER_VALUES))
    kernel = _enter_kernel("enter_rows", of, x.dtype, x.device)
    top_k = 1 if row_of_slot is None else len(row_of_slot) // rows
    lists = counts, expert_of_row, row_of_slot, np.int32(top_k)
    launch_kernel(kernel, (rows, along), ENTER_THREADS, x, columns, *lists, scale, amax, scale, values)
    return None if of == _NONE else scale


def combine(rows: Tensor, row_of_slot: Tensor, top_k: int, addend: Tensor | None, out: Tensor) -> None:
    """out[t] = ((0 + row of slot 0) + row of slot 1) + ... + addend[t], rounded once; a slot of row -1 adds nothing."""
    tokens, hidden = out.shape
    along = -(-hidden // (4 * _COMBINE_THREADS))
    sizes = np.int32(top_k), np.int32(hidden)
    kernel = _combine_kernel(out.dtype, out.device)
    launch_kernel(kernel, (tokens, along), _COMBINE_THREADS, rows, row_of_slot, addend, *sizes, out)


def _group_kernel(indices: torch.dtype, experts: int, device: torch.device) -> Any:
    return load_kernel("group_slots", "group.cu", (("INDEX", int(indices == torch.int64)),), device, 4 * experts)


def _enter_kernel(name: str, of: int, dtype: torch.dtype, device: torch.device) -> Any:
    return load_kernel(name, "enter_rows.cu", (("SCALE", of), ("ELEMENT", OUT[dtype])), device)


def _combine_kernel(out: torch.dtype, device: torch.device) -> Any:
    return load_kernel("add_slots", "combine.cu", (("RESULT", OUT[out]),), device)
