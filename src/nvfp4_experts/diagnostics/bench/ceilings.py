# SPDX-License-Identifier: Apache-2.0
"""What this device reaches on the two things a layer is made of: streaming bytes, and multiplying matrices.

    read    a reduction over a tensor far larger than the caches, bytes / second; the fastest of two ways to reduce. In
            the memory of a CPU it lies on large pages, as our weights do
    matmul  n x n x n, bf16 (off CUDA also fp32, whichever is faster), 2 n^3 FLOP / second

Each is the median of several rounds. A ceiling is what was reached here by simple means, not what a data sheet says:
a kernel may pass it, and one that multiplies in fp8, FP4 or int8 is expected to pass the bf16 one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median

import torch
from torch import Tensor

from ...kernels.cpu.pages import on_large_pages
from .timing import seconds_per_call

_ROUNDS = 5
_CUDA_READ_BYTES, _CUDA_MATMUL, _CUDA_REPEATS = 4 << 30, 8192, 10
_OTHER_MATMUL = 2048


@dataclass(frozen=True)
class Ceilings:
    """Bytes per second read, FLOP per second multiplied, and how each was measured."""

    read_bytes_per_second: float
    matmul_flop_per_second: float
    read_by: str
    matmul_by: str

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def measure_ceilings(device: torch.device, rotation_bytes: int, matmul_size: int | None = None) -> Ceilings:
    """Measure both ceilings.

    Args:
        device: where.
        rotation_bytes: more than the caches hold; off CUDA the tensor read is twice that (on CUDA 4 GiB).
        matmul_size: n; None is 8192 on CUDA and 2048 elsewhere.
    """
    cuda = device.type == "cuda"
    read, read_by = _best(_reads(_CUDA_READ_BYTES if cuda else 2 * rotation_bytes, device), device)
    size = matmul_size or (_CUDA_MATMUL if cuda else _OTHER_MATMUL)
    matmul, matmul_by = _best(_matmuls(size, device), device)
    return Ceilings(read, matmul, read_by, matmul_by)


def _reads(nbytes: int, device: torch.device) -> dict[str, tuple[float, Callable[[], object]]]:
    columns = 1 << 14
    x = on_large_pages(torch.ones(max(1, nbytes // 4 // columns), columns, device=device))
    name = f"sum over {x.nbytes / 1e9:.2g} GB of fp32"
    return {f"{name}, whole": (x.nbytes, x.sum), f"{name}, by rows": (x.nbytes, lambda: x.sum(-1))}


def _matmuls(size: int, device: torch.device) -> dict[str, tuple[float, Callable[[], object]]]:
    made: dict[str, tuple[float, Callable[[], object]]] = {}
    for dtype in (torch.bfloat16,) if device.type == "cuda" else (torch.bfloat16, torch.float32):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        made[f"{size}^3 {str(dtype).removeprefix('torch.')}"] = (2.0 * size**3, partial(_multiply, a, b))
    return made


def _multiply(a: Tensor, b: Tensor) -> Tensor:
    return a @ b.T


def _best(ways: dict[str, tuple[float, Callable[[], object]]], device: torch.device) -> tuple[float, str]:
    """(amount per second, name) of the fastest way, by the median of its rounds."""
    repeats = _CUDA_REPEATS if device.type == "cuda" else 1
    rates = {}
    for name, (amount, function) in ways.items():
        function()
        rates[name] = amount / median(seconds_per_call(function, repeats, device) for _ in range(_ROUNDS))
    best = max(rates, key=lambda name: rates[name])
    return rates[best], best
