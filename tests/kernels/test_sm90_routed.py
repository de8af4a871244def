# SPDX-License-Identifier: Apache-2.0
"""Routed experts on Hopper, as far as it goes without a GPU: which kernel, which cut, how much scratch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from nvfp4_experts.diagnostics.bench.work import SHAPES
from nvfp4_experts.kernels.cuda.workspace import bytes_of
from nvfp4_experts.kernels.dispatch import (
    ACTIVATION_SCALES,
    Call,
    Problem,
    Routing,
    choose_backend,
    choose_routed_backend,
)
from nvfp4_experts.kernels.sm90 import backend, grouped, routed, routed_decode, routed_fp8
from nvfp4_experts.kernels.sm90.config import TOKENS, GemmProblem, config_is_legal, legal_configs
from nvfp4_experts.kernels.target import Target

HOPPER = Target("cuda", "a Hopper", (9, 0), 132)
GPU = torch.device("cuda", 0)


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(routed_decode, "target_of", lambda _: HOPPER)
    routed_decode._tiles.cache_clear()
    yield
    routed_decode._tiles.cache_clear()


def test_few_tokens_of_few_slots_are_one_launch() -> None:
    assert routed_decode.takes(8, 8) and routed_decode.takes(1, 64) and routed_decode.takes(7, 9)
    assert not routed_decode.takes(9, 1) and not routed_decode.takes(8, 9) and not routed_decode.takes(1, 65)


@pytest.mark.usefixtures("on_hopper")
def test_formats_of_one_launch() -> None:
    """All, with fp8 and with scales that are an expert's own up to fewer slots; with more tokens none."""
    weights = [torch.empty(0)] * 2 + [torch.empty(4, 2, 128)]
    few = {("bf16", "dynamic"), ("fp8", "dynamic"), *(("nvfp4", scale) for scale in ACTIVATION_SCALES)}
    for tokens, top_k, wanted in ((8, 2, few), (8, 3, few - {("nvfp4", "static"), ("fp8", "dynamic")}), (9, 1, set())):
        indices = torch.empty(tokens, top_k)
        x, routing = torch.empty(tokens, 256), Routing(indices, indices, "before_down")
        taken = {mode for mode in few if routed._few(x, weights, routing, Call(0.0, *mode))}
        assert taken == wanted


@pytest.mark.usefixtures("on_hopper")
def test_blocks_that_cannot_keep_their_rows_are_not_asked_to() -> None:
    for hidden, intermediate in (*SHAPES.values(), (7168, 384), (5120, 288), (4096, 256), (144, 80)):
        assert routed_decode.fits(hidden, intermediate, GPU)
    assert not routed_decode.fits(7168, 16, GPU) and not routed_decode.fits(4096, 48, GPU)


def test_every_cut_is_legal_and_reached() -> None:
    for hidden, intermediate in SHAPES.values():
        for mode in ("bf16", "fp8"):
            for _, config in grouped.configs_of(mode):
                for rows, columns in ((2 * intermediate, hidden), (hidden, intermediate)):
                    assert config_is_legal(config, GemmProblem(rows, columns, 4096)) and config.parts == 1
                    assert config.fp8 == (mode == "fp8")
    for mode in ("bf16", "fp8"):
        tokens = [grouped.config_of(slots, 256, mode).tokens for slots in (1, 2048, 2049, 8192, 8193)]
        assert tokens == [32, 32, 64, 64, 128]


def test_neither_the_rule_nor_tuning_takes_a_cut_that_is_for_routed_experts() -> None:
    found = list(legal_configs(GemmProblem(4096, 4096, 4096)))
    assert {config.tokens for config in found} == set(TOKENS)
    assert {config.strips for config in found} == {1} and {config.fp8 for config in found} == {False}
    ours = [config for _, config in grouped.configs_of("bf16")]
    assert [config for config in ours if config not in found] == ours[-1:]


@pytest.mark.parametrize("mode", ["bf16", "fp8", *ACTIVATION_SCALES])
def test_scratch_grows_with_slots(mode: str) -> None:
    """So that what is reserved for the largest call is enough for every other."""
    sizes = [bytes_of(list(grouped.scratch(mode, 4096, 2048, 256, tokens, 6).values())) for tokens in range(1, 3000, 7)]
    assert sizes == sorted(sizes)
    assert grouped.scratch(mode, 4096, 2048, 256, 1024, 6)["rows"] == ((6144, 4096), torch.float32)


def test_what_it_has_no_kernel_for_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_compiler_problem", lambda: None)
    assert routed.ROUTED.refusal(Problem(64, 64, "bf16", HOPPER, experts=256, top_k=6)) is None
    fp8 = Problem(64, 64, "fp8", HOPPER, experts=256, top_k=6)
    assert "sm90-fp8" in (routed.ROUTED.refusal(fp8) or "") and routed_fp8.ROUTED.refusal(fp8) is None
    assert "fp8" in (routed_fp8.ROUTED.refusal(replace(fp8, activations="bf16")) or "")
    assert [choose_routed_backend(name, fp8).name for name in ("auto", "sm90", "sm90-fp8")] == ["sm90-fp8"] * 3
    assert choose_routed_backend("auto", replace(fp8, activations="bf16")).name == "sm90"
    assert [choose_backend(name, replace(fp8, experts=0)).name for name in ("auto", "sm90")] == ["sm90-fp8"] * 2
    assert "8192 experts" in (routed.ROUTED.refusal(Problem(64, 64, "bf16", HOPPER, experts=8193, top_k=6)) or "")
