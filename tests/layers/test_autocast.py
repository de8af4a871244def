# SPDX-License-Identifier: Apache-2.0
"""torch.autocast changes nothing: every layer gives the bits that it gives without it, in the dtype of x."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nvfp4_experts import KeptSharedExpert, Nvfp4MoE, Nvfp4RoutedExperts, Nvfp4SharedExpert
from nvfp4_experts.layers.routing import Router

E, H, I, K, T = 6, 96, 64, 2, 40  # noqa: E741
MODES = [("bf16", "dynamic"), ("fp8", "dynamic"), ("nvfp4", "dynamic"), ("nvfp4", "per_token")]
DTYPES = [torch.float32, torch.bfloat16]


def under_autocast(call: Callable[[], Any]) -> Any:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (torch.ones(1, 1) @ torch.ones(1, 1)).dtype == torch.bfloat16
        return call()


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * 0.3


def shared_expert(mode: tuple[str, str] = MODES[0], backend: str = "torch") -> Nvfp4SharedExpert:
    options = {"activations": mode[0], "activation_scale": mode[1], "backend": backend}
    return Nvfp4SharedExpert.from_weights(draw(I, H), draw(I, H), draw(H, I), **options)


def routed_experts(mode: tuple[str, str] = MODES[0], backend: str = "torch") -> Nvfp4RoutedExperts:
    options = {"activations": mode[0], "activation_scale": mode[1], "backend": backend}
    return Nvfp4RoutedExperts.from_weights(draw(E, I, H), draw(E, I, H), draw(E, H, I), **options)


def router(by_table: bool = False) -> Router:
    table = torch.arange(T * K).view(T, K) % E
    return Router(draw(E, H), K, **({"tid2eid": table} if by_table else {"bias": draw(E)}))


def kept_expert(dtype: torch.dtype = torch.float32) -> KeptSharedExpert:
    return KeptSharedExpert(*(draw(*shape).to(dtype) for shape in ((I, H), (I, H), (H, I))))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_shared_and_routed_experts(backend: str, mode: tuple[str, str], dtype: torch.dtype) -> None:
    x, routes = torch.randn(T, H).to(dtype), router()(torch.randn(T, H))
    calls: list[tuple[nn.Module, tuple[Tensor, ...]]] = [
        (shared_expert(mode, backend), (x,)),
        (routed_experts(mode, backend), (x, *routes)),
    ]
    for layer, arguments in calls:
        want = layer(*arguments)
        got = under_autocast(lambda f=layer, a=arguments: f(*a))
        assert got.dtype == dtype and torch.equal(got, want)
        out = torch.empty(T, H)
        assert under_autocast(lambda f=layer, a=arguments, o=out: f(*a, out=o)) is out
        assert torch.equal(out.to(dtype), want)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kept_expert(weights: torch.dtype, dtype: torch.dtype) -> None:
    expert, x = kept_expert(weights), torch.randn(T, H).to(dtype)
    want = expert(x)
    got = under_autocast(lambda: expert(x))
    assert got.dtype == dtype and torch.equal(got, want)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("by_table", [False, True], ids=["scores", "table"])
def test_router(by_table: bool, compiled: bool) -> None:
    torch._dynamo.reset()
    route, x = router(by_table), torch.randn(T, H)
    ids = torch.arange(T) if by_table else None
    want = route(x, ids)
    call = torch.compile(route, fullgraph=True, backend="aot_eager") if compiled else route
    for got in (call(x, ids), under_autocast(lambda: call(x, ids)), call(x, ids)):
        assert [t.dtype for t in got] == [torch.int64, torch.float32]
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("kept", [False, True], ids=["nvfp4", "kept"])
def test_block(kept: bool) -> None:
    block = Nvfp4MoE(router(), routed_experts(), kept_expert() if kept else shared_expert())
    x = torch.randn(T, H)
    assert torch.equal(under_autocast(lambda: block(x)), block(x))


@pytest.mark.parametrize("routed", [False, True], ids=["shared", "routed"])
def test_calibration(routed: bool) -> None:
    x = torch.randn(T, H)
    arguments = (x, *router()(x)) if routed else (x,)
    one, other = ((routed_experts if routed else shared_expert)() for _ in range(2))
    want, got = one.calibrate(*arguments), under_autocast(lambda: other.calibrate(*arguments))
    assert torch.equal(got, want)
    for name in ("_input_scale", "_hidden_scale"):
        assert torch.equal(getattr(other, name), getattr(one, name))


def test_compiled_expert() -> None:
    torch._dynamo.reset()
    expert, x = shared_expert(), torch.randn(T, H)
    compiled = torch.compile(expert, fullgraph=True, backend="aot_eager")
    assert torch.equal(under_autocast(lambda: compiled(x)), expert(x))


def test_autocast_is_on_again_afterwards() -> None:
    def call() -> list[torch.dtype]:
        x, dtypes = torch.randn(T, H), []
        for run in (shared_expert(), kept_expert(), router(), shared_expert().calibrate):
            run(x)
            dtypes.append((x @ x.T).dtype)
        return dtypes

    assert under_autocast(call) == [torch.bfloat16] * 4


def test_router_on_a_device_without_autocast() -> None:
    indices, weights = under_autocast(lambda: router().to("meta")(torch.empty(T, H, device="meta")))
    assert indices.is_meta and weights.shape == (T, K)
