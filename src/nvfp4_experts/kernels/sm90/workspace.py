# SPDX-License-Identifier: Apache-2.0
"""Memory that forward calls need besides their result: scratch, and counters at which blocks meet.

Scratch: one block of memory for every device and stream, shared by all layers that run there. Launches on a stream
follow each other, and `exclusive` keeps the launches of one call together where several threads use a stream. A block
is sized by `reserve` when a layer is built, so that a forward call allocates nothing; a stream that `reserve` did not
run on takes or grows its own on first use. Blocks are kept for the life of the process. They come from the driver, not
from torch's allocator, which may be filling a graph's private pool just then. Inside a graph capture scratch does come
from that pool: later layers of the same capture use it again, other graphs and streams never touch it.

Counters: the blocks of one decode launch meet at a counter that each launch raises by its number of blocks
(`decode.cu`). Launches that may run at the same time must not share one: those on different streams, and those in
different graphs, which may be replayed anywhere. Counters are allocated and zeroed ahead of any capture, SLOTS of them
for a device.
"""

from __future__ import annotations

import contextlib
import functools
import math
import threading
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ...errors import UnsupportedError

SLOTS = 4096
ALIGNMENT = 256
_LINE = 16  # 64-bit counters per cache line of 128 bytes: one counter each, so that polling disturbs nobody else

Part = tuple[tuple[int, ...], torch.dtype]

_Stream = tuple[torch.device, int]

_reserved: dict[torch.device, int] = {}
_scratch: dict[_Stream, Tensor] = {}
_calls: dict[_Stream, threading.RLock] = {}
_lock = threading.RLock()


def bytes_of(parts: Sequence[Part]) -> int:
    """What `carve` needs for these parts."""
    return sum(-(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT for shape, dtype in parts)


def reserve(device: torch.device, size: int) -> None:
    """Have `size` bytes of scratch at least on every stream of a device, from now on; the current stream's at once.

    Raises:
        UnsupportedError: the device has not as much left; everything is as it was.
    """
    device = _indexed(device)
    with _lock:
        _of_stream(_current(device), size)
        _reserved[device] = max(size, _reserved.get(device, 0))


def exclusive(device: torch.device) -> threading.RLock:
    """Held from `carve` to a call's last launch, so that no other thread's call gets between on the same stream."""
    stream = _current(_indexed(device))
    return _calls.get(stream) or _calls.setdefault(stream, threading.RLock())


def carve(device: torch.device, *parts: Part) -> list[Tensor]:
    """Uninitialised tensors out of the current stream's scratch, valid until the next call on that stream."""
    device, size = _indexed(device), bytes_of(parts)
    if torch.cuda.is_current_stream_capturing():
        memory = torch.empty(size, dtype=torch.uint8, device=device)
    else:
        memory = _of_stream(_current(device), size)
    carved, offset = [], 0
    for shape, dtype in parts:
        length = math.prod(shape) * dtype.itemsize
        carved.append(memory[offset : offset + length].view(dtype).view(shape))
        offset += -(-length // ALIGNMENT) * ALIGNMENT
    return carved


def scratch_bytes(device: torch.device) -> int:
    """Bytes of scratch that are allocated on a device now, over all streams."""
    return sum(memory.nbytes for (owner, _), memory in list(_scratch.items()) if owner == _indexed(device))


def _current(device: torch.device) -> _Stream:
    return device, torch.cuda.current_stream(device).cuda_stream


def _of_stream(stream: _Stream, size: int) -> Tensor:
    memory = _scratch.get(stream)
    if memory is not None and memory.nbytes >= size:
        return memory
    with _lock:  # the old block goes when the new one is there: a failure loses nothing
        size = max(size, _reserved.get(stream[0], 0))
        if stream not in _scratch or _scratch[stream].nbytes < size:
            _scratch[stream] = _allocate(stream[0], size)
        return _scratch[stream]


def _allocate(device: torch.device, size: int) -> Tensor:
    return torch.as_tensor(_DriverMemory(device, size), device=device)


class _DriverMemory:
    """Bytes on a device, straight from the driver; given back, when all work there is done, with this object."""

    def __init__(self, device: torch.device, size: int) -> None:
        from cuda.bindings import runtime

        self._runtime, self._address = runtime, None
        with torch.cuda.device(device), self._beside_captures():
            status, address = runtime.cudaMalloc(size)
            if int(status):
                torch.cuda.empty_cache()
                status, address = runtime.cudaMalloc(size)
        if int(status):
            way_out = "build layers with a smaller max_tokens"
            raise UnsupportedError("scratch", f"must get {size} bytes", status, way_out)
        self._address = address
        self.__cuda_array_interface__ = {
            "shape": (size,),
            "typestr": "|u1",
            "data": (int(address), False),
            "version": 3,
        }

    def __del__(self) -> None:
        if self._address is not None:
            with self._beside_captures():
                self._runtime.cudaFree(self._address)

    @contextlib.contextmanager
    def _beside_captures(self) -> Iterator[None]:
        """Allocating must not break a capture that another thread has under way."""
        relaxed = self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed
        _, before = self._runtime.cudaThreadExchangeStreamCaptureMode(relaxed)
        try:
            yield
        finally:
            self._runtime.cudaThreadExchangeStreamCaptureMode(before)


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
