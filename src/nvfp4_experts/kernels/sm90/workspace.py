# SPDX-License-Identifier: Apache-2.0
"""Memory that forward calls need besides their result: scratch, and counters at which blocks meet.

Scratch: one block of memory for every device and stream, shared by all layers that run there, since launches on a
stream follow each other. It is sized by `reserve` when a layer is built, so that a forward call allocates nothing; a
stream not seen before takes its own on first use. It comes from the driver, not from torch's allocator, which may be
filling a graph's private pool just then. Inside a graph capture scratch does come from that pool: later layers of the
same capture use it again, other graphs and streams never touch it.

Counters: the blocks of one decode launch meet at a counter that each launch raises by its number of blocks
(`decode.cu`). Launches that may run at the same time must not share one: those on different streams, and those in
different graphs, which may be replayed anywhere. Counters are allocated and zeroed ahead of any capture, SLOTS of them
for a device.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import UnsupportedError

SLOTS = 4096
ALIGNMENT = 256
_LINE = 16  # 64-bit counters per cache line of 128 bytes: one counter each, so that polling disturbs nobody else

Part = tuple[tuple[int, ...], torch.dtype]

_reserved: dict[torch.device, int] = {}
_scratch: dict[tuple[torch.device, int], Tensor] = {}
_lock = threading.Lock()


def bytes_of(parts: Sequence[Part]) -> int:
    """What `carve` needs for these parts."""
    return sum(-(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT for shape, dtype in parts)


def reserve(device: torch.device, size: int) -> None:
    """Have `size` bytes of scratch at least on every stream of a device, from now on; the current stream's at once."""
    device = _indexed(device)
    with _lock:
        _reserved[device] = max(size, _reserved.get(device, 0))
    _of_stream(device, size)


def carve(device: torch.device, *parts: Part) -> list[Tensor]:
    """Uninitialised tensors out of the current stream's scratch, valid until the next call on that stream."""
    device, size = _indexed(device), bytes_of(parts)
    if torch.cuda.is_current_stream_capturing():
        memory = torch.empty(size, dtype=torch.uint8, device=device)
    else:
        memory = _of_stream(device, size)
    carved, offset = [], 0
    for shape, dtype in parts:
        length = math.prod(shape) * dtype.itemsize
        carved.append(memory[offset : offset + length].view(dtype).view(shape))
        offset += -(-length // ALIGNMENT) * ALIGNMENT
    return carved


def scratch_bytes(device: torch.device) -> int:
    """Bytes of scratch that are allocated on a device now, over all streams."""
    return sum(memory.nbytes for (owner, _), memory in _scratch.items() if owner == _indexed(device))


def _of_stream(device: torch.device, size: int) -> Tensor:
    key = (device, torch.cuda.current_stream(device).cuda_stream)
    memory = _scratch.get(key)
    if memory is None or memory.nbytes < size:
        with _lock:
            _scratch.pop(key, None)
            memory = torch.as_tensor(_DriverMemory(device, max(size, _reserved.get(device, 0))), device=device)
            _scratch[key] = memory
    return memory


class _DriverMemory:
    """Bytes on a device, straight from the driver; given back, when all work there is done, with this object."""

    def __init__(self, device: torch.device, size: int) -> None:
        from cuda.bindings import runtime

        with torch.cuda.device(device):
            status, self._address = runtime.cudaMalloc(size)
            if int(status):
                torch.cuda.empty_cache()
                status, self._address = runtime.cudaMalloc(size)
        if int(status):
            raise UnsupportedError(
                "scratch", f"must get {size} bytes", status, "build layers with a smaller max_tokens"
            )
        self._free = runtime.cudaFree
        self.__cuda_array_interface__ = {
            "shape": (size,),
            "typestr": "|u1",
            "data": (int(self._address), False),
            "version": 3,
        }

    def __del__(self) -> None:
        if hasattr(self, "_free"):
            self._free(self._address)


def _indexed(device: torch.device) -> torch.device:
    return device if device.index is not None else torch.device(device.type, torch.cuda.current_device())


class Counters:
    """The hand-over counters of one device for launches of one number of blocks."""

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
    """The counters of a device for launches of `blocks` blocks, made on first use: call it before any capture."""
    return Counters(device)


def _capture_id(stream: int) -> int:
    from cuda.bindings import runtime

    error, _, capture_id, *_ = runtime.cudaStreamGetCaptureInfo(stream)
    if int(error):
        raise UnsupportedError("graph capture", "must report its id", error, "warm up before capturing")
    return int(capture_id)
