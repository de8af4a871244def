# SPDX-License-Identifier: Apache-2.0
"""Routed experts for few tokens on Hopper, bf16 activations: routed_decode.cu, one launch for all experts that are hit.

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
from ..dispatch import Call, Routing
from ..target import target_of
from .backend import PARTIAL_BYTES, SMALL_BYTES, STAGE_BYTES, STAGES, THREADS
from .compile import compile_all, launch_structure, load_kernel
from .config import SHARED_BYTES
from .gemm import OUT
from .mailbox import ROUTED_SLOTS, mailbox_bytes, mailboxes, routed_box

_TOKENS, _CHOICES = 8, 64  # of routed_decode.cu
_GROUP_BYTES = 48


def takes(tokens: int, top_k: int) -> bool:
    """Whether the kernel holds that many tokens and slots."""
    return tokens <= _TOKENS and tokens * top_k <= _CHOICES


def fits(hidden: int, intermediate: int, device: torch.device) -> bool:
    """Whether rows of a block's tiles fit in its shared memory: not if I is so small that few blocks have them all."""
    return _shared_bytes(_tiles(hidden, intermediate, device)) <= SHARED_BYTES


def routed_experts(
    x: Tensor, weights: list[Tensor], routing: Routing, call: Call, out: Tensor, shared: list[Tensor] | None = None
) -> None:
    """x (T, H) to out (T, H), which may be fp32; bf16 activations alone.

    Args:
        weights: as stacks of what `Sm90Backend.pack` makes.
        shared: what it makes of a shared expert of the same I; None: there is none.
    """
    gate_up, global_scales, row_amax, down, down_global_scales, _ = weights
    hidden, size = x.shape[1], row_amax.shape[2]
    kernel = _kernel(hidden, size, x.dtype, out.dtype, routing.indices.dtype, x.device)
    box = routed_box(size)
    arguments = struct.pack(
        "<13Q4if4x",
        *_addresses(x, routing.indices, routing.weights),
        *_addresses(gate_up, down, global_scales, down_global_scales),
        *((0, 0, 0, 0) if shared is None else _addresses(*(shared[i] for i in (0, 3, 1, 4)))),
        *_addresses(mailboxes(x.device, box).current(), out),
        *routing.indices.shape,
        len(gate_up),
        int(routing.weighting == "before_down"),
        call.clamp,
    )
    shape = _blocks(size, x.device), THREADS, _shared_bytes(_tiles(hidden, size, x.device))
    launch_structure(kernel, *shape, arguments, x.device, together=True)


def prepare(hidden: int, intermediate: int, device: torch.device) -> None:
    """Compile and load what `routed_experts` runs for bf16 hidden states, and make a mailbox."""
    kinds = list(itertools.product((torch.bfloat16, torch.float32), (torch.int32, torch.int64)))
    tiles = _tiles(hidden, intermediate, device)
    every = [macros_of(hidden, intermediate, torch.bfloat16, *kind, tiles) for kind in kinds]
    compile_all(("routed_decode.cu", macros) for macros in every)
    for kind in kinds:
        _kernel(hidden, intermediate, torch.bfloat16, *kind, device)
    mailboxes(device, routed_box(intermediate)).current()


def macros_of(
    hidden: int, intermediate: int, x: torch.dtype, out: torch.dtype, index: torch.dtype, tiles: int
) -> tuple[tuple[str, int], ...]:
    """What routed_decode.cu is compiled with; tiles: the most of a block in the second half."""
    return (
        ("HIDDEN", hidden),
        ("INTERMEDIATE", intermediate),
        ("ELEMENT", OUT[x]),
        ("RESULT", OUT[out]),
        ("INDEX", int(index == torch.int64)),
        ("TILES", tiles),
        ("STAGES", STAGES),
        ("SHARED_BYTES", _shared_bytes(tiles)),
        ("MAILBOX_BYTES", mailbox_bytes(routed_box(intermediate))),
    )


def _kernel(
    hidden: int, intermediate: int, x: torch.dtype, out: torch.dtype, index: torch.dtype, device: torch.device
) -> Any:
    tiles = _tiles(hidden, intermediate, device)
    macros = macros_of(hidden, intermediate, x, out, index, tiles)
    return load_kernel("routed_experts_decode", "routed_decode.cu", macros, device, _shared_bytes(tiles))


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


def _addresses(*tensors: Tensor | None) -> tuple[int, ...]:
    return tuple(0 if t is None else t.data_ptr() for t in tensors)
