# SPDX-License-Identifier: Apache-2.0
"""Mailboxes: where the blocks of one decode launch hand each other words (mailbox.cuh).

A launch finds the mailbox as the launch before left it, so it may be used by launches that follow each other and by no
others. Launches on different streams may run at once, and so may different graphs, which can be replayed anywhere:
every stream, and every stream of a graph capture, has a mailbox of each size that runs there, made on first use and
kept for the life of the process (V4-Pro: 0.45 MB; routed 0.88 MB, with NVFP4 activations 4.7 MB where scales are
static and 3.1 MB else). A launch of decode.cu empties all of the other box, so those whose boxes have one size share a
mailbox; one of routed_decode.cu empties the rows that were used, so those do whose boxes have one layout.

    launches     that have ended, u32 in a line of 128 bytes, 0 at first; of it the last bit counts. Behind it for each
                 box, u32, how many rows of it are in use
    2 boxes      all ones at first
                 decode.cu: x (8, H) bf16, h (8, I) fp32, both in rows of whole chunks; amax (I / 8, 8) u32
                 routed_decode.cu: h (72, I) bf16, in rows of whole chunks; with NVFP4 activations x (72, H) bf16 as
                 well, or (8, H) if its scales are no expert's, and h once more, (72, I) fp32; amax (72, I / 8) u32
                 where scales are not static, in rows of whole 16 bytes; 16 bytes with a count of blocks. With FP8
                 as with NVFP4 whose scales are not static, but fp16 for bf16, and no x
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from ...layouts.fragments import COLUMNS
from ..cuda.driver import allocate, capture_id, fill
from ..cuda.workspace import indexed

ROUTED_SLOTS = 72  # SLOTS of routed_decode.cu
_TOKENS, _LINE, _NOT_YET = 8, 128, 0xFF


def decode_box(hidden: int, intermediate: int) -> int:
    """Bytes of a box of decode.cu."""
    return _TOKENS * (2 * _whole(hidden) + 4 * _whole(intermediate) + 4 * (intermediate // 8))


def routed_box(hidden: int, intermediate: int, mode: str) -> int:
    """Bytes of a box of routed_decode.cu; mode: "bf16", "fp8", or a scale of NVFP4 activations."""
    values = ROUTED_SLOTS * 2 * _whole(intermediate)
    if mode == "bf16":
        return values
    is_static = mode == "static"
    x = 0 if mode == "fp8" else (ROUTED_SLOTS if is_static else _TOKENS) * 2 * _whole(hidden)
    amax = 0 if is_static else ROUTED_SLOTS * -(-(intermediate // 8) // 4) * 16
    return values + x + 16 + ROUTED_SLOTS * 4 * intermediate + amax


def mailbox_bytes(box: int) -> int:
    """Size of one mailbox with boxes of that size; mailbox.cuh asserts that it is."""
    return _LINE + -(-2 * box // _LINE) * _LINE


def _whole(columns: int) -> int:
    return -(-columns // COLUMNS) * COLUMNS


class Mailboxes:
    """Those of one device and size."""

    def __init__(self, device: torch.device, size: int) -> None:
        self._device, self._size = device, size
        self._made: dict[tuple[int, int], Tensor] = {}
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Bytes of all that have been made."""
        return self._size * len(self._made)

    def current(self) -> Tensor:
        """The mailbox for a launch on the current stream, (size,) uint8.

        Raises:
            UnsupportedError: there is none yet, and the device has no memory left for it.
        """
        stream = torch.cuda.current_stream(self._device).cuda_stream
        key = stream, capture_id(stream) if torch.cuda.is_current_stream_capturing() else 0
        made = self._made.get(key)
        if made is None:
            with self._lock:
                made = self._made.get(key)
                if made is None:
                    made = self._made[key] = self._make()
        return made

    def _make(self) -> Tensor:
        mailbox = allocate(self._device, self._size)
        fill(mailbox[:_LINE], 0)
        fill(mailbox[_LINE:], _NOT_YET)
        return mailbox


def mailboxes(device: torch.device, box: int, layout: tuple[object, ...] = ()) -> Mailboxes:
    """The mailboxes of a device with boxes of a size; layout: what its rows depend on, if launches empty rows."""
    key = indexed(device), box, layout
    with _lock:
        if key not in _all:
            _all[key] = Mailboxes(key[0], mailbox_bytes(box))
        return _all[key]


def all_bytes(device: torch.device) -> int:
    """Bytes of mailboxes on a device, over all sizes, streams and captures."""
    with _lock:
        return sum(made.nbytes for (owner, *_), made in _all.items() if owner == indexed(device))


_all: dict[tuple[torch.device, int, tuple[object, ...]], Mailboxes] = {}
_lock = threading.Lock()
