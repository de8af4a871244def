# SPDX-License-Identifier: Apache-2.0
"""Parts of layers: read from a checkpoint by the rank that holds them, checked against each other, one at a time."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nvfp4_experts import Nvfp4MoE, Nvfp4RoutedExperts, Nvfp4SharedExpert, load_moe, load_routed_experts
from nvfp4_experts.checkpoints import Checkpoint, TensorInfo, load_part, load_shared_expert
from nvfp4_experts.errors import InputError, LayoutError
from nvfp4_experts.layers import parallel
from nvfp4_experts.layers.parallel import PLANS, SummedOverRanks, parallelize
from nvfp4_experts.layers.part import LayerPart
from nvfp4_experts.layers.shards import experts_of, share_of
from tests.checkpoints.factory import TINY
from tests.layers.parallel_cases import Model, block, draw, near, routed_experts, routing, same, shared_expert
from tests.layers.ranks import World
from tests.tolerances import OVER_RANKS

STATIC = ("nvfp4", "static")


def parts_that_are_read_are_those_of_the_whole_layer(world: World) -> None:
    options: dict[str, Any] = {"activations": "bf16", "max_tokens": 64}
    x, ids = draw(7, 12, 256), torch.arange(12)
    for ranks, group in world.each_group(3):
        for plan in PLANS:
            mine = slice(world.rank, None, ranks) if plan == "dispatch" else slice(None)
            for layer in (0, 3):  # by token id, and by score
                read = parallelize(load_part(TINY, layer, plan, group, **options), group, plan)
                cut = parallelize(load_moe(TINY, layer, **options), group, plan)
                same(world, read(x[mine], ids[mine]), cut(x[mine], ids[mine]), (plan, layer))
                for ours, theirs in zip(read.buffers(), cut.buffers(), strict=True):
                    world.check(ours.dtype == theirs.dtype and torch.equal(_bytes(ours), _bytes(theirs)), plan)
            alone = load_part(TINY, 3, plan, group, kind="routed", **options)
            world.check(alone.router is None and alone.shared is None, "routed experts alone")
            first = experts_of(world.rank, ranks, 8).start if plan != "tp" else 0
            world.check(alone.first_expert == first, alone.first_expert)


def _bytes(t: Tensor) -> Tensor:
    return t.contiguous().view(torch.uint8)


def a_rank_reads_no_expert_of_another(world: World) -> None:
    read: list[str] = []
    look_up = Checkpoint.info

    def noted(checkpoint: Checkpoint, name: str) -> TensorInfo:
        read.append(name)
        return look_up(checkpoint, name)

    for ranks, group in world.each_group(4):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Checkpoint, "info", noted)
            load_part(TINY, 1, "ep", group, kind="routed")
        experts = {int(name.partition(".experts.")[2].partition(".")[0]) for name in read if ".experts." in name}
        world.check(experts == set(experts_of(world.rank, ranks, 8)), experts)


def a_rank_may_hold_nothing(world: World) -> None:
    for ranks, group in world.each_group(4):
        x, indices, weights = routing(5, experts=3)
        for plan in ("ep", "dispatch"):
            few = routed_experts(STATIC, experts=3)
            part = LayerPart(
                plan, world.rank, ranks, routed=share_of(few, world.rank, ranks), first_expert=min(world.rank, 3)
            )
            world.check((part.routed is None) == (world.rank == 3), "the last rank has none")
            y = parallelize(part, group, plan)(x, indices, weights)
            near(world, y, few(x, indices, weights), OVER_RANKS["shares"], plan)


def parts_of_another_plan_or_rank_are_refused(world: World) -> None:
    for ranks, group in world.each_group(2):
        part = LayerPart("ep", world.rank, ranks, routed=share_of(routed_experts(STATIC), world.rank, ranks))
        with pytest.raises(InputError, match="must be parallelized before it is called"):
            part(*routing(3))
        with pytest.raises(InputError, match=r"kind: must be .* use load_shared_expert"):
            load_part(TINY, 1, "dispatch", group, kind="shared")
        with pytest.raises(InputError, match="plan: must be one of"):
            LayerPart("pp", world.rank, ranks)
        with pytest.raises(InputError, match="shared: must be whole and by itself, or in a block"):
            LayerPart("dispatch", world.rank, ranks, routed=part.routed, shared=shared_expert(STATIC))
        for plan, of_rank in (("dispatch", world.rank), ("ep", 1 - world.rank)):
            other = LayerPart("ep", of_rank, ranks, routed=part.routed)
            with pytest.raises(InputError, match=f"must be for plan '{plan}', rank {world.rank} of 2"):
                parallelize(other, group, plan)


def experts_are_held_once_and_all_of_them(world: World) -> None:
    for ranks, group in world.each_group(2):
        whole = block()
        share = share_of(whole.routed, world.rank, ranks)
        first = experts_of(world.rank, ranks, 6).start
        for wrong in (0, first + 1):  # forgotten; off by one
            with pytest.raises(LayoutError, match="must be the router's 0 to 5"):
                SummedOverRanks(group, routed=share, router=whole.router, first_expert=wrong)
        for of_router in (whole.router, None):
            part = LayerPart("dispatch", world.rank, ranks, routed=share, router=of_router, first_expert=first + 1)
            with pytest.raises(LayoutError, match=r"must follow each other by rank, from experts \[0, 3\]"):
                parallelize(part, group, "dispatch")
        with pytest.raises(LayoutError, match="shares that have none in common"):
            SummedOverRanks(group, routed=share, first_expert=2 * world.rank)


def activations_are_chosen_before(world: World) -> None:
    for _, group in world.each_group(2):
        x = draw(7, 5, block().routed.hidden_size)
        for plan in PLANS:
            model = parallelize(block(), group, plan)
            before = model(x)
            layer: Any = model.routed if plan == "dispatch" else model
            name = "local" if plan == "dispatch" else "routed"
            kept = getattr(layer, name)
            setattr(layer, name, kept.with_activations("nvfp4", "dynamic"))
            with pytest.raises(InputError, match="must be those that the ranks agreed on"):
                model(x)
            setattr(layer, name, kept)
            same(world, model(x), before, plan)


def one_whole_layer_is_in_memory_beside_its_part(world: World) -> None:
    """When a layer's part is made, those before it have been let go."""
    if world.rank >= 2:
        return
    model = nn.ModuleList([Model() for _ in range(3)])
    kinds = (Nvfp4MoE, Nvfp4SharedExpert, Nvfp4RoutedExperts)
    whole = [weakref.ref(m) for m in model.modules() if isinstance(m, kinds)]
    alive: list[int] = []
    cut = parallel.part_of

    def counted(*arguments: Any) -> LayerPart:
        alive.append(sum(layer() is not None for layer in whole))
        return cut(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "part_of", counted)
        parallelize(model, world.groups[2], "ep")
    of_each = [3, 1] * 3  # a block and its two layers; a shared expert
    world.check(alive == [sum(of_each[i:]) for i in range(6)], alive)


def loaders_keep_the_channels_they_are_asked_for(world: World) -> None:
    if world.rank:
        return
    whole = load_shared_expert(TINY, 2, activations="bf16"), load_routed_experts(TINY, 2, activations="bf16")
    run = range(32, 96)
    some = (
        load_shared_expert(TINY, 2, channels=run, activations="bf16"),
        load_routed_experts(TINY, 2, channels=run, activations="bf16"),
    )
    for layer, part in zip(whole, some, strict=True):
        for name in ("gate", "up", "down"):
            ours, theirs = getattr(part, name), getattr(layer, name)
            want = theirs.codes[..., 16:48] if name == "down" else theirs.codes[..., 32:96, :]
            world.check(torch.equal(ours.codes, want) and torch.equal(ours.global_scale, theirs.global_scale), name)
    with pytest.raises(LayoutError, match="multiples of 16"):
        load_shared_expert(TINY, 2, channels=range(8, 24))


CASES = {
    case.__name__: case
    for case in (
        parts_that_are_read_are_those_of_the_whole_layer,
        a_rank_reads_no_expert_of_another,
        a_rank_may_hold_nothing,
        parts_of_another_plan_or_rank_are_refused,
        experts_are_held_once_and_all_of_them,
        activations_are_chosen_before,
        one_whole_layer_is_in_memory_beside_its_part,
        loaders_keep_the_channels_they_are_asked_for,
    )
}
