# SPDX-License-Identifier: Apache-2.0
"""Device memory straight from the driver, and the identity of a graph capture.

torch's allocator may be filling a graph's private pool just when a block is wanted that must outlive the graph.
Everything here may run while a capture is under way, on this thread or another, and leaves no trace in it.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ...errors import UnsupportedError


def allocate(device: torch.device, size: int) -> Tensor:
    """(size,) uint8, uninitialised; given back when the last tensor on it goes, once all work on the device is done.

    Raises:
        UnsupportedError: the device has not as much left.
    """
    return torch.as_tensor(_DriverMemory(device, size), device=device)


def fill(memory: Tensor, byte: int) -> None:
    """Set every byte of a tensor; done when this returns."""
    from cuda.bindings import runtime

    with torch.cuda.device(memory.device), _beside_captures():
        status, stream = runtime.cudaStreamCreateWithFlags(runtime.cudaStreamNonBlocking)
        if not int(status):
            (status,) = runtime.cudaMemsetAsync(memory.data_ptr(), byte, memory.nbytes, stream)
            (waited,) = runtime.cudaStreamSynchronize(stream)
            runtime.cudaStreamDestroy(stream)
            status = status if int(status) else waited
    if int(status):
        raise UnsupportedError("device memory", "must be set", status, "restart the process: an earlier launch failed")


def capture_id(stream: int) -> int:
    """Which capture a stream is part of, a number > 0; it is part of one."""
    from cuda.bindings import runtime

    status, _, identity, *_ = runtime.cudaStreamGetCaptureInfo(stream)
    if int(status):
        raise UnsupportedError("graph capture", "must report its id", status, "warm up before capturing")
    return int(identity)


class _DriverMemory:
    """A block, as torch takes it over (`__cuda_array_interface__`)."""

    def __init__(self, device: torch.device, size: int) -> None:
        from cuda.bindings import runtime

        self._runtime, self._address = runtime, None
        with torch.cuda.device(device), _beside_captures():
            status, address = runtime.cudaMalloc(size)
            if int(status):
                torch.cuda.empty_cache()
                status, address = runtime.cudaMalloc(size)
        if int(status):
            way_out = "build layers with a smaller max_tokens"
            raise UnsupportedError("device memory", f"must get {size} bytes", status, way_out)
        self._address = address
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": (size,),
            "typestr": "|u1",
            "data": (int(address), False),
            "version": 3,
        }

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        if self._address is not None and not is_finalizing():  # memory ends with the process
            with _beside_captures():
                self._runtime.cudaFree(self._address)


@contextlib.contextmanager
def _beside_captures() -> Iterator[None]:
    """What is called inside belongs to no capture and breaks none."""
    from cuda.bindings import runtime

    _, before = runtime.cudaThreadExchangeStreamCaptureMode(runtime.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed)
    try:
        yield
    finally:
        runtime.cudaThreadExchangeStreamCaptureMode(before)
