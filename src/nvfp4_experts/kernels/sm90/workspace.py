# SPDX-License-Identifier: Apache-2.0
"""Hand-over counters of the decode kernel: one for every stream, and one for every graph capture.

Blocks of one launch meet at a counter that each launch raises by its number of blocks (`decode.cu`). Launches that may
run at the same time must not share one: those on different streams, and those in different graphs, which may be
replayed anywhere. Counters are allocated and zeroed ahead of any capture, SLOTS for a device and a number of blocks.
"""

from __future__ import annotations

import functools
import threading

import torch
from torch import Tensor

from ...errors import UnsupportedError

SLOTS = 4096
_LINE = 16  # 64-bit counters per cache line of 128 bytes: one counter each, so that polling disturbs nobody else


class Counters:
    """The counters of one device for launches of one number of blocks."""

    def __init__(self, device: torch.device) -> None:
        self._memory = torch.zeros(SLOTS, _LINE, dtype=torch.int64, device=device)
        self._slots: dict[tuple[str, int], int] = {}
        self._lock = threading.Lock()

    def current(self) -> Tensor:
        """The counter for a launch on the current stream, () int64 with its cache line to itself.

        Raises:
            UnsupportedError: more than SLOTS streams and captures in the life of the process.
        """
        stream = torch.cuda.current_stream(self._memory.device)
        key = ("stream", stream.cuda_stream)
        if torch.cuda.is_current_stream_capturing():
            key = ("capture", _capture_id(stream.cuda_stream))
        slot = self._slots.get(key)
        if slot is None:
            with self._lock:
                slot = self._slots.setdefault(key, len(self._slots))
        if slot >= SLOTS:
            way_out = "reuse streams and graphs, or use backend='torch'"
            raise UnsupportedError("hand-over counters", f"at most {SLOTS} streams and captures", slot + 1, way_out)
        return self._memory[slot, 0]


@functools.cache
def counters(device: torch.device, blocks: int) -> Counters:
    """The counters of a device, made on first use: call it before any capture."""
    return Counters(device)


def _capture_id(stream: int) -> int:
    from cuda.bindings import runtime

    error, _, capture_id, *_ = runtime.cudaStreamGetCaptureInfo(stream)
    if int(error):
        raise UnsupportedError("graph capture", "must report its id", error, "warm up before capturing")
    return int(capture_id)
