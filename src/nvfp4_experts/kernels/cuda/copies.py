# SPDX-License-Identifier: Apache-2.0
"""Copies of rows of bytes, whatever their strides, as the driver makes them: between GPUs by the copy engine."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import UnsupportedError


def copy_rows(to: Tensor, source: Tensor) -> None:
    """to[...] = source, both (rows, bytes) uint8 with rows of any stride, on the current stream.

    Between GPUs no multiprocessor takes part, where Tensor.copy_ launches a kernel unless both are contiguous. Within a
    GPU the driver launches one itself.
    """
    from cuda.bindings import runtime

    rows, width = source.shape
    stream = torch.cuda.current_stream(to.device).cuda_stream
    places = to.data_ptr(), to.stride(0), source.data_ptr(), source.stride(0)
    (status,) = runtime.cudaMemcpy2DAsync(*places, width, rows, runtime.cudaMemcpyKind.cudaMemcpyDefault, stream)
    if int(status):
        raise UnsupportedError("cudaMemcpy2DAsync", "must succeed", status, "report it, with shapes and devices")
