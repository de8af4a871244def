# SPDX-License-Identifier: Apache-2.0
"""Copies that take no multiprocessor, whatever the strides of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import UnsupportedError


def copy_rows(to: Tensor, source: Tensor) -> None:
    """to[...] = source, both (rows, bytes) uint8 with rows of any stride, by the copy engine, on the current stream.

    Tensor.copy_ does so where both are contiguous; else it launches a kernel.
    """
    from cuda.bindings import runtime

    rows, width = source.shape
    stream = torch.cuda.current_stream(to.device).cuda_stream
    places = to.data_ptr(), to.stride(0), source.data_ptr(), source.stride(0)
    (status,) = runtime.cudaMemcpy2DAsync(*places, width, rows, runtime.cudaMemcpyKind.cudaMemcpyDefault, stream)
    if int(status):
        raise UnsupportedError("cudaMemcpy2DAsync", "must succeed", status, "report it, with shapes and devices")
