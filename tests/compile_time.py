# SPDX-License-Identifier: Apache-2.0
"""How long building layers compiles, kernel after kernel and side by side: `python -m tests.compile_time`, no GPU.

A shared expert and 384 routed ones of V4-Pro, "per_token", for sm_100, from an empty cache each time.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from nvfp4_experts.kernels.dispatch import get_backend
from nvfp4_experts.kernels.sm100 import warm
from nvfp4_experts.kernels.sm100.config import ranges, routed_ranges
from nvfp4_experts.kernels.sm100.enter import amax_partials, enter
from nvfp4_experts.kernels.sm100.gemm import gemm
from nvfp4_experts.kernels.sm100.pipeline import Launch
from nvfp4_experts.kernels.sm100.slots import add_slots, group_slots
from nvfp4_experts.kernels.target import Target

KERNELS = amax_partials, enter, gemm, group_slots, add_slots


def forget() -> None:
    """As a new process: nothing is compiled but what is on disk."""
    for kernel in KERNELS:
        kernel.device_caches.clear()


@contextlib.contextmanager
def a_gpu_that_is_not_here(architecture: int, listener: Callable[..., None]) -> Iterator[None]:
    """Triton compiles for it, with an empty cache, and tells `listener` of each kernel; nothing can be loaded."""
    target = GPUTarget("cuda", architecture, 32)
    answers = {"get_current_target": lambda: target, "get_current_device": lambda: 0}
    fake = SimpleNamespace(**answers, get_current_stream=lambda device: 0)
    with (
        tempfile.TemporaryDirectory() as cache,
        mock.patch.dict(os.environ, TRITON_CACHE_DIR=cache),
        mock.patch.object(driver, "_active", fake),
    ):
        triton.knobs.compilation.listener = listener
        forget()
        try:
            yield
        finally:
            triton.knobs.compilation.listener = None
            forget()


def launches(launch: Launch) -> None:
    """What building the two layers compiles."""
    backend, b200 = get_backend("sm100"), Target("cuda", "B200", (10, 0), 148)
    layer, meta = (b200, "per_token", 7168, 3072), torch.device("meta")
    shared = [backend.plan(*layer, tokens) for tokens in ranges(8192)]
    routed = [backend.plan(*layer, min(slots, 8192), 384, slots) for slots in routed_ranges(8192 * 6, 384)]
    warm.call_without_tokens(meta, shared, (torch.bfloat16,), launch)
    warm.call_without_tokens(meta, routed, (torch.bfloat16, torch.float16, torch.float32), launch)


def one_by_one(calls: Callable[[Launch], None]) -> None:
    """As `warm.compile_side_by_side`, a kernel at a time."""
    calls(lambda kernel, grid, *arguments, **constants: kernel.warmup(*arguments, grid=grid, **constants))


def main() -> None:
    """Print seconds, and the share of Python's part, which holds Python's lock."""
    for compile_ in (one_by_one, warm.compile_side_by_side):
        times: list[Any] = []
        with a_gpu_that_is_not_here(100, lambda *, times, into=times, **_: into.append(times)):
            begin = time.monotonic()
            compile_(launches)
            seconds = time.monotonic() - begin
        share = sum(t.ir_initialization for t in times) / sum(t.total for t in times)
        print(f"{compile_.__name__}: {len(times)} kernels in {seconds:.1f} s, {100 * share:.0f} % of it in Python")


if __name__ == "__main__":
    main()
