# SPDX-License-Identifier: Apache-2.0
"""Routed experts in one native call: what does not show in the numbers of tests/kernels/test_routed_experts.py."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from nvfp4_experts.kernels import native
from nvfp4_experts.kernels.cpu import backend
from nvfp4_experts.kernels.cpu.backend import BACKEND, CpuBackend
from nvfp4_experts.kernels.cpu.routed import ROUTED
from nvfp4_experts.kernels.dispatch import WEIGHTINGS, Beside, Call, Routing
from nvfp4_experts.layers.routed_experts import Nvfp4RoutedExperts
from tests.kernels import cpu_oracle
from tests.kernels.test_routed_experts import LIMIT, MODES, call_of, draw_routing, make_experts, run

LOADED, REASON = native.load()
if LOADED is None:
    pytest.skip(f"the native library is not here: {REASON}", allow_module_level=True)
TIERS = [tier.name for tier in LOADED.tiers if tier.present]
NVFP4 = [mode for mode in MODES if mode[0] == "nvfp4"]
BATCH_ROWS = 4096  # of csrc/routed_experts.cpp


@pytest.fixture(params=TIERS)
def tier(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each tier in turn, forced."""
    monkeypatch.setenv(native.ISA_VARIABLE, request.param)
    return str(request.param)


@pytest.mark.parametrize("mode", NVFP4, ids=str)
def test_more_rows_than_a_batch(tier: str, mode: tuple[str, str]) -> None:
    """Batches end within an expert, and begin with another one's last rows; few experts, so that most are long."""
    weights, tokens, top_k = make_experts(4, 32, 48), 1900, 3
    x, routing = torch.randn(tokens, 32), draw_routing(tokens, top_k, experts=4)
    assert tokens * top_k * 0.9 > BATCH_ROWS
    want = cpu_oracle.routed_experts(x, *weights, routing, call_of(mode, 4))
    assert torch.equal(run("cpu", x, weights, routing, call_of(mode, 4)), want)
    everybody = Routing(torch.full((tokens, top_k), 2), routing.weights, "after_down")
    want = cpu_oracle.routed_experts(x, *weights, everybody, call_of(mode, 4))
    assert torch.equal(run("cpu", x, weights, everybody, call_of(mode, 4)), want)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_threads_and_what_scratch_held_before_change_no_bit(
    tier: str, mode: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, x = make_experts(9, 144, 80), torch.randn(50, 144)
    routing, call = draw_routing(50, 4), call_of(mode)
    want = run("cpu", x, weights, routing, call)
    for threads, byte in ((1, 0xFF), (2, 0x7F), (3, 0x00), (7, 0xFF)):
        monkeypatch.setattr(backend, "cpu_threads", lambda threads=threads: threads)
        run("cpu", x, weights, routing, call)  # scratch grows with threads
        backend._local.holder.block.fill_(byte)
        assert torch.equal(run("cpu", x, weights, routing, call), want), threads


@pytest.mark.parametrize("tokens", [1, 3, 90])
@pytest.mark.parametrize("mode", NVFP4, ids=str)
def test_bands_of_every_width(tier: str, mode: tuple[str, str], tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From 256 columns of y (few rows, one thread) to 32, the last one narrower than the others."""
    weights, x = make_experts(5, 1040, 32), torch.randn(tokens, 1040)
    routing, call = draw_routing(tokens, 3, experts=5), call_of(mode, 5)
    want = cpu_oracle.routed_experts(x, *weights, routing, call)
    for threads in (1, 2, 5, 40):
        monkeypatch.setattr(backend, "cpu_threads", lambda threads=threads: threads)
        assert torch.equal(run("cpu", x, weights, routing, call), want), threads


def moe_both_ways(
    x: Tensor, routing: Routing, calls: tuple[Call, Call], channels: int = 48, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """A layer with a shared expert: as the backend runs it, and by definition: two fp32 results, added and rounded."""
    hidden = x.shape[1]
    packed = list(ROUTED.pack(*make_experts(9, hidden, 48)).values())
    gate, up, down = make_experts(2, hidden, channels)
    beside = Beside(BACKEND, list(BACKEND.pack(gate[1], up[1], down[1]).values()), calls[1])
    got, routed, shared = torch.empty(x.shape, dtype=dtype), torch.empty(x.shape), torch.empty(x.shape)
    ROUTED.moe(x, packed, routing, calls[0], beside, got)
    ROUTED.routed_experts(x, packed, routing, calls[0], routed)
    BACKEND.shared_expert(x, beside.weights, beside.call, shared)
    return got, (routed + shared).to(dtype)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("tokens", [1, 7, 1100])
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_shared_expert_in_the_same_call(
    tier: str, mode: tuple[str, str], tokens: int, weighting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit what the two calls and their sum give, also where its rows end in another batch than they begin."""
    alone: list[object] = []
    monkeypatch.setattr(CpuBackend, "shared_expert", spied(CpuBackend.shared_expert, alone))
    routed, shared = call_of(mode), Call(LIMIT, *mode, torch.tensor([3.0]) / 2688, torch.tensor([2.7]) / 2688)
    x, routing = torch.randn(tokens, 80), draw_routing(tokens, 4, weighting)
    one_call, two_calls = moe_both_ways(x, routing, (routed, shared))
    assert torch.equal(one_call, two_calls) and len(alone) == 1
    nobody = Routing(torch.full_like(routing.indices, -1), routing.weights, weighting)
    one_call, two_calls = moe_both_ways(x, nobody, (routed, shared))
    assert torch.equal(one_call, two_calls) and one_call.count_nonzero() > 0
    one_call, two_calls = moe_both_ways(x.bfloat16(), routing, (routed, shared), dtype=torch.bfloat16)
    assert torch.equal(one_call, two_calls)


@pytest.mark.parametrize(
    "other",
    [
        {"channels": 80},
        {"calls": (call_of(("nvfp4", "dynamic")), Call(LIMIT, "bf16", "dynamic"))},
        {"calls": (call_of(("nvfp4", "dynamic")), Call(LIMIT, "nvfp4", "per_token"))},
        {"calls": (call_of(("nvfp4", "dynamic")), Call(0.5, "nvfp4", "dynamic"))},
    ],
    ids=["size", "format", "scale", "limit"],
)
def test_a_shared_expert_that_differs_runs_after_them(other: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    alone: list[object] = []
    monkeypatch.setattr(CpuBackend, "shared_expert", spied(CpuBackend.shared_expert, alone))
    options = {"calls": (call_of(("nvfp4", "dynamic")),) * 2} | other
    x = torch.randn(7, 80).bfloat16()
    got, want = moe_both_ways(x, draw_routing(7, 4), dtype=torch.bfloat16, **options)
    assert torch.equal(got, want) and len(alone) == 2


def spied(function: Callable[..., None], calls: list[object]) -> Callable[..., None]:
    """The function, which notes that it was called."""

    def noted(*arguments: Any) -> None:
        calls.append(arguments)
        function(*arguments)

    return noted


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_any_address(tier: str, mode: tuple[str, str], dtype: torch.dtype) -> None:
    weights, x, routing = make_experts(9, 48, 80), torch.randn(11, 48).to(dtype), draw_routing(11, 4)
    want = run("cpu", x, weights, routing, call_of(mode))

    def odd(t: Tensor) -> Tensor:
        """The same tensor, from an odd element of its memory on."""
        memory = torch.empty(t.numel() + 1, dtype=t.dtype)
        memory[1:] = t.flatten()
        return memory[1:].view(t.shape)

    there = Routing(odd(routing.indices), odd(routing.weights), routing.weighting)
    assert torch.equal(run("cpu", odd(x), weights, there, call_of(mode)), want)


def test_indices_of_both_widths_mean_the_same() -> None:
    weights, x = make_experts(), torch.randn(30, 64)
    indices = torch.randint(-3, 12, (30, 5))
    a, b = (Routing(indices.to(t), torch.rand(30, 5), "before_down") for t in (torch.int32, torch.int64))
    b = Routing(b.indices, a.weights, "before_down")
    call = call_of(("nvfp4", "static"))
    assert torch.equal(run("cpu", x, weights, a, call), run("cpu", x, weights, b, call))


def test_scratch_is_kept_reported_and_far_below_a_row_in_fp32_per_slot() -> None:
    tokens, top_k, hidden = 2000, 6, 512
    layer = Nvfp4RoutedExperts(*make_experts(8, hidden, 64), activations="nvfp4", activation_scale="per_token")
    assert layer.backend == "cpu"
    x, routing = torch.randn(tokens, hidden), draw_routing(tokens, top_k, experts=8)
    done: list[int] = []

    def in_a_thread_of_its_own() -> None:  # whose scratch begins with this call
        before = layer.scratch_bytes
        torch.set_num_threads(2)
        for _ in range(2):
            layer(x, routing.indices, routing.weights)
            done.append(layer.scratch_bytes - before)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(in_a_thread_of_its_own).result()
    h_values, x_and_h, down_rows, plan = 24 * 64 // 16, 24 * hidden // 16 + 4 * 64, 2 * 32 * 4, 28
    assert done[0] == done[1] <= tokens * top_k * (h_values + down_rows + plan) + BATCH_ROWS * x_and_h + (1 << 14)
    assert done[0] < tokens * top_k * hidden * 4 / 2


def test_threads_of_python_do_not_meet() -> None:
    layer = Nvfp4RoutedExperts(*make_experts(), activations="nvfp4", activation_scale="dynamic", backend="cpu")
    calls = [(torch.randn(t, 64), *vars(draw_routing(t, 4)).values()) for t in (1, 70, 9, 33)] * 6
    want = [layer(*arguments[:3]) for arguments in calls]
    with ThreadPoolExecutor(4, initializer=torch.set_num_threads, initargs=(2,)) as pool:
        for got, expected in zip(pool.map(lambda a: layer(*a[:3]), calls), want, strict=True):
            assert torch.equal(got, expected)
