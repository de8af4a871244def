# SPDX-License-Identifier: Apache-2.0
"""Layers over GPUs that reach each other's memory; run by test_gpu_ranks.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nvfp4_experts import Nvfp4SharedExpert
from nvfp4_experts.formats.nvfp4 import quantize
from nvfp4_experts.kernels.cuda.copies import copy_rows
from nvfp4_experts.layers.parallel import SummedOverRanks
from nvfp4_experts.layers.peers import peers_of
from nvfp4_experts.layers.shards import experts_of, shard_of, share_of
from tests.layers.parallel_cases import draw, routed_experts, routing, same
from tests.layers.ranks import World

H, I = 512, 256  # noqa: E741
SPREAD = [("bf16", "dynamic"), ("nvfp4", "static")]


def shared_expert(world: World, mode: tuple[str, str], size: int = I, seed: int = 1) -> Nvfp4SharedExpert:
    gate, up, down = draw(seed, size, H), draw(seed + 1, size, H), draw(seed + 2, H, size)
    weights = [quantize(w.to(world.device)) for w in (gate, up, down)]
    scales = {"input_scale": 4 / 2688, "hidden_scale": 1 / 2688}
    options: dict[str, Any] = {"activations": mode[0], "activation_scale": mode[1], "max_tokens": 9000, **scales}
    return Nvfp4SharedExpert(*weights, swiglu_limit=1.0, **options)


def states(world: World, tokens: int) -> Tensor:
    return (draw(7, tokens, H) * 5).bfloat16().to(world.device)


def sums_in_memory_are_those_of_collectives(world: World) -> None:
    (ranks, group), *_ = world.each_group(2)
    world.check(peers_of(group, world.device) is not None, "these GPUs do not reach each other")
    shared = shared_expert(world, ("nvfp4", "per_token"))  # what it measures on h keeps its tokens where they are
    routed = routed_experts(("bf16", "dynamic"), max_tokens=3000).to(world.device)
    first = experts_of(world.rank, ranks, routed.num_experts).start
    share = {"routed": share_of(routed, world.rank, ranks), "first_expert": first}
    for tokens in (1, 33, 2500):
        x, indices, weights = (t.to(world.device) for t in routing(tokens, experts=routed.num_experts))
        cases = [
            ({"shared": shard_of(shared, world.rank, ranks)}, states(world, tokens), ()),
            (share, x, (indices, weights)),
        ]
        for parts, rows, inputs in cases:
            direct, not_direct = SummedOverRanks(group, **parts), SummedOverRanks(group, **parts, direct=False)
            world.check(direct._peers is not None and not_direct._peers is None, "which is which")
            world.check(direct._spread is None, "spread")
            want = not_direct(rows, *inputs)
            for _ in range(3):
                same(world, direct(rows, *inputs), want, (tokens, list(parts)))
            out = torch.empty(rows.shape, device=world.device)
            same(world, direct(rows, *inputs, out=out), not_direct(rows, *inputs, out=torch.empty_like(out)), "fp32")


def spread_tokens_have_the_bits_of_the_whole_layer(world: World) -> None:
    (ranks, group), *_ = world.each_group(2)
    for mode in SPREAD:
        whole = shared_expert(world, mode)
        layer = SummedOverRanks(group, shared=shard_of(whole, world.rank, ranks))
        world.check(layer._spread is not None, f"{mode}: not spread")
        for tokens in (I, 8192, 8191, 9000):
            x = states(world, tokens)
            world.check(layer._spread is not None and layer._spread.takes(x), "not taken")
            want = torch.cat([whole(part) for part in x.tensor_split(ranks)])
            same(world, layer(x), want, (mode, tokens))
            out = layer(x, out=torch.empty(x.shape, device=world.device))
            wants = torch.cat([whole(p, torch.empty(p.shape, device=world.device)) for p in x.tensor_split(ranks)])
            same(world, out, wants, ("fp32", mode, tokens))
            odd = torch.empty(tokens * H + 1, dtype=x.dtype, device=world.device)[1:].view(tokens, H)
            same(world, layer(odd.copy_(x), out=torch.empty_like(odd)), want, ("begins anywhere", mode, tokens))


def layers_follow_each_other_in_a_graph(world: World) -> None:
    """Sums and spread rows use the same memory, one after the other; what a replay gives is what calls give."""
    (ranks, group), *_ = world.each_group(2)
    layers = []
    for seed in (1, 11, 21):
        whole = shared_expert(world, ("bf16", "dynamic"), seed=seed)
        layers.append(SummedOverRanks(group, shared=shard_of(whole, world.rank, ranks)))

    def run(x: Tensor) -> list[Tensor]:
        many = [layer(x) for layer in layers]
        few = [layer(many[-1][:7]) for layer in layers]
        return [*many, *few, *(layer(x) for layer in layers)]

    x = states(world, 8192)
    run(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(x)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        got = run(x)
    for factor in (1.0, 0.5, -1.0):
        x.copy_(states(world, 8192) * factor)
        graph.replay()
        graph.replay()
        for i, (g, want) in enumerate(zip(got, run(x), strict=True)):
            same(world, g, want, (factor, i))


def weights_that_moved_are_not_spread(world: World) -> None:
    (ranks, group), *_ = world.each_group(2)
    shard = shard_of(shared_expert(world, ("bf16", "dynamic")), world.rank, ranks)
    other = shard_of(shared_expert(world, ("bf16", "dynamic"), seed=31), world.rank, ranks)
    assert shard is not None and other is not None
    layer, x = SummedOverRanks(group, shared=shard), states(world, 2048)
    shard.load_state_dict(other.state_dict())
    world.check(layer._spread is not None and not layer._spread.takes(x), "taken")
    same(world, layer(x), SummedOverRanks(group, shared=other, direct=False)(x), "new weights")


def shards_that_are_no_whole_chunks_are_summed(world: World) -> None:
    (ranks, group), *_ = world.each_group(2)
    for size in (96, 32 + 16):  # the first shard has 48 channels, or 32
        whole = shared_expert(world, ("bf16", "dynamic"), size)
        layer = SummedOverRanks(group, shared=shard_of(whole, world.rank, ranks))
        world.check(layer._peers is not None and layer._spread is None, f"{size} channels")


def rows_are_copied_at_any_stride(world: World) -> None:
    source = torch.randint(256, (40, 96), dtype=torch.uint8, device=world.device)
    to = torch.zeros(40, 320, dtype=torch.uint8, device=world.device)
    copy_rows(to[:, 64:160], source)
    same(world, to[:, 64:160], source, "copied")
    world.check(int(to.count_nonzero()) == int(source.count_nonzero()), "beside it")


CASES = {
    case.__name__: case
    for case in (
        rows_are_copied_at_any_stride,
        sums_in_memory_are_those_of_collectives,
        spread_tokens_have_the_bits_of_the_whole_layer,
        layers_follow_each_other_in_a_graph,
        weights_that_moved_are_not_spread,
        shards_that_are_no_whole_chunks_are_summed,
    )
}
