# SPDX-License-Identifier: Apache-2.0
"""Layers over 2 to 4 ranks against the same layers in one process; run by test_parallel.py.

Every rank knows everything (weights, the tokens of all), so each compares its own result.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from nvfp4_experts import KeptSharedExpert, Nvfp4MoE, Nvfp4RoutedExperts, Nvfp4SharedExpert
from nvfp4_experts.errors import InputError, LayoutError, UnsupportedError
from nvfp4_experts.formats.nvfp4 import Nvfp4Tensor, quantize
from nvfp4_experts.layers import collectives
from nvfp4_experts.layers.dispatched import DispatchedOverRanks
from nvfp4_experts.layers.parallel import SummedOverRanks, parallelize
from nvfp4_experts.layers.routing import Router
from nvfp4_experts.layers.shards import experts_of, shard_of, share_of
from tests.layers.ranks import World
from tests.tolerances import AGAINST_REFERENCE, OVER_RANKS

E, H, I, K = 6, 64, 48, 3  # noqa: E741
MODES = [("bf16", "dynamic"), ("fp8", "dynamic"), *(("nvfp4", scale) for scale in ("static", "dynamic", "per_token"))]
EXACT_ENTRY = [("bf16", "dynamic"), ("nvfp4", "static")]  # nothing is measured on h
TOKENS = (5, 0, 3, 7)  # of each rank, where each has its own


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.2


def shared_expert(mode: tuple[str, str], size: int = I) -> Nvfp4SharedExpert:
    weights = draw(1, size, H), draw(2, size, H), draw(3, H, size)
    options: dict[str, Any] = {"activations": mode[0], "activation_scale": mode[1], "swiglu_limit": 1.0}
    return Nvfp4SharedExpert.from_weights(*weights, input_scale=4 / 2688, hidden_scale=1 / 2688, **options)


def routed_experts(mode: tuple[str, str], experts: int = E, **options: Any) -> Nvfp4RoutedExperts:
    weights = draw(4, experts, I, H), draw(5, experts, I, H), draw(6, experts, H, I)
    options = {"activations": mode[0], "activation_scale": mode[1], "swiglu_limit": 1.0, "max_tokens": 64} | options
    scales = torch.linspace(2, 6, experts) / 2688, torch.linspace(0.3, 0.1, experts) / 2688
    return Nvfp4RoutedExperts.from_weights(*weights, input_scale=scales[0], hidden_scale=scales[1], **options)


def routing(tokens: int, top_k: int = K, experts: int = E, seed: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """x, indices and weights; some indices are outside of [0, E), and those of the largest token all are."""
    g = torch.Generator().manual_seed(seed)
    indices = torch.rand(tokens, experts + 2, generator=g).argsort(-1)[:, :top_k] - 1
    x = draw(seed, tokens, H) * 5
    indices[0], x[0] = -1, 4 * x[0]  # "dynamic" looks at it, wherever its rows do not go
    return x, indices, torch.rand(tokens, top_k, generator=g)


def in_rank_order(parts: list[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def same(world: World, got: Tensor, want: Tensor, what: object) -> None:
    alike = got.dtype == want.dtype and got.shape == want.shape
    equal = alike and torch.equal(got.nan_to_num(9e9), want.nan_to_num(9e9))
    world.check(equal, f"{what}: {(got != want).sum() if alike else (got.dtype, got.shape)} values differ")


def rel_l2(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def near(world: World, got: Tensor, want: Tensor, bound: float, what: object) -> None:
    error = rel_l2(got, want)
    world.check(error <= bound, f"{what}: rel-L2 {error:.3g}, bound {bound:.3g}")


def in_chunks(layer: nn.Module | None, x: Tensor, tokens: int) -> Tensor:
    """A shard's part: bf16 sums on a CPU may depend on the number of tokens."""
    return torch.zeros_like(x) if layer is None else torch.cat([layer(chunk) for chunk in x.split(tokens)])


def sums_are_in_rank_order_in_one_step_or_two(world: World) -> None:
    for ranks, group in world.each_group(2, 3, 4):
        for n in (1, 5, 48, 1000):
            parts = [draw(rank, n) * 10.0 ** (3 * (rank % 2)) for rank in range(ranks)]
            want = in_rank_order(parts)
            if n == 1000 and ranks > 2:
                world.check(not torch.equal(want, in_rank_order(parts[::-1])), "these sums tell no order from another")
            for few in (0, collectives.FEW_BYTES):
                for dtype in (torch.float32, torch.bfloat16):
                    y = torch.empty(n, dtype=dtype)
                    part = torch.full((collectives.padded(n, ranks),), torch.nan)
                    part[:n] = parts[world.rank]
                    with pytest.MonkeyPatch.context() as patch:
                        patch.setattr(collectives, "FEW_BYTES", few)
                        steps = list(collectives.sum_in_rank_order(part, y, group))
                    same(world, y, want.to(dtype), (ranks, n, few, dtype))
                    world.check(len(steps) == (1 if few else 2), f"{len(steps)} steps")


def shards_of_a_shared_expert_add_up(world: World) -> None:
    x = draw(7, 21, H) * 5
    half = x.bfloat16()
    for size in (288, 272, 16):  # over 4: even in blocks and not in 128s; uneven; three ranks with nothing
        for mode in MODES:
            whole = shared_expert(mode, size)
            for ranks, group in world.each_group(2, 3, 4):
                what = size, mode, ranks
                shards = [shard_of(whole, rank, ranks) for rank in range(ranks)]
                layer = SummedOverRanks(group, shared=shards[world.rank])
                got = layer(x)
                same(world, got, in_rank_order([in_chunks(s, x, 21) for s in shards]), what)
                if mode in EXACT_ENTRY:
                    near(world, got, whole(x), OVER_RANKS["shards"], what)
                in_fp32 = in_rank_order([in_chunks(s, half.float(), 21) for s in shards])
                same(world, layer(half), in_fp32.bfloat16(), ("rounded once", *what))
                out = torch.empty(3, 7, H)
                layer(half.view(3, 7, H), out=out)
                same(world, out.view(21, H), in_fp32, ("fp32 for bf16", *what))
                same(world, layer(x[:0]), x[:0], "no tokens")


def shards_that_measure_their_own_channels_are_as_near_to_exact_math(world: World) -> None:
    x = draw(7, 64, H) * 5
    gate, up, down = (w.dequantize() for w in shared_expert(MODES[0], 288)._projections())
    h = nn.functional.silu((x @ gate.T).clamp(max=1.0)) * (x @ up.T).clamp(-1.0, 1.0)
    exact = h @ down.T
    for mode in MODES:
        for ranks, group in world.each_group(4):
            whole = shared_expert(mode, 288)
            got = SummedOverRanks(group, shared=shard_of(whole, world.rank, ranks))(x)
            # Scales of fewer channels are no larger; 5 % is what luck may do on 64 rows.
            near(world, got, exact, 1.05 * rel_l2(whole(x), exact), mode)


def where_sums_are_exact_a_sharded_expert_is_the_whole_one(world: World) -> None:
    """Gates of 32 and more make silu the identity in fp32; small whole numbers make every sum exact."""
    size = 80
    g = torch.Generator().manual_seed(0)
    x = torch.ones(9, H)
    x[:, 1:] = torch.randint(0, 2, (9, H - 1), generator=g).float()
    gate, up, down = torch.zeros(size, H), torch.zeros(size, H), torch.randint(-2, 3, (H, size), generator=g).float()
    gate[:, 0], up[:, :8] = 6.0, torch.randint(-2, 3, (size, 8), generator=g).float()
    weights = [_whole_numbers(gate, 8.0), _whole_numbers(up), _whole_numbers(down)]  # gate = 48
    whole = Nvfp4SharedExpert(*weights, swiglu_limit=0, activations="bf16")
    want = whole(x)
    world.check(bool(want.std() > 10) and torch.equal(want, want.round()), "these are no whole numbers")
    for ranks, group in world.each_group(2, 3, 4):
        same(world, SummedOverRanks(group, shared=shard_of(whole, world.rank, ranks))(x), want, ranks)


def _whole_numbers(w: Tensor, factor: float = 1.0) -> Nvfp4Tensor:
    """w * factor exactly, for w among 0, ±1, ±2 and 6: block scales 1."""
    q = quantize(w.clone())
    ones = torch.ones(q.block_scales.shape).to(torch.float8_e4m3fn)
    table = {0.0: 0, 1.0: 2, 2.0: 4, 6.0: 7}
    codes = torch.tensor([[table[abs(v)] | (8 if v < 0 else 0) for v in row] for row in w.tolist()], dtype=torch.uint8)
    made = Nvfp4Tensor(codes[:, 0::2] | (codes[:, 1::2] << 4), ones, torch.tensor(factor))
    assert torch.equal(made.dequantize(), w * factor)
    return made


def chunks_travel_while_the_next_is_computed(world: World) -> None:
    x, indices, weights = routing(23)
    for ranks, group in world.each_group(2, 4):
        for mode in MODES:
            parts = {
                "routed": share_of(routed_experts(mode), world.rank, ranks),
                "shared": shard_of(shared_expert(mode), world.rank, ranks),
                "first_expert": experts_of(world.rank, ranks, E).start,
            }
            at_once = SummedOverRanks(group, **parts, chunk_tokens=12)
            want = at_once(x, indices, weights)
            whole_batch = mode == ("nvfp4", "dynamic")
            for few in (0, collectives.FEW_BYTES):
                layer = SummedOverRanks(group, **parts, chunk_tokens=5)
                world.check(len(layer._chunks(23)) == (1 if whole_batch else 5), "chunks")
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(collectives, "FEW_BYTES", few)
                    got = layer(x, indices, weights)
                if not whole_batch:
                    runs = [at_once(*(t[i : i + 5] for t in (x, indices, weights))) for i in range(0, 23, 5)]
                    want = torch.cat(runs)
                same(world, got, want, (mode, ranks, few))


def shards_of_routed_experts_add_up(world: World) -> None:
    x, indices, weights = routing(17)
    for mode in MODES:
        whole = routed_experts(mode)
        for ranks, group in world.each_group(2, 4):  # 48 channels are three blocks: one of four ranks has none
            shards = [shard_of(whole, rank, ranks) for rank in range(ranks)]
            got = SummedOverRanks(group, routed=shards[world.rank])(x, indices, weights)
            parts = [torch.zeros_like(x) if s is None else s(x, indices, weights) for s in shards]
            same(world, got, in_rank_order(parts), (mode, ranks))
            if mode in EXACT_ENTRY:
                near(world, got, whole(x, indices, weights), OVER_RANKS["shards"], (mode, ranks))


def shares_of_routed_experts_add_up(world: World) -> None:
    for mode in MODES:
        for top_k in (2, 6):
            experts = 9 if top_k == 6 else 3  # over 4 ranks: 3, 2, 2, 2; and 1, 1, 1, 0
            whole = routed_experts(mode, experts)
            x, indices, weights = routing(19, top_k, experts)
            want = whole(x, indices, weights)
            for ranks, group in world.each_group(2, 4):
                first = experts_of(world.rank, ranks, experts).start
                layer = SummedOverRanks(group, routed=share_of(whole, world.rank, ranks), first_expert=first)
                got = layer(x, topk_weights=weights, topk_indices=indices)
                if top_k == 2:  # a + b = b + a
                    same(world, got, want, (mode, ranks))
                near(world, got, want, OVER_RANKS["shares"], (mode, ranks))


def dispatched_slots_are_the_whole_layer_bit_for_bit(world: World) -> None:
    for mode in MODES:
        for weighting in ("before_down", "after_down"):
            whole = routed_experts(mode, weighting=weighting)
            for ranks, group in world.each_group(2, 3, 4):
                x, indices, weights = routing(sum(TOKENS[:ranks]))
                mine = _tokens_of(world.rank)
                layer = DispatchedOverRanks(share_of(whole, world.rank, ranks), group)
                world.check((layer.num_experts, layer.max_tokens, layer.top_k) == (E, 64, 8), repr(layer))
                for dtype in (torch.float32, torch.bfloat16):
                    rows = x.to(dtype)
                    want = whole(rows, indices, weights)[mine]
                    same(world, layer(rows[mine], indices[mine], weights[mine]), want, (mode, weighting, ranks, dtype))
                out = torch.empty(1, TOKENS[world.rank], H)
                layer(rows[mine][None], indices[mine][None].int(), weights[mine][None].bfloat16(), out=out)
                want = whole(rows, indices, weights.bfloat16(), out=torch.empty(x.shape))[mine]
                same(world, out[0], want, "fp32 for bf16")


def dispatched_ranks_add_slots_by_rank(world: World) -> None:
    for mode in MODES:
        whole = routed_experts(mode, experts=9)
        for ranks, group in world.each_group(2, 4):
            x, indices, weights = routing(sum(TOKENS[:ranks]), 6, 9)
            mine = _tokens_of(world.rank)
            layer = DispatchedOverRanks(share_of(whole, world.rank, ranks), group, combine="ranks")
            got = layer(x[mine], indices[mine], weights[mine])
            firsts = [experts_of(rank, ranks, 9).start for rank in range(ranks)]
            parts = [share_of(whole, rank, ranks)(x, indices - firsts[rank], weights) for rank in range(ranks)]
            same(world, got, in_rank_order(parts)[mine], (mode, ranks))
            if len(got):
                near(world, got, whole(x, indices, weights)[mine], OVER_RANKS["shares"], (mode, ranks))


def shares_may_be_of_any_size_or_none(world: World) -> None:
    whole = routed_experts(("nvfp4", "dynamic"))
    for sizes in ((2, 0, 3, 1), (0, 0, 0, 6), (6, 0, 0, 0)):
        for ranks, group in world.each_group(4):
            first = sum(sizes[: world.rank])
            run = slice(first, first + sizes[world.rank])
            share = None if not sizes[world.rank] else _share(whole, run)
            x, indices, weights = routing(sum(TOKENS[:ranks]))
            mine = _tokens_of(world.rank)
            for combine in ("slots", "ranks"):
                layer = DispatchedOverRanks(share, group, combine=combine)
                got = layer(x[mine], indices[mine], weights[mine])
                want = whole(x, indices, weights)[mine]
                if combine == "slots":
                    same(world, got, want, sizes)
                elif len(got):
                    near(world, got, want, OVER_RANKS["shares"], sizes)


def nobody_has_tokens_or_nobody_is_chosen(world: World) -> None:
    for _, group in world.each_group(2):
        layer = DispatchedOverRanks(share_of(routed_experts(("nvfp4", "dynamic")), world.rank, 2), group)
        x, indices, weights = routing(4)
        same(world, layer(x[:0], indices[:0], weights[:0]), x[:0], "no tokens")
        same(world, layer(x, torch.full_like(indices, E), weights), torch.zeros_like(x), "nobody is chosen")


def nan_is_where_the_whole_layer_has_it(world: World) -> None:
    for mode in MODES:
        whole = routed_experts(mode)
        for ranks, group in world.each_group(4):
            x, indices, weights = routing(sum(TOKENS))
            x[2, 5] = torch.nan
            mine = _tokens_of(world.rank)
            want = whole(x, indices, weights)
            world.check(bool(want.isnan().any()), "no NaN")
            layer = DispatchedOverRanks(share_of(whole, world.rank, ranks), group)
            same(world, layer(x[mine], indices[mine], weights[mine]), want[mine], mode)


def _tokens_of(rank: int) -> slice:
    return slice(sum(TOKENS[:rank]), sum(TOKENS[: rank + 1]))


def _share(whole: Nvfp4RoutedExperts, run: slice) -> Nvfp4RoutedExperts:
    weights = [[w[e] for e in range(E)[run]] for w in whole._projections()]
    mode = whole.activations, whole.activation_scale
    options = {"activations": mode[0], "activation_scale": mode[1], "swiglu_limit": 1.0, "max_tokens": 64}
    return Nvfp4RoutedExperts.from_weights(*weights, **options)


def block() -> Nvfp4MoE:
    mode = "nvfp4", "static"
    return Nvfp4MoE(Router(draw(9, E, H), K, bias=draw(10, E)), routed_experts(mode), shared_expert(mode))


class Model(nn.Module):
    """A block, and a shared expert that is in none."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([block(), shared_expert(("nvfp4", "static"))])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def models_are_parallelized_by_every_plan(world: World) -> None:
    x = draw(7, 24, H) * 5
    for ranks, group in world.each_group(2, 4):
        mesh = DeviceMesh.from_group(group, "cpu")
        for plan in ("tp", "ep", "dispatch"):
            model = Model()
            world.check(parallelize(model, mesh if plan == "tp" else group, plan) is model, "in place")
            kinds = [type(m).__name__ for m in model.layers]
            if plan == "dispatch":
                world.check(kinds == ["Nvfp4MoE", "Nvfp4SharedExpert"], kinds)
                mine = x[world.rank :: ranks]
                same(world, model(mine), Model()(mine), plan)
            else:
                world.check(kinds == ["SummedOverRanks"] * 2, kinds)
                # What enters the second layer differs in last bits, and its codes as tolerances.py says.
                near(world, model(x), Model()(x), AGAINST_REFERENCE["routed_experts", "nvfp4"], plan)
            held = sum(m.num_experts for m in model.modules() if isinstance(m, Nvfp4RoutedExperts))
            of_every_expert = E if world.rank < I // 16 else 0
            want = of_every_expert if plan == "tp" else len(experts_of(world.rank, ranks, E))
            world.check(held == want, f"{plan}: {held} experts, not {want}")
        for plan in (
            "tp",
            "ep",
            "dispatch",
        ):  # a shared expert that is kept as it is has no shards: the first rank has it
            kept = KeptSharedExpert(draw(1, I, H), draw(2, I, H), draw(3, H, I), swiglu_limit=1.0)
            hybrid = parallelize(Nvfp4MoE(block().router, block().routed, kept), group, plan)
            near(
                world,
                hybrid(x),
                Nvfp4MoE(block().router, block().routed, kept)(x),
                OVER_RANKS["shards"],
                f"{plan}, kept",
            )
        one = parallelize(block(), group, "ep")
        world.check(isinstance(one, SummedOverRanks) and f"rank={world.rank} of {ranks}" in repr(one), repr(one))
        near(world, one(x), block()(x), OVER_RANKS["shards"], "a block itself")


def disagreements_are_errors_on_every_rank(world: World) -> None:
    for _, group in world.each_group(4):
        mode = MODES[world.rank % 2]
        with pytest.raises(LayoutError, match="shared: must be the same on every rank"):
            SummedOverRanks(group, shared=shard_of(shared_expert(mode), world.rank, 2 * 2))
        shard = shard_of(shared_expert(MODES[0]), world.rank, 4)
        for name, values in (("chunk_tokens", (None, 5)), ("direct", (True, False))):
            with pytest.raises(LayoutError, match=f"{name}: must be the same on every rank"):
                SummedOverRanks(group, shared=shard, **{name: values[world.rank % 2]})
        with pytest.raises(InputError, match="must be there on some rank"):
            SummedOverRanks(group)
        with pytest.raises(InputError, match="must have experts on some rank"):
            DispatchedOverRanks(None, group)
        with pytest.raises(LayoutError, match="combine: must be the same"):
            DispatchedOverRanks(routed_experts(MODES[0]), group, combine=("slots", "ranks")[world.rank % 2])
        layer = DispatchedOverRanks(share_of(routed_experts(MODES[0]), world.rank, 4), group)
        x, indices, weights = routing(3)
        with pytest.raises(InputError, match="one k and one dtype on all ranks"):
            layer(x.bfloat16() if world.rank == 2 else x, indices, weights)
        k = 2 if world.rank == 1 else 3
        with pytest.raises(InputError, match="one k and one dtype on all ranks"):
            layer(x, indices[:, :k], weights[:, :k])


def bad_calls_are_errors_before_anything_travels(world: World) -> None:
    if world.rank < 2:
        ranks, group = 2, world.groups[2]
        summed = SummedOverRanks(group, shared=shard_of(shared_expert(MODES[0]), world.rank, ranks))
        routed = parallelize(routed_experts(MODES[0]), group, "ep")
        dispatched = parallelize(routed_experts(MODES[0]), group, "dispatch")
        x, indices, weights = routing(3)
        for call, message in [
            (lambda: summed(x[:, 1:]), "x: must be"),
            (lambda: summed(x, indices, weights), "arguments behind x"),
            (lambda: summed(x, out=torch.empty(2, H)), "out"),
            (lambda: routed(x), "arguments behind x"),
            (lambda: routed(x, indices, topk_weight=weights), "arguments behind x.*topk_weight"),
            (lambda: routed(x, indices, weights[:2]), "topk_weights"),
            (lambda: routed(draw(0, 65, H), *(t[:1].expand(65, K) for t in (indices, weights))), "max_tokens=64"),
            (lambda: dispatched(x, indices.float(), weights), "topk_indices"),
            (lambda: dispatched(x, indices.repeat(1, 3), weights.repeat(1, 3)), "top_k=8"),
            (lambda: parallelize(nn.Linear(2, 2), group), "must have NVFP4 experts"),
            (lambda: parallelize(shared_expert(MODES[0]), group, "dispatch"), "must have NVFP4 experts"),
            (lambda: parallelize(block(), group, "pp"), "plan: must be one of"),
            (lambda: SummedOverRanks(group, shared=summed.shared, chunk_tokens=0), "chunk_tokens"),
            (lambda: SummedOverRanks(dist.GroupMember.NON_GROUP_MEMBER, shared=summed.shared), "group"),
        ]:
            with pytest.raises(InputError, match=message):
                call()
        for layer, arguments in ((summed, ()), (dispatched, (indices, weights))):
            with pytest.raises(UnsupportedError, match="is for inference"):
                layer(x.clone().requires_grad_(), *arguments).sum().backward()
        for layer in (routed, dispatched):
            with pytest.raises(UnsupportedError, match="is for inference"):
                layer(x, indices, weights.clone().requires_grad_()).sum().backward()


CASES = {
    case.__name__: case
    for case in (
        sums_are_in_rank_order_in_one_step_or_two,
        shards_of_a_shared_expert_add_up,
        shards_that_measure_their_own_channels_are_as_near_to_exact_math,
        where_sums_are_exact_a_sharded_expert_is_the_whole_one,
        chunks_travel_while_the_next_is_computed,
        shards_of_routed_experts_add_up,
        shares_of_routed_experts_add_up,
        dispatched_slots_are_the_whole_layer_bit_for_bit,
        dispatched_ranks_add_slots_by_rank,
        shares_may_be_of_any_size_or_none,
        nobody_has_tokens_or_nobody_is_chosen,
        nan_is_where_the_whole_layer_has_it,
        models_are_parallelized_by_every_plan,
        disagreements_are_errors_on_every_rank,
        bad_calls_are_errors_before_anything_travels,
    )
}
