# SPDX-License-Identifier: Apache-2.0
"""Tensors that begin anywhere, for kernels that load and store 16 bytes at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_BYTES = 16


def run_aligned(run: Callable[..., None], x: Tensor, *arguments: Any, out: Tensor) -> None:
    """`run(x, *arguments, out)`, with a copy of x or for `out` where that begins at no multiple of 16 bytes.

    Views that do are rare enough to be copied.
    """
    aligned = out if out.data_ptr() % _BYTES == 0 else torch.empty_like(out)
    run(x if x.data_ptr() % _BYTES == 0 else x.clone(), *arguments, aligned)
    if aligned is not out:
        out.copy_(aligned)
