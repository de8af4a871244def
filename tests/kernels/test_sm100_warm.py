# SPDX-License-Identifier: Apache-2.0
"""Building a layer compiles whatever its calls launch, several kernels at a time; no GPU: nothing is loaded or run."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from nvfp4_experts.kernels.dispatch import ACTIVATION_SCALES, Problem, Routing, get_backend, get_routed_backend  # noqa: E402
from nvfp4_experts.kernels.sm100 import warm  # noqa: E402
from nvfp4_experts.kernels.sm100.pipeline import Activations, Experts, Launch, Plan, run, scratch_of  # noqa: E402
from nvfp4_experts.kernels.target import Target  # noqa: E402
from tests.compile_time import a_gpu_that_is_not_here, forget  # noqa: E402

DTYPES = torch.bfloat16, torch.float16, torch.float32
META = torch.device("meta")
MAX_TOKENS, TOP_K = 700, 4


def kind_of(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> tuple:
    """What Triton compiles a kernel anew for, but for the alignment of addresses."""
    kinds = [str(a.dtype) if isinstance(a, Tensor) else type(a).__name__ for a in arguments]
    return kernel.fn.__name__, *kinds, *sorted(constants.items())


def launched_by(call: Any) -> set[tuple]:
    kinds: set[tuple] = set()
    call(lambda *launch, **constants: kinds.add(kind_of(*launch, **constants)))
    return kinds


def prepared_by(backend: Any, problem: Problem, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Plan], set[tuple]]:
    """The plans of a layer's building, and the kinds of kernels it compiles."""
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(warm, "make_ready", lambda *arguments: asked.append(arguments))
    backend.prepare(problem, torch.device("cuda"), MAX_TOKENS)
    [(_, plans, dtypes)] = asked
    return plans, launched_by(lambda launch: warm.call_without_tokens(META, plans, dtypes, launch))


def call_of(plan: Plan, dtype: torch.dtype, out: torch.dtype, routing: Routing | None) -> Any:
    """A call with that plan, as a function of what launches."""
    codes, scale = torch.empty(1, dtype=torch.uint8, device=META), torch.empty((), device=META)
    static = scale if plan.mode == "static" else None
    x, y = (torch.empty(plan.tokens, plan.hidden, dtype=kind, device=META) for kind in (dtype, out))
    activations = Activations(static, static, 10.0, routing)
    experts = Experts(codes, codes, scale, codes, codes, scale)
    return lambda launch: run(x, experts, activations, plan, scratch_of(plan, META), y, launch)


def needed(plan: Plan) -> dict[str, int]:
    return {name: torch.Size(shape).numel() * dtype.itemsize for name, (shape, dtype) in plan.scratch.items()}


@pytest.mark.parametrize("mode", ACTIVATION_SCALES)
@pytest.mark.parametrize("capability", [(10, 0), (12, 0)], ids=str)
def test_a_shared_expert_is_built_with_all_that_its_calls_launch(
    capability: tuple[int, int], mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = Problem(1040, 528, "nvfp4", Target("cuda", "a GPU", capability, 148), mode)
    backend = get_backend("sm100")
    plans, compiled = prepared_by(backend, problem, monkeypatch)
    scratch = max(sum(needed(plan).values()) for plan in plans)
    for tokens in range(1, MAX_TOKENS + 1):
        plan = backend.plan(problem.target, mode, 1040, 528, tokens)
        assert sum(needed(plan).values()) <= scratch, tokens
        assert launched_by(call_of(plan, torch.bfloat16, torch.bfloat16, None)) <= compiled, tokens


@pytest.mark.parametrize("mode", ACTIVATION_SCALES)
def test_a_shared_expert_beside_routed_ones_is_built_for_its_result_in_fp32(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = Problem(1040, 528, "nvfp4", Target("cuda", "a GPU", (10, 0), 148), mode)
    backend, routed = get_backend("sm100"), get_routed_backend("sm100")
    monkeypatch.setattr(type(backend), "refusal", lambda *_: None)
    _, compiled = prepared_by(backend, problem, monkeypatch)
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(warm, "make_ready", lambda *arguments: asked.append(arguments))
    routed.prepare_moe(problem, torch.device("cuda"), MAX_TOKENS)
    [(_, plans, dtypes)] = asked
    more = launched_by(lambda launch: warm.call_without_tokens(META, plans, dtypes, launch))
    kinds = set()
    for tokens in range(1, MAX_TOKENS + 1, 3):
        plan = backend.plan(problem.target, mode, 1040, 528, tokens)
        kinds |= launched_by(call_of(plan, torch.bfloat16, torch.float32, None))
    assert kinds <= compiled | more and not kinds <= compiled


@pytest.mark.parametrize("mode", ACTIVATION_SCALES)
@pytest.mark.parametrize(("capability", "experts"), [((10, 0), 6), ((10, 3), 384), ((12, 0), 1)], ids=str)
def test_routed_experts_are_built_with_all_that_their_calls_launch(
    capability: tuple[int, int], experts: int, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any number of tokens, of slots each, dtype of x, of the result and of indices, and either weighting."""
    target = Target("cuda", "a GPU", capability, 148)
    problem = Problem(1040, 528, "nvfp4", target, mode, experts, TOP_K)
    backend = get_routed_backend("sm100")
    plans, compiled = prepared_by(backend, problem, monkeypatch)
    scratch = max(sum(needed(plan).values()) for plan in plans)
    for number, tokens in enumerate(range(1, MAX_TOKENS + 1, 3)):
        for top_k in range(1, TOP_K + 1):
            plan = backend.one.plan(target, mode, 1040, 528, tokens, experts, tokens * top_k)
            assert sum(needed(plan).values()) <= scratch, (tokens, top_k)
            dtype = DTYPES[number % 3]
            out, index = (dtype, torch.float32)[number // 3 % 2], (torch.int32, torch.int64)[number // 2 % 2]
            indices = torch.empty(tokens, top_k, dtype=index, device=META)
            weighting = ("before_down", "after_down")[number % 2]
            routing = Routing(indices, torch.empty(tokens, top_k, device=META), weighting)
            assert launched_by(call_of(plan, dtype, out, routing)) <= compiled, (tokens, top_k)


# --- Triton, believing in a GPU that is not here ----------------------------------------------------------------------


@triton.jit
def cannot_compile(x):
    tl.static_assert(False, "no such kernel")
    tl.store(x, 0)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """An sm_90 without kernels; whether each compilation that ends was a look into the cache on disk."""
    hits: list[bool] = []
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    with a_gpu_that_is_not_here(90, lambda *, cache_hit, **_: hits.append(cache_hit)):
        yield hits


def calls(launch: Launch) -> None:
    plan = get_backend("sm100-decode").plan(Target("cuda", "a GPU", (9, 0), 132), "dynamic", 144, 80, 16)
    warm.call_without_tokens(META, [plan, plan], (torch.float32,), launch)


def test_kernels_compile_side_by_side_once_and_are_kept_on_disk(compiled: list[bool]) -> None:
    both, together = threading.Barrier(2, timeout=20), []

    def listener(*, cache_hit: bool, **_: Any) -> None:
        compiled.append(cache_hit)
        with contextlib.suppress(threading.BrokenBarrierError):
            together.append(both.wait())  # for another kernel that ends in another thread

    def all_four(known: int) -> list[bool]:
        """Again where Python's parser failed in a thread, as 3.11's does now and then."""
        for _ in range(5):
            if len(compiled) < known + 4:
                warm.compile_side_by_side(calls)
        return compiled[known:]

    triton.knobs.compilation.listener = listener
    assert all_four(0) == [False] * 4 and len(together) >= 2  # amax_partials, enter, gemm of either half
    warm.compile_side_by_side(calls)
    assert len(compiled) == 4
    forget()
    assert all_four(4) == [True] * 4


def test_a_kernel_that_does_not_compile_is_left_to_its_launch(compiled: list[bool]) -> None:
    x = torch.empty(1, device=META)
    warm.compile_side_by_side(lambda launch: launch(cannot_compile, (1,), x))
    with pytest.raises(triton.CompilationError, match="no such kernel"):
        cannot_compile.warmup(x, grid=(1,))
    warm.compile_side_by_side(calls)
    assert compiled and not any(compiled)
