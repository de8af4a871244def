# SPDX-License-Identifier: Apache-2.0
"""Pages of 2 MiB under weights, on Linux, where they are given to who asks for them.

With few tokens a call reads each weight once. On pages of 4 KiB that is a walk through the page tables every 4 KiB (in
a virtual machine through two sets of them), and the processor stops prefetching at the end of each.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable

from torch import Tensor

PAGE = 2 << 20
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25  # of Linux; the second since 6.1


def on_large_pages(tensor: Tensor) -> Tensor:
    """The tensor itself, whole 2 MiB of it on large pages; where that is refused nothing changes.

    Cost: none where nothing has been written yet. What has been is copied once (before Linux 6.1, when the system finds
    the time).
    """
    first = -(-tensor.data_ptr() // PAGE) * PAGE
    nbytes = (tensor.data_ptr() + tensor.nbytes) // PAGE * PAGE - first
    if tensor.device.type == "cpu" and nbytes > 0 and (madvise := _madvise()):
        for advice in (_MADV_HUGEPAGE, _MADV_COLLAPSE):
            madvise(first, nbytes, advice)
    return tensor


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    return function
