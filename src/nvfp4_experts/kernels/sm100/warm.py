# SPDX-License-Identifier: Apache-2.0
"""What a layer's calls run, compiled side by side and loaded before the first of them.

    plans -> calls without a token, launched nowhere: their kernels compile in threads, into Triton's cache on disk
          -> the same calls, launched: each kernel is loaded, and does nothing

Threads are Triton's own way (`AsyncCompileMode`): it compiles in C++ and in the assembler's process for the most part,
where Python's lock is free.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import triton

from ..cuda import workspace
from ..cuda.workspace import bytes_of
from ..dispatch import Routing
from .pipeline import Activations, Experts, Launch, Plan, launch_now, run, scratch_of

_COMPILERS = 16


def make_ready(device: torch.device, plans: Sequence[Plan], dtypes: Sequence[torch.dtype]) -> None:
    """Reserve the scratch of calls with these plans; compile and load their kernels, for x and y of these dtypes."""

    def calls(launch: Launch) -> None:
        call_without_tokens(device, plans, dtypes, launch)

    with torch.cuda.device(device), workspace.exclusive(device):
        workspace.reserve(device, max(bytes_of(list(plan.scratch.values())) for plan in plans))
        compile_side_by_side(calls)
        calls(launch_now)


def compile_side_by_side(calls: Callable[[Launch], None]) -> None:
    """Compile the kernels that `calls` launches with what it is given, several at a time; none runs.

    One that does not compile is left to its launch, which compiles it again, alone, and says what is wrong with it: in
    threads it may be Python 3.11's parser, which counts the depth of all threads together.
    """

    def only_compile(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        with contextlib.suppress(SystemError):  # of the parser, see above
            kernel.warmup(*arguments, grid=grid, **constants)

    def compile_all() -> None:
        with (
            ThreadPoolExecutor(min(_COMPILERS, os.cpu_count() or 1)) as pool,
            triton.AsyncCompileMode(pool, ignore_errors=True),
        ):
            calls(only_compile)

    contextvars.copy_context().run(compile_all)  # Triton 3.6 leaves its mode on where a kernel does not compile


def call_without_tokens(
    device: torch.device, plans: Sequence[Plan], dtypes: Sequence[torch.dtype], launch: Launch
) -> None:
    """Every kernel that calls with these plans can need, routed ones with indices of either dtype."""
    codes, scale = torch.empty(1, dtype=torch.uint8, device=device), torch.empty((), device=device)
    experts = Experts(codes, codes, scale, codes, codes, scale)
    for plan in plans:
        static = scale if plan.mode == "static" else None
        for dtype in dtypes:
            x = torch.empty(0, plan.hidden, dtype=dtype, device=device)
            for routing in _routings(device) if plan.slots else (None,):
                activations = Activations(static, static, torch.inf, routing)
                run(x, experts, activations, plan, scratch_of(plan, device), x, launch)


def _routings(device: torch.device) -> list[Routing]:
    return [
        Routing(torch.empty(0, 1, dtype=dtype, device=device), torch.empty(0, 1, device=device), "before_down")
        for dtype in (torch.int32, torch.int64)
    ]
