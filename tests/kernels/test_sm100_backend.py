# SPDX-License-Identifier: Apache-2.0
"""Who runs NVFP4 on Blackwell, why not where it does not run, and the packed bytes; no Triton is needed here."""

from __future__ import annotations

import dataclasses
import itertools
import sys
import types
from collections.abc import Iterator

import pytest
import torch

from nvfp4_experts.errors import LayoutError, UnsupportedError
from nvfp4_experts.formats.nvfp4 import Nvfp4Tensor, quantize
from nvfp4_experts.kernels.dispatch import Problem, choose_backend, choose_routed_backend, get_backend
from nvfp4_experts.kernels.sm100 import backend
from nvfp4_experts.kernels.sm100.config import (
    CHIPS,
    DECODING_CHIP,
    TOKEN_LIMITS,
    chip_of,
    choose,
    choose_routed,
    ranges,
    routed_ranges,
    token_range,
)
from nvfp4_experts.kernels.target import Target
from nvfp4_experts.layouts.scales import swizzle_scales, swizzled_offset


def problem(capability: tuple[int, int], activations: str = "nvfp4") -> Problem:
    return Problem(256, 128, activations, Target("cuda", "a GPU", capability, 148))


@pytest.fixture
def triton_of(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """An environment with Triton 3.8 and cuda-core; tests change it."""
    fake = types.ModuleType("triton")
    fake.__version__ = "3.8.0"  # type: ignore[attr-defined]
    fake.knobs = types.SimpleNamespace(runtime=types.SimpleNamespace(interpret=False))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "triton", fake)
    monkeypatch.setitem(sys.modules, "cuda", types.ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", types.ModuleType("cuda.bindings"))
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", types.ModuleType("cuda.bindings.runtime"))
    for cached in (backend._missing, backend._warn_once):
        cached.cache_clear()
    yield monkeypatch
    for cached in (backend._missing, backend._warn_once):
        cached.cache_clear()


@pytest.mark.usefixtures("triton_of")
@pytest.mark.parametrize("capability", CHIPS)
def test_auto_takes_it_for_nvfp4_on_blackwell_and_torch_for_the_rest(capability: tuple[int, int]) -> None:
    assert choose_backend("auto", problem(capability)).name == "sm100"
    routed = dataclasses.replace(problem(capability), experts=8, top_k=2)
    assert choose_routed_backend("auto", routed).name == "sm100"
    assert choose_routed_backend("auto", dataclasses.replace(routed, activations="bf16")).name == "torch"
    for activations in ("bf16", "fp8"):
        assert choose_backend("auto", problem(capability, activations)).name == "torch"
        assert "NVFP4 alone" in (get_backend("sm100").refusal(problem(capability, activations)) or "")


@pytest.mark.usefixtures("triton_of")
@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (11, 0)])
def test_elsewhere_it_says_what_it_needs(capability: tuple[int, int]) -> None:
    assert "FP4 tensor cores" in (get_backend("sm100").refusal(problem(capability)) or "")
    if capability != (9, 0):  # where sm90 speaks up as well
        with pytest.raises(UnsupportedError, match="sm100: needs FP4 tensor cores"):
            choose_backend("sm100", problem(capability))


@pytest.mark.usefixtures("triton_of")
@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0), (12, 0)])
def test_its_decoding_twin_runs_where_asked_for_and_is_never_chosen(capability: tuple[int, int]) -> None:
    assert choose_backend("sm100-decode", problem(capability)).name == "sm100-decode"
    assert choose_backend("auto", problem(capability)).name != "sm100-decode"
    assert "8.0 or newer" in (get_backend("sm100-decode").refusal(problem((7, 5))) or "")
    cpu = Problem(256, 128, "nvfp4", Target("cpu", "cpu"))
    assert "interpreter" in (get_backend("sm100-decode").refusal(cpu) or "")


def test_a_triton_that_is_too_old_is_refused_once_aloud(triton_of: pytest.MonkeyPatch) -> None:
    triton_of.setattr(sys.modules["triton"], "__version__", "3.5.1")
    with pytest.warns(UserWarning, match="cannot run on this Blackwell GPU: it needs Triton 3.6"):
        assert choose_backend("auto", problem((10, 0))).name == "torch"
    assert "needs Triton 3.6 or newer, and 3.5.1 is here" in (get_backend("sm100").refusal(problem((10, 0))) or "")


def test_sm_121_needs_a_newer_triton_than_the_others(triton_of: pytest.MonkeyPatch) -> None:
    triton_of.setattr(sys.modules["triton"], "__version__", "3.7.1")
    assert get_backend("sm100").refusal(problem((12, 0))) is None
    with pytest.warns(UserWarning, match=r"needs Triton 3\.8"):
        assert get_backend("sm100").refusal(problem((12, 1)))


def test_without_triton_the_way_out_is_named(triton_of: pytest.MonkeyPatch) -> None:
    triton_of.setitem(sys.modules, "triton", None)
    with pytest.warns(UserWarning, match="cannot run"):
        assert "nvfp4-experts[gpu]" in (get_backend("sm100").refusal(problem((10, 0))) or "")


def test_packed_bytes_are_those_of_the_layouts() -> None:
    """Rows g0..g7, u0..u7, ...; codes K-major as they were; a scale at the offset that the hardware's layout says."""
    gate, up, down = (quantize(torch.randn(*shape)) for shape in ((144, 80), (144, 80), (80, 144)))
    packed = get_backend("sm100").pack(gate, up, down)
    assert torch.equal(packed["gate_up_codes"][16:24], gate.codes[8:16])
    assert torch.equal(packed["gate_up_codes"][24:32], up.codes[8:16])
    scales = packed["gate_up_block_scales"].flatten()
    for row, column in ((0, 0), (9, 3), (143, 4)):
        place = swizzled_offset(2 * row - row % 8 + 8, column, 5)
        assert scales[place] == up.block_scales.view(torch.uint8)[row, column]
    assert scales.numel() == 384 * 8  # 288 rows and 5 columns, padded
    assert torch.equal(packed["down_codes"], down.codes)
    assert torch.equal(packed["down_block_scales"], swizzle_scales(down.block_scales.view(torch.uint8)))


def test_negative_block_scales_are_refused() -> None:
    """The hardware's scale is unsigned."""
    w = quantize(torch.randn(32, 32))
    scales = w.block_scales.view(torch.uint8).clone()
    scales[3, 1] |= 0x80
    with pytest.raises(LayoutError, match="must not be negative"):
        get_backend("sm100").pack(w, w, Nvfp4Tensor(w.codes, scales.view(torch.float8_e4m3fn), w.global_scale))


def test_cut_and_split_are_functions_of_the_range_of_tokens() -> None:
    for chip in (*CHIPS.values(), DECODING_CHIP):
        assert len(chip.table) == len(TOKEN_LIMITS) + 1
        for begin, limit in zip((0, *TOKEN_LIMITS), TOKEN_LIMITS, strict=False):
            cuts = {choose(chip, 6144, 7168, tokens, 148) for tokens in (begin + 1, limit)}
            assert len(cuts) == 1
        assert choose(chip, 6144, 7168, 513, 148)[1] == 1
    config, split = choose(CHIPS[10, 0], 6144, 7168, 1, 148)
    assert (config.tokens, split) == (16, 3)  # 48 tiles on 148 multiprocessors
    assert choose(CHIPS[10, 0], 144, 80, 1, 148)[1] == 1  # one step cannot be cut
    assert list(ranges(100)) == [16, 32, 64, 100] and list(ranges(16)) == [16]
    assert [token_range(tokens) for tokens in (1, 16, 17, 512, 513)] == [0, 0, 1, 5, 6]
    assert chip_of(Target("cpu", "cpu")) is None


@pytest.mark.parametrize("experts", [1, 6, 384])
def test_routed_cut_and_split_are_functions_of_the_range_of_slots(experts: int) -> None:
    chip, most = CHIPS[10, 0], 8192 * 8
    for begin, limit in itertools.pairwise((0, *routed_ranges(most, experts))):
        cuts = {choose_routed(chip, 6144, 7168, slots, experts, 148) for slots in (begin + 1, limit)}
        assert len(cuts) == 1
        assert cuts.pop()[1] == (3 if limit <= 16 else 1)  # few slots may all be one expert's
    assert [choose_routed(chip, 6144, 7168, slots, 6, 148)[0].tokens for slots in (64, 65, 256, 257)] == [
        16,
        32,
        64,
        128,
    ]
