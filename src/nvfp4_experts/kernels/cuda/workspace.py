# SPDX-License-Identifier: Apache-2.0
"""Scratch: memory that forward calls need besides their result, and may leave in any state.

One block of memory for every device and stream, shared by all layers that run there. Launches on a stream
follow each other, and `exclusive` keeps the launches of one call together where several threads use a stream. A block
is sized by `reserve` when a layer is built, so that a forward call allocates nothing; a stream that `reserve` did not
run on takes or grows its own on first use. Blocks are kept for the life of the process. Inside a graph capture scratch
comes from torch's allocator, that is from the graph's pool: later layers of the same capture use it again, other graphs
and streams never touch it.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from .driver import allocate

ALIGNMENT = 256

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
    device = indexed(device)
    with _lock:
        _of_stream(_current(device), size)
        _reserved[device] = max(size, _reserved.get(device, 0))


def exclusive(device: torch.device) -> threading.RLock:
    """Held from `carve` to a call's last launch, so that no other thread's call gets between on the same stream."""
    stream = _current(indexed(device))
    return _calls.get(stream) or _calls.setdefault(stream, threading.RLock())


def carve(device: torch.device, *parts: Part, behind: int = 0) -> list[Tensor]:
    """Uninitialised tensors out of the current stream's scratch, valid until the next call on that stream.

    Behind the first `behind` bytes of it, they outlive calls that carve no more than those.
    """
    device, size = indexed(device), bytes_of(parts)
    carved, offset = [], 0
    if torch.cuda.is_current_stream_capturing():
        memory = torch.empty(size, dtype=torch.uint8, device=device)  # nobody else's, wherever it begins
    else:
        offset = -(-behind // ALIGNMENT) * ALIGNMENT
        memory = _of_stream(_current(device), offset + size)
    for shape, dtype in parts:
        length = math.prod(shape) * dtype.itemsize
        carved.append(memory[offset : offset + length].view(dtype).view(shape))
        offset += -(-length // ALIGNMENT) * ALIGNMENT
    return carved


def scratch_bytes(device: torch.device) -> int:
    """Bytes of scratch that are allocated on a device now, over all streams."""
    return sum(memory.nbytes for (owner, _), memory in list(_scratch.items()) if owner == indexed(device))


def _current(device: torch.device) -> _Stream:
    return device, torch.cuda.current_stream(device).cuda_stream


def _of_stream(stream: _Stream, size: int) -> Tensor:
    memory = _scratch.get(stream)
    if memory is not None and memory.nbytes >= size:
        return memory
    with _lock:  # the old block goes when the new one is there: a failure loses nothing
        size = max(size, _reserved.get(stream[0], 0))
        if stream not in _scratch or _scratch[stream].nbytes < size:
            _scratch[stream] = allocate(stream[0], size)
        return _scratch[stream]


def indexed(device: torch.device) -> torch.device:
    """With the number of the current device where there is none."""
    return device if device.index is not None else torch.device(device.type, torch.cuda.current_device())
