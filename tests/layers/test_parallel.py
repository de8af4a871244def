# SPDX-License-Identifier: Apache-2.0
"""Layers over several ranks: the cases of all_cases.py on four processes, and what one process can check."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from nvfp4_experts import KeptSharedExpert
from nvfp4_experts.checkpoints import load_part, parts
from nvfp4_experts.errors import InputError, LayoutError
from nvfp4_experts.layers.dispatched import DispatchedOverRanks
from nvfp4_experts.layers.parallel import SummedOverRanks, check_cover, parallelize
from nvfp4_experts.layers.shards import channels_of, cut_channels, even_part, experts_of, shard_of, share_of
from tests.checkpoints.factory import TINY
from tests.layers.all_cases import CASES
from tests.layers.parallel_cases import MODES, E, H, I, routed_experts, routing, shared_expert
from tests.layers.ranks import run_cases


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return run_cases("tests.layers.all_cases", tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", CASES)
def test_over_ranks(name: str, outcomes: dict[str, list[str]]) -> None:
    assert not outcomes[name], "\n".join(outcomes[name])


def test_parts_are_even_whole_and_in_order() -> None:
    for count in range(20):
        for ranks in range(1, 9):
            parts = [even_part(count, rank, ranks) for rank in range(ranks)]
            assert [i for part in parts for i in part] == list(range(count))
            sizes = [len(part) for part in parts]
            assert sizes == sorted(sizes, reverse=True) and sizes[0] - sizes[-1] <= 1
    assert [len(channels_of(rank, 8, 2304)) for rank in range(8)] == [288] * 8
    assert [len(channels_of(rank, 4, 272)) for rank in range(4)] == [80, 64, 64, 64]
    assert [len(channels_of(rank, 4, 32)) for rank in range(4)] == [16, 16, 0, 0]
    assert [experts_of(rank, 3, 256) for rank in range(3)] == [range(86), range(86, 171), range(171, 256)]
    for rank in (-1, 2):
        with pytest.raises(InputError, match=r"rank: must be in \[0, 2\)"):
            even_part(5, rank, 2)


@pytest.mark.parametrize("runs", [[(0, 6)], [(0, 6), (0, 6)], [(0, 3), (3, 6)], [(4, 6), (0, 4)], []])
def test_experts_that_are_held_once_or_sharded(runs: list[tuple[int, int]]) -> None:
    check_cover(runs, 6)
    check_cover(runs, None)


@pytest.mark.parametrize(
    ("runs", "known"),
    [
        ([(0, 4), (3, 6)], None), ([(0, 6), (2, 4)], None), ([(0, 3), (0, 3)], 6), ([(1, 4), (4, 7)], 6),
        ([(0, 3), (3, 5)], 6), ([(0, 3), (4, 6)], 6), ([(1, 6)], 6), ([(6, 12)], 6), ([(0, 7)], 6),
    ],
)  # fmt: skip
def test_experts_that_are_held_twice_or_by_nobody(runs: list[tuple[int, int]], known: int | None) -> None:
    with pytest.raises(LayoutError, match="experts of the ranks: must be"):
        check_cover(runs, known)


@pytest.mark.parametrize(("plan", "routed", "shared"), [("tp", 0, 0), ("ep", 0, 0), ("dispatch", 0, 1)])
def test_the_last_of_many_ranks_loads_nothing_that_it_does_not_hold(
    plan: str, routed: int, shared: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The embedded model has 8 experts and 16 blocks of channels."""
    monkeypatch.setattr(parts, "checked_group", lambda group: (None, 19, 20))
    part = load_part(TINY, 1, plan, activations="bf16")
    assert (part.routed is not None, part.shared is not None) == (routed, shared)
    kept = load_part(TINY, 1, plan, shared="keep").shared
    assert isinstance(kept, KeptSharedExpert) == bool(shared)


def test_shards_are_slices_of_the_bytes_with_the_options_of_the_whole() -> None:
    shared, routed = shared_expert(("nvfp4", "static"), 272), routed_experts(("nvfp4", "static"), top_k=5)
    for whole in (shared, routed):
        shards = [shard_of(whole, rank, 4) for rank in range(4)]
        there = [s for s in shards if s is not None]
        assert len(there) == (4 if whole is shared else 3)
        for part in ("codes", "block_scales"):
            for name, axis in (("gate", -2), ("up", -2), ("down", -1)):
                pieces = [getattr(getattr(s, name), part).view(torch.uint8) for s in there]
                assert torch.equal(torch.cat(pieces, axis), getattr(getattr(whole, name), part).view(torch.uint8))
        for s in there:
            assert torch.equal(s.down.global_scale, whole.down.global_scale)
            assert (s.activations, s.activation_scale, s.swiglu_limit) == ("nvfp4", "static", 1.0)
            assert torch.equal(s._hidden_scale, whole._hidden_scale) and s.max_tokens == whole.max_tokens
            size = sum(w.codes.nbytes + w.block_scales.nbytes for w in s._projections())
            assert size < sum(w.untyped_storage().nbytes() for w in whole.buffers()), "a view keeps the whole alive"
    assert shard_of(routed, 0, 4).top_k == 5


def test_a_share_has_its_experts_and_their_scales() -> None:
    whole = routed_experts(("nvfp4", "static"), weighting="after_down", backend="torch")
    share = share_of(whole, 1, 4)
    assert share.num_experts == 2 and torch.equal(share.gate.codes, whole.gate.codes[2:4])
    assert torch.equal(share.up.global_scale, whole.up.global_scale[2:4])
    assert torch.equal(share.input_scale, whole.input_scale[2:4])
    assert (share.weighting, share.backend) == ("after_down", "torch")
    assert share_of(whole, 7, 8) is None


@pytest.mark.parametrize(
    "channels", [range(8, 32), range(0, 24), range(0, 0), range(32, 64), range(-16, 16), range(0, 32, 2)]
)
def test_cuts_are_on_block_boundaries(channels: range) -> None:
    with pytest.raises(LayoutError, match="multiples of 16"):
        cut_channels(*shared_expert(MODES[0])._projections(), channels)


def test_without_a_group() -> None:
    for build in (
        lambda: SummedOverRanks(shared=shared_expert(MODES[0])),
        lambda: parallelize(shared_expert(MODES[0])),
    ):
        with pytest.raises(InputError, match="torchrun"):
            build()


@pytest.fixture
def alone() -> Iterator[None]:
    """The default group, of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_one_rank_is_the_layer_itself(alone: None) -> None:
    x, indices, weights = routing(9)
    for mode in MODES:
        shared, routed = shared_expert(mode), routed_experts(mode)
        assert torch.equal(SummedOverRanks(shared=shared)(x.bfloat16()), shared(x.bfloat16()))
        want = routed(x, indices, weights)
        for layer in (SummedOverRanks(routed=routed), DispatchedOverRanks(routed), parallelize(routed, plan="tp")):
            assert torch.equal(layer(x, indices, weights), want)
        assert routed.max_tokens == 64 and len(layer.state_dict()) == 11


def test_capacity_shares_the_weights() -> None:
    experts = routed_experts(MODES[0])
    wide = experts.with_capacity(500, 2)
    assert (wide.max_tokens, wide.top_k, experts.max_tokens, experts.top_k) == (500, 2, 64, 8)
    assert [b.data_ptr() for b in wide.buffers()] == [b.data_ptr() for b in experts.buffers()]
    with pytest.raises(InputError, match="top_k"):
        experts.with_capacity(4, 0)


def test_sizes_of_the_cases() -> None:
    assert (E % 4, I // 16 % 4, H % 3) == (2, 3, 1), "uneven, or the cases lose their point"
