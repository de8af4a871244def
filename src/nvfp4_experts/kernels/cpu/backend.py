# SPDX-License-Identifier: Apache-2.0
"""CPUs: the whole layer in one native call, the same bits at any number of threads, and for nvfp4 in any tier.

    resident   0.5625 bytes per weight, and 2 bytes per row; on large pages where the system has them
    scratch    per calling thread: x and h as they enter, and h in fp32; at most CHUNK tokens at a time, but for
               "dynamic", whose scale needs h of the whole batch

Tokens are independent (but for "dynamic"), so a batch is cut into chunks of tokens without changing a bit.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from ctypes import byref
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from ...formats.nvfp4 import Nvfp4Tensor
from ...layouts.rows import ROWS, pack_rows, unpack_rows
from ...layouts.weights import deinterleave_rows, interleave_rows, row_amax
from .. import native
from ..dispatch import ACTIVATION_SCALES, Call, Problem
from ..target import cpu_threads
from .pages import on_large_pages

CHUNK = 1024
_ACTIVATIONS = {"bf16": 0, "fp8": 1, "nvfp4": 2}
_SCALE_MODE = {mode: index for index, mode in enumerate(ACTIVATION_SCALES)}
ELEMENT = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}


class CpuBackend:
    """See the module docstring; packed as layouts/rows.py says, tiles of gate and up alternating."""

    name = "cpu"

    def refusal(self, problem: Problem) -> str | None:
        if problem.target.device_type != "cpu":
            return "needs its tensors in the memory of a CPU"
        loaded, reason = native.load()
        if loaded is None:
            return reason
        native.tier()  # a forced tier that is not here is an error, not a reason to take another backend
        return None

    def pack(self, gate: Nvfp4Tensor, up: Nvfp4Tensor, down: Nvfp4Tensor) -> dict[str, Tensor]:
        gate_bytes, up_bytes = gate.block_scales.view(torch.uint8), up.block_scales.view(torch.uint8)
        gate_up_scales = interleave_rows(gate_bytes, up_bytes, ROWS).view(torch.float8_e4m3fn)
        return {
            "gate_up_rows": on_large_pages(pack_rows(interleave_rows(gate.codes, up.codes, ROWS), gate_up_scales)),
            "gate_up_global_scales": torch.stack((gate.global_scale, up.global_scale)),
            "gate_up_row_amax": torch.cat((row_amax(gate), row_amax(up))),
            "down_rows": on_large_pages(pack_rows(down.codes, down.block_scales)),
            "down_global_scale": down.global_scale.reshape(1),
            "down_row_amax": row_amax(down),
        }

    def unpack(self, weights: Mapping[Any, Tensor], hidden: int, intermediate: int) -> tuple[Nvfp4Tensor, ...]:
        gate_up, global_scales, _, down, down_global_scale, _ = weights.values()
        codes, block_scales = unpack_rows(gate_up, 2 * intermediate, hidden)
        gate_codes, up_codes = deinterleave_rows(codes, ROWS)
        gate_bytes, up_bytes = deinterleave_rows(block_scales.view(torch.uint8), ROWS)
        return (
            Nvfp4Tensor(gate_codes, gate_bytes.view(torch.float8_e4m3fn), global_scales[0]),
            Nvfp4Tensor(up_codes, up_bytes.view(torch.float8_e4m3fn), global_scales[1]),
            Nvfp4Tensor(*unpack_rows(down, hidden, intermediate), down_global_scale[0]),
        )

    def prepare(self, problem: Problem, device: torch.device, max_tokens: int) -> None:
        """Nothing: the library is loaded when it is asked whether it can run, and scratch is made by the first call."""

    def scratch_bytes(self, device: torch.device) -> int:
        return sum(holder.block.nbytes for holder in list(_holders) if holder.block is not None)

    def shared_expert(self, x: Tensor, weights: list[Tensor], call: Call, out: Tensor) -> None:
        x = x.to(out.dtype)  # in fp32 x is the same values, and rows come out unrounded
        loaded, layer = loaded_library(), native_call(x, weights, call)
        tokens, row_bytes = x.shape[0], x.shape[1] * x.itemsize
        step = tokens if call.activations == "nvfp4" and call.activation_scale == "dynamic" else CHUNK
        for first in range(0, tokens, step):
            layer.x, layer.y = x.data_ptr() + first * row_bytes, out.data_ptr() + first * row_bytes
            layer.tokens = min(step, tokens - first)
            layer.scratch = scratch(loaded.scratch_bytes(byref(layer)))
            loaded.shared_expert(byref(layer))


def loaded_library() -> native.Library:
    """The native library, which was there when the layer was built."""
    loaded, reason = native.load()
    assert loaded is not None, reason
    return loaded


def native_call(x: Tensor, weights: list[Tensor], call: Call) -> native.Call:
    """A call, but for where x and y begin, how many tokens there are, and scratch; weights of the (first) expert."""
    expert = native_expert(weights, call)
    expert.hidden, expert.intermediate = x.shape[1], weights[2].shape[-1] // 2
    expert.clamp, expert.element = call.clamp, ELEMENT[x.dtype]
    expert.activations, expert.scale_mode = _ACTIVATIONS[call.activations], _SCALE_MODE[call.activation_scale]
    expert.threads, expert.tier = cpu_threads(), native.tier().index
    return expert


def native_expert(weights: list[Tensor], call: Call) -> native.Call:
    """Of a call, what belongs to the (first) expert: its weights, their scales and its static scales."""
    gate_up, gate_up_scales, gate_up_amax, down, down_scale, down_amax = weights
    return native.Call(
        gate_up=gate_up.data_ptr(),
        gate_up_global_scales=gate_up_scales.data_ptr(),
        gate_up_row_amax=gate_up_amax.data_ptr(),
        down=down.data_ptr(),
        down_global_scale=down_scale.data_ptr(),
        down_row_amax=down_amax.data_ptr(),
        input_scale=None if call.input_scale is None else call.input_scale.data_ptr(),
        hidden_scale=None if call.hidden_scale is None else call.hidden_scale.data_ptr(),
    )


class _Scratch(threading.local):
    """The block of one calling thread: calls of several threads may overlap, those of one cannot."""

    def __init__(self) -> None:
        self.holder = _Holder()
        _holders.add(self.holder)


class _Holder:
    block: Tensor | None = None


_holders: WeakSet[_Holder] = WeakSet()
_local = _Scratch()


def scratch(size: int) -> int:
    """Address of at least `size` bytes that no other thread uses; kept, and grown when a call needs more."""
    holder = _local.holder
    if holder.block is None or holder.block.nbytes < size:
        holder.block = None  # given back before the larger one is taken
        with torch.inference_mode(False):  # it outlives the mode of the call that makes it
            holder.block = torch.empty(size, dtype=torch.uint8)
    return holder.block.data_ptr()


BACKEND = CpuBackend()
