# SPDX-License-Identifier: Apache-2.0
"""Routed experts for few tokens on Hopper: routed_decode.cu, one launch for all experts that are hit.

A shared expert may be one more group of the launch.
"""

from __future__ import annotations

import functools
import itertools
import struct
from typing import Any

import torch
from torch import Tensor

from ...layouts.fragments import ROWS
from ..dispatch import Beside, Call, Routing
from ..target import target_of
from .backend import PARTIAL_BYTES, SMALL_BYTES, STAGE_BYTES, STAGES, THREADS
from .compile import compile_all, launch_structure, load_kernel
from .config import SHARED_BYTES
from .gemm import MODE, OUT
from .grouped import mode_of
from .mailbox import ROUTED_SLOTS, mailbox_bytes, mailboxes, routed_box

_TOKENS, _CHOICES = 8, 64  # of routed_decode.cu
_GROUP_BYTES = 64


def takes(tokens: int, top_k: int) -> bool:
    """Whether the kernel holds that many tokens and slots."""
    return tokens <= _TOKENS and tokens * top_k <= _CHOICES


def fits(hidden: int, intermediate: int, device: torch.device) -> bool:
    """Whether rows of a block's tiles fit in its shared memory: not if I is so small that few blocks have them all."""
    return _shared_bytes(_tiles(hidden, intermediate, device)) <= SHARED_BYTES


def routed_experts(
    x: Tensor, weights: list[Tensor], routing: Routing, call: Call, out: Tensor, beside: Beside | None = None
) -> None:
    """x (T, H) to out (T, H), which may be fp32.

    Args:
        weights: as stacks of what `Sm90Backend.pack` makes; "fp8": what `Sm90Fp8Backend.pack` does.
        beside: a shared expert of the same I and format, packed so too, and its call; None: there is none.
    """
    hidden, size, mode = x.shape[1], weights[2].shape[2], mode_of(call)
    kernel = _kernel(hidden, size, mode, x.dtype, out.dtype, routing.indices.dtype, x.device)
    arguments = struct.pack(
        "<21Q4if4x",
        *_addresses(x, routing.indices, routing.weights),
        *_expert(weights, call),
        *((0,) * 8 if beside is None else _expert(beside.weights, beside.call)),
        *_addresses(_mailbox(hidden, size, mode, x.device), out),
        *routing.indices.shape,
        len(weights[0]),
        int(routing.weighting == "before_down"),
        call.clamp,
    )
    shape = _blocks(size, x.device), THREADS, _shared_bytes(_tiles(hidden, size, x.device))
    launch_structure(kernel, *shape, arguments, x.device, together=True)


def prepare(hidden: int, intermediate: int, modes: tuple[str, ...], device: torch.device) -> None:
    """Compile and load what `routed_experts` runs for bf16 hidden states, and make mailboxes."""
    results, indices = (torch.bfloat16, torch.float32), (torch.int32, torch.int64)
    kinds = list(itertools.product(modes, (torch.bfloat16,), results, indices))
    tiles = _tiles(hidden, intermediate, device)
    compile_all(("routed_decode.cu", macros_of(hidden, intermediate, *kind, tiles)) for kind in kinds)
    for kind in kinds:
        _kernel(hidden, intermediate, *kind, device)
    for mode in modes:
        _mailbox(hidden, intermediate, mode, device)


def macros_of(
    hidden: int, intermediate: int, mode: str, x: torch.dtype, out: torch.dtype, index: torch.dtype, tiles: int
) -> tuple[tuple[str, int], ...]:
    """What routed_decode.cu is compiled with; tiles: the most of a block in the second half."""
    return (
        ("HIDDEN", hidden),
        ("INTERMEDIATE", intermediate),
        ("ACTIVATIONS", MODE[mode]),
        ("ELEMENT", OUT[x]),
        ("RESULT", OUT[out]),
        ("INDEX", int(index == torch.int64)),
        ("TILES", tiles),
        ("STAGES", STAGES),
        ("SHARED_BYTES", _shared_bytes(tiles)),
        ("MAILBOX_BYTES", mailbox_bytes(routed_box(hidden, intermediate, mode))),
    )


def _kernel(
    hidden: int,
    intermediate: int,
    mode: str,
    x: torch.dtype,
    out: torch.dtype,
    index: torch.dtype,
    device: torch.device,
) -> Any:
    tiles = _tiles(hidden, intermediate, device)
    macros = macros_of(hidden, intermediate, mode, x, out, index, tiles)
    return load_kernel("routed_experts_decode", "routed_decode.cu", macros, device, _shared_bytes(tiles))


def _mailbox(hidden: int, intermediate: int, mode: str, device: torch.device) -> Tensor:
    layout = hidden, intermediate, mode
    return mailboxes(device, routed_box(*layout), layout).current()


def _blocks(intermediate: int, device: torch.device) -> int:
    """One block per multiprocessor, each with a tile of every expert: 8 gate and 8 up rows."""
    return min(target_of(device).multiprocessors or 1, intermediate // 8)


@functools.cache
def _tiles(hidden: int, intermediate: int, device: torch.device) -> int:
    return -(-hidden // (ROWS * _blocks(intermediate, device)))


def _shared_bytes(tiles: int) -> int:
    """Of Shared: the ring, partial sums of two tiles, rows of the block's tiles, groups, and the small rest."""
    rows = tiles * ROUTED_SLOTS * ROWS * 4
    return STAGES * STAGE_BYTES + PARTIAL_BYTES + rows + (_CHOICES + 1) * _GROUP_BYTES + 2 * SMALL_BYTES


def _expert(weights: list[Tensor], call: Call) -> tuple[int, ...]:
    """Expert of routed_decode.cu."""
    gate_up, global_scales, row_amax, down, down_global_scales, down_row_amax = weights
    static = (call.input_scale, call.hidden_scale) if mode_of(call) == "static" else (None, None)
    return _addresses(gate_up, down, global_scales, down_global_scales, *static, row_amax, down_row_amax)


def _addresses(*tensors: Tensor | None) -> tuple[int, ...]:
    return tuple(0 if t is None else t.data_ptr() for t in tensors)
