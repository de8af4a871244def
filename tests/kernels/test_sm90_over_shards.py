# SPDX-License-Identifier: Apache-2.0
"""A shared expert out of packed shards, as far as it goes without a GPU: where bytes go, and what cannot be run so."""

from __future__ import annotations

import pytest
import torch

from nvfp4_experts.diagnostics.bench.work import SHAPES
from nvfp4_experts.formats.nvfp4 import quantize
from nvfp4_experts.kernels.dispatch import Problem
from nvfp4_experts.kernels.sm90 import over_shards
from nvfp4_experts.kernels.sm90.backend import BACKEND
from nvfp4_experts.kernels.sm90.config import GemmConfig
from nvfp4_experts.kernels.sm90.over_shards import OverShards
from nvfp4_experts.kernels.target import Target
from nvfp4_experts.layers.shards import channels_of, cut_channels
from nvfp4_experts.layers.spread import runs_of

HOPPER = Target("cuda", "a Hopper", (9, 0), 132)


@pytest.mark.parametrize("ranks, size", [(2, 256), (3, 192), (4, 256), (2, 112), (1, 48)])
def test_shards_placed_are_the_whole_layer_packed(ranks: int, size: int) -> None:
    """(2, 112): shards of 64 and 48 channels; the last chunk is padded in the shard as in the whole."""
    hidden = 144
    weights = [quantize(torch.randn(s)) for s in ((size, hidden), (size, hidden), (hidden, size))]
    whole = list(BACKEND.pack(*weights).values())
    channels = [channels_of(rank, ranks, size) for rank in range(ranks)]
    shards = OverShards(hidden, tuple(len(run) for run in channels))
    assert shards.refusal(Problem(hidden, size, "bf16", HOPPER)) is None and shards.size == size
    made = {
        name: torch.full(shape, 7, dtype=dtype) for name, (shape, dtype) in shards.parts(5, is_entered=False).items()
    }
    for rank, run in enumerate(channels):
        packed = list(BACKEND.pack(*cut_channels(*weights, run)).values())
        gate_up, down = (packed[index] for index in OverShards.SEEN)
        assert (gate_up.numel(), down.numel()) == shards.bytes_of(rank)
        shards.gate_up_of(rank, made["gate_up"]).copy_(gate_up)
        place = shards.down_of(rank, made["down"])
        place.copy_(down.view(place.shape))
        assert torch.equal(packed[1], whole[1]) and torch.equal(packed[4], whole[4]), "global scales are the whole's"
    assert torch.equal(made["gate_up"], whole[0]) and torch.equal(made["down"].view(-1), whole[3])


def test_what_has_to_be_summed() -> None:
    shards = OverShards(256, (64, 48))
    for activations, scale in (("fp8", "dynamic"), ("nvfp4", "dynamic"), ("nvfp4", "per_token")):
        assert "measured on h" in (shards.refusal(Problem(256, 112, activations, HOPPER, scale)) or "")
    assert shards.refusal(Problem(256, 112, "nvfp4", HOPPER, "static")) is None
    assert "whole chunks" in (OverShards(256, (48, 64)).refusal(Problem(256, 112, "bf16", HOPPER)) or "")


@pytest.mark.parametrize("shape", SHAPES)
def test_runs_add_up_sums_as_all_tokens_would(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(over_shards, "target_of", lambda _: HOPPER)
    hidden, intermediate = SHAPES[shape]
    shards, device = OverShards(hidden, (intermediate // 2,) * 2), torch.device("cuda", 0)
    own = 0
    for tokens in (300, 1000, 2500, 4096, 9000):
        whole = over_shards.choose(hidden, intermediate, tokens, HOPPER)
        for run in (1, 256, 512, 1024, tokens):
            of_run = over_shards.choose(hidden, intermediate, run, HOPPER)
            configs = shards.configs_of(run, tokens, device)
            for config, mine, alls in zip(configs, of_run, whole, strict=True):
                assert config == (mine if mine.parts == alls.parts else alls)
                own += config != alls
    assert own, "no run has a configuration of its own: the case tests nothing"
    assert all(isinstance(config, GemmConfig) for config in configs)


def test_runs_cover_all_tokens_and_end_with_little() -> None:
    for tokens in (1, 300, 4095, 4096, 4097, 5000, 8191, 70_000):
        runs = runs_of(tokens)
        assert [run.start for run in runs] == [0, *(run.stop for run in runs[:-1])] and runs[-1].stop == tokens
        if tokens < 4096:
            assert len(runs) == 1
        else:
            sizes = [run.stop - run.start for run in runs]
            assert len(sizes) == 4 and all(size % 256 == 0 for size in sizes[:-1])
            assert sizes[0] >= sizes[1] >= sizes[2] >= 512 and 512 <= sizes[3] <= tokens // 8 + 4 * 256
