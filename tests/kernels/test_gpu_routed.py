# SPDX-License-Identifier: Apache-2.0
"""Routed experts on a GPU: every backend against the reference, graphs, streams, and a shared expert beside them."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn

from nvfp4_experts.errors import UnsupportedError
from nvfp4_experts.kernels.dispatch import ALL_BACKENDS, WEIGHTINGS, Call, Problem, Routing, choose_routed_backend
from nvfp4_experts.kernels.sm90 import routed as sm90_routed
from nvfp4_experts.kernels.target import target_of
from nvfp4_experts.layers.moe import Nvfp4MoE
from nvfp4_experts.layers.routed_experts import Nvfp4RoutedExperts
from nvfp4_experts.layers.shared_expert import Nvfp4SharedExpert
from tests.kernels.test_gpu import requested_bytes
from tests.kernels.test_routed_experts import (
    LIMIT,
    MODES,
    Weights,
    draw_routing,
    make_experts,
    static_scales,
    wanted,
)
from tests.tolerances import against_reference

pytestmark = pytest.mark.gpu

E, K = 9, 6
SMALL, RAGGED = (256, 256), (272, 80)
BIG = [(4096, 2048), (7168, 384), (5120, 288)]  # V4-Flash; tensor-parallel slices of V4-Pro and V4.1-Flash
TOKENS = (1, 2, 8, 9, 33, 120, 400)
ROW_APART = [m for m in MODES if m != ("nvfp4", "dynamic")]


@functools.cache
def weights_of(shape: tuple[int, int]) -> Weights:
    return make_experts(E, *shape)


def make(
    shape: tuple[int, int], mode: tuple[str, str], weighting: str = "before_down", backend: str = "auto"
) -> Nvfp4RoutedExperts:
    input_scale, hidden_scale = static_scales(E)
    return Nvfp4RoutedExperts(
        *(stack.to("cuda") for stack in weights_of(shape)),
        swiglu_limit=LIMIT,
        activations=mode[0],
        activation_scale=mode[1],
        input_scale=input_scale,
        hidden_scale=hidden_scale,
        weighting=weighting,
        top_k=8,
        max_tokens=512,
        backend=backend,
    )


def make_shared(shape: tuple[int, int], mode: tuple[str, str]) -> Nvfp4SharedExpert:
    return Nvfp4SharedExpert(
        *(stack[E - 1].to("cuda") for stack in weights_of(shape)),
        swiglu_limit=LIMIT,
        activations=mode[0],
        activation_scale=mode[1],
        input_scale=5 / 2688,
        hidden_scale=3 / 2688,
        max_tokens=512,
    )


def on_gpu(routing: Routing) -> tuple[Tensor, Tensor]:
    return routing.indices.cuda(), routing.weights.cuda()


def needs_kernels(layer: nn.Module) -> None:
    if layer.backend == "torch":
        pytest.skip("the torch backend reads counts on the host")


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_matches_reference(mode: tuple[str, str], weighting: str, backend: str) -> None:
    problem = Problem(*SMALL, mode[0], target_of("cuda"), mode[1], E, 8)
    try:
        choose_routed_backend(backend, problem)
    except UnsupportedError as refusal:
        pytest.skip(str(refusal))
    call = Call(LIMIT, *mode, *static_scales(E))
    for shape in (SMALL, RAGGED):
        layer = make(shape, mode, weighting, backend)
        for tokens in TOKENS:
            x, routing = torch.randn(tokens, shape[0]), draw_routing(tokens, min(K, 1 + tokens), weighting, E)
            expected = wanted(x, weights_of(shape), routing, call).double()
            got = layer(x.cuda(), *on_gpu(routing)).cpu().double()
            # fp32 in and out: the order of sums is all that differs, but for what it pushes over a rounding.
            values = tokens * K * shape[1]
            bound = against_reference(mode[0], layer.backend, values, rounded=False, op="routed_experts")
            assert (got - expected).norm() <= bound * expected.norm(), (shape, tokens)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("shape", BIG, ids=str)
def test_matches_reference_in_the_sizes_of_models(shape: tuple[int, int], mode: tuple[str, str]) -> None:
    layer, call = make(shape, mode), Call(LIMIT, *mode, *(s.cuda() for s in static_scales(E)))
    weights = tuple(stack.to("cuda") for stack in weights_of(shape))
    for tokens in (1, 8, 60, 300):
        x, routing = torch.randn(tokens, shape[0], device="cuda").bfloat16(), draw_routing(tokens, K, experts=E)
        there = Routing(*on_gpu(routing), routing.weighting)
        expected = wanted(x, weights, there, call).double()
        values = tokens * K * shape[1]
        bound = against_reference(mode[0], layer.backend, values, rounded=True, op="routed_experts")
        assert (layer(x, *on_gpu(routing)).double() - expected).norm() <= bound * expected.norm(), tokens


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_one_graph_serves_any_routing_without_the_host_or_an_allocation(mode: tuple[str, str]) -> None:
    layer = make(SMALL, mode)
    needs_kernels(layer)
    for tokens in (4, 40):
        x = torch.randn(tokens, SMALL[0], device="cuda").bfloat16()
        indices, weights = on_gpu(draw_routing(tokens, K, experts=E))
        out = torch.empty_like(x)
        layer(x, indices, weights, out=out)
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        torch.cuda.set_sync_debug_mode("error")
        try:
            layer(x, indices, weights, out=out)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            layer(x, indices, weights, out=out)
        for fill in (None, 0, -1):  # drawn; all on one expert; nobody here
            other, factors = on_gpu(draw_routing(tokens, K, experts=E))
            indices.copy_(other if fill is None else torch.full_like(other, fill))
            weights.copy_(factors)
            x.copy_(torch.randn_like(x))
            graph.replay()
            replayed = out.clone()
            assert torch.equal(replayed, layer(x, indices, weights)) and (fill != -1 or not replayed.any())


@pytest.mark.parametrize("mode", ROW_APART, ids=str)
def test_a_token_does_not_know_the_others(mode: tuple[str, str]) -> None:
    layer = make(SMALL, mode)
    for tokens in (7, 60):
        x = torch.randn(tokens, SMALL[0], device="cuda").bfloat16()
        indices, weights = on_gpu(draw_routing(tokens, K, experts=E))
        y, order = layer(x, indices, weights), torch.randperm(tokens, device="cuda")
        assert torch.equal(layer(x[order], indices[order], weights[order]), y[order])
        x[1:], indices[1:] = float("nan"), indices[1:].flip(0)
        assert torch.equal(layer(x, indices, weights)[0], y[0])


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("tokens", [1, 8, 40, 300])
def test_a_shared_expert_beside_is_its_result_added_last(tokens: int, mode: tuple[str, str]) -> None:
    routed, shared = make(SMALL, mode), make_shared(SMALL, mode)
    routed.prepare_with(shared)
    x, (indices, weights) = (
        torch.randn(tokens, SMALL[0], device="cuda").bfloat16(),
        on_gpu(draw_routing(tokens, K, experts=E)),
    )
    parts = [
        part(x, *more, out=torch.empty(x.shape, device="cuda"))
        for part, more in ((routed, (indices, weights)), (shared, ()))
    ]
    assert torch.equal(routed.with_shared(x, indices, weights, shared), (parts[0] + parts[1]).bfloat16())
    out = torch.empty(x.shape, device="cuda")
    assert torch.equal(routed.with_shared(x, indices, weights, shared, out), parts[0] + parts[1])


@pytest.mark.parametrize("tokens", [4, 40, 300])
@pytest.mark.parametrize(
    ("mode", "of_shared"),
    [(("bf16", "dynamic"), ("fp8", "dynamic")), (("fp8", "dynamic"), ("bf16", "dynamic"))],
    ids=str,
)
def test_a_shared_expert_of_another_format_beside(
    mode: tuple[str, str], of_shared: tuple[str, str], tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sm90_routed, "_MOST_SLOTS", {})  # grouped alone too, as beside: sums in one order
    routed, shared = make(SMALL, mode), make_shared(SMALL, of_shared)
    routed.prepare_with(shared)
    x = torch.randn(tokens, SMALL[0], device="cuda").bfloat16()
    chosen = on_gpu(draw_routing(tokens, K, experts=E))
    parts = [part(x, *more, out=torch.empty(x.shape, device="cuda")) for part, more in ((routed, chosen), (shared, ()))]
    got = routed.with_shared(x, *chosen, shared, torch.empty(x.shape, device="cuda"))
    assert torch.equal(got, parts[0] + parts[1])


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_call_does_not_see_what_another_left(mode: tuple[str, str]) -> None:
    """More tokens before fewer and fewer before more, in any order, with a shared expert and without; nobody's too."""
    layer, shared = make(SMALL, mode), make_shared(SMALL, mode)
    calls = []
    for tokens in (8, 1, 3, 8, 2):
        x, (indices, weights) = (
            torch.randn(tokens, SMALL[0], device="cuda").bfloat16(),
            on_gpu(draw_routing(tokens, K, experts=E)),
        )
        for chosen in (indices, torch.full_like(indices, -1)):
            calls += [
                functools.partial(layer, x, chosen, weights),
                functools.partial(layer.with_shared, x, chosen, weights, shared),
            ]
    first = [call() for call in calls]
    for turn in torch.randint(len(calls), (400,)).tolist():
        assert torch.equal(calls[turn](), first[turn])


@pytest.mark.parametrize("tokens", [4, 40])
def test_streams_and_graphs_at_once_do_not_meet(tokens: int) -> None:
    layer, shared = make(SMALL, ("bf16", "dynamic")), make_shared(SMALL, ("bf16", "dynamic"))
    needs_kernels(layer)
    routed = on_gpu(draw_routing(tokens, K, experts=E))
    x = torch.randn(tokens, SMALL[0], device="cuda").bfloat16()
    expected = layer.with_shared(x, *routed, shared)
    graphs, outs, streams = [], [], [torch.cuda.Stream() for _ in range(3)]
    for _ in streams:
        graph, out = torch.cuda.CUDAGraph(), torch.empty_like(x)
        with torch.cuda.graph(graph):
            for _ in range(8):
                layer.with_shared(x, *routed, shared, out)
        graphs.append(graph)
        outs.append(out)
    eager = []
    for _ in range(50):
        for stream, graph in zip(streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
                eager.append(layer.with_shared(x, *routed, shared))
    torch.cuda.synchronize()
    assert all(torch.equal(out, expected) for out in (*outs, *eager))


def test_another_format_is_the_layer_built_so_even_where_it_is_packed_anew() -> None:
    x, (indices, weights) = torch.randn(40, SMALL[0], device="cuda").bfloat16(), on_gpu(draw_routing(40, K, experts=E))
    layers = {mode: make(SMALL, mode) for mode in MODES}
    for before in (("bf16", "dynamic"), ("fp8", "dynamic")):
        for after in MODES:
            other = layers[before].with_activations(*after)
            assert other.backend == layers[after].backend
            assert torch.equal(other(x, indices, weights), layers[after](x, indices, weights)), (before, after)


class Preset(nn.Module):
    """A router that has made up its mind."""

    def __init__(self, indices: Tensor, weights: Tensor) -> None:
        super().__init__()
        self.register_buffer("indices", indices)
        self.register_buffer("weights", weights)

    def forward(self, x: Tensor, token_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.indices[: len(x)], self.weights[: len(x)]


@pytest.mark.parametrize("compile_mode", [None, "reduce-overhead"])
def test_the_block_compiles_whole(compile_mode: str | None) -> None:
    mode = ("nvfp4", "per_token")
    routed = make(SMALL, mode)
    needs_kernels(routed)
    block = Nvfp4MoE(Preset(*on_gpu(draw_routing(40, K, experts=E))), routed, make_shared(SMALL, mode))
    compiled = torch.compile(block, fullgraph=True, mode=compile_mode)
    for tokens in (4, 40):
        x = torch.randn(tokens, SMALL[0], device="cuda").bfloat16()
        for _ in range(3):
            assert torch.equal(compiled(x).clone(), block(x))


def test_memory_is_the_packed_weights() -> None:
    values = 3 * E * 4096 * 2048
    make((4096, 2048), ("bf16", "dynamic"))
    before = requested_bytes()
    layer = make((4096, 2048), ("bf16", "dynamic"))
    assert requested_bytes() - before <= 0.5625 * 1.02 * values
    assert layer.resident_bytes <= 0.5625 * 1.02 * values
