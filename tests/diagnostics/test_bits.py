# SPDX-License-Identifier: Apache-2.0
"""Distances in units in the last place, against counting; and a backend against the exact sums."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nvfp4_experts.diagnostics import exactness
from nvfp4_experts.diagnostics.bench import exact as bench_exact
from nvfp4_experts.diagnostics.bench.measure import our_candidates
from nvfp4_experts.diagnostics.bits import Mismatch, compare_bits
from nvfp4_experts.diagnostics.exactness import FIRST_HALF, SECOND_HALF, compare_with_exact, verify_exact
from nvfp4_experts.errors import FormatError, InputError, UnsupportedError
from nvfp4_experts.kernels import tiled
from nvfp4_experts.kernels.exact import rule
from tests.kernels.test_shared_expert import make_expert

SCALES = 5.0 / 2688, 8.0 / 2688


def values_in_order(dtype: torch.dtype) -> Tensor:
    """All 2^16 values of a dtype of two bytes but NaN, sorted as floating-point numbers are, -0 before +0."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[~every.isnan()]
    keys = sorted(range(len(every)), key=lambda i: (float(every[i]), math.copysign(1, float(every[i]))))
    return every[torch.tensor(keys)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_value_is_one_from_the_next(dtype: torch.dtype) -> None:
    values = values_in_order(dtype)
    for step, name in ((1, "1"), (2, "2"), (3, "3–4"), (16, "9–16"), (1025, ">1024")):
        found = compare_bits(values[None, step:], values[None, :-step])
        assert found.histogram == {name: len(values) - step} and found.equal == 0


def test_fp32_neighbours() -> None:
    a = torch.tensor([[1.0, -1.0, 0.0, 2.0, 3.0]])
    b = torch.tensor([[1.0, -1.0 - 2.0**-23, -0.0, 2.0 - 2.0**-22, 3.0]])
    found = compare_bits(a, b)
    assert found.histogram == {"0": 2, "1": 2, "2": 1} and (found.equal, found.share) == (2, 0.4)
    assert found.first == Mismatch(0, 1, -1.0, -1.0 - 2.0**-23, 1)


def test_nan_equals_nan_and_nothing_else() -> None:
    nan, other = torch.tensor([0x7FC0_0000, 0x7FFF_FFFF]).to(torch.int32).view(torch.float32)
    found = compare_bits(torch.stack((nan, nan))[None], torch.stack((other, torch.tensor(1.0)))[None])
    assert (found.equal, found.histogram) == (1, {"0": 1, "NaN": 1})
    assert found.first is not None and found.first.channel == 1 and found.first.ulp is None
    assert compare_bits(torch.empty(0, 3), torch.empty(0, 3)).share == 1.0


def test_unlike_tensors_are_refused() -> None:
    x = torch.zeros(2, 3)
    for other in (x.bfloat16(), x[:1], x.double()):
        with pytest.raises(FormatError, match="of one dtype"):
            compare_bits(x, other)


# --- a layer ------------------------------------------------------------------------------------------------------


def compared(monkeypatch: pytest.MonkeyPatch, intermediate: int = 80, **spoiled: object) -> exactness.Exactness:
    """Backend torch, with functions of kernels/tiled.py replaced, against exact, on 5 tokens."""
    for name, replacement in spoiled.items():
        monkeypatch.setattr(tiled, name, replacement)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(3))
    return compare_with_exact(*make_expert(64, intermediate), x, "static", "torch", 10.0, *SCALES)


def test_small_sums_are_the_same_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """K is 64 and 80, scales are alike: fp32 holds every partial sum, so nothing differs but exp, if that."""
    found = compared(monkeypatch)
    assert [output.dtype for output in found.outputs] == ["bfloat16", "float32"]
    assert found.tokens_with_other_h == 0 and found.stages == (None, None) and found.share == 1.0
    assert found.backend == "torch"


@pytest.mark.parametrize("intermediate", [80, 48])  # wider than hidden, so that h is read in two pieces; and narrower
def test_the_stage_that_differs_first_is_named(monkeypatch: pytest.MonkeyPatch, intermediate: int) -> None:
    multiply = tiled._matmul

    def wrong_down(a: Tensor, b: Tensor) -> Tensor:
        """The sum over intermediate of token 3 is off, but where the weights are those that read h out."""
        sums = multiply(a, b)
        if a.shape[1] == intermediate and int((b != 0).sum()) > len(b):
            sums[3] *= 1 + 2.0**-7
        return sums

    found = compared(monkeypatch, intermediate, _matmul=wrong_down)
    assert found.tokens_with_other_h == 0 and found.stages == (SECOND_HALF, SECOND_HALF)
    assert found.outputs[1].first is not None and found.outputs[1].first.token == 3
    assert found.outputs[1].values - found.outputs[1].equal <= 64

    def wrong_first(a: Tensor, b: Tensor) -> Tensor:
        """The last channel of gate and up of token 2 is off."""
        sums = multiply(a, b)
        if a.shape[1] == 64:
            sums[2, -1] *= -2
        return sums

    found = compared(monkeypatch, intermediate, _matmul=wrong_first)
    assert found.tokens_with_other_h == 1 and found.stages == (FIRST_HALF, FIRST_HALF)
    assert found.outputs[1].first is not None and found.outputs[1].first.token == 2


def test_what_cannot_be_compared_is_refused(tiny_checkpoint: Path, tiny_nvfp4: Path) -> None:
    with pytest.raises(InputError, match="must be another"):
        verify_exact(str(tiny_nvfp4), backend="exact")
    with pytest.raises(InputError, match="must be NVFP4"):
        verify_exact(str(tiny_checkpoint), layers=[0])
    with pytest.raises(InputError, match="hidden states"):
        verify_exact(str(tiny_nvfp4), hidden_states=torch.zeros(2, 3))
    with pytest.raises(UnsupportedError, match="needs a Hopper"):
        verify_exact(str(tiny_nvfp4), backend="sm90")


def test_a_share_below_the_bound_is_an_offence(tiny_nvfp4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = verify_exact(str(tiny_nvfp4), layers=[0, 1], tokens=4, backend="torch")
    assert report.passed and [expert.name for expert in report.experts] == ["layer 0 shared", "layer 1 shared"]
    assert [mode.activation_scale for mode in report.experts[0].modes] == ["static", "dynamic", "per_token"]
    multiply = tiled._matmul
    monkeypatch.setattr(tiled, "_matmul", lambda a, b: multiply(a, b) * 1.01)
    report = verify_exact(str(tiny_nvfp4), layers=[1], tokens=4, backend="torch")
    assert not report.passed and report.offenders == ["layer 1 shared"]


# --- bench --report -----------------------------------------------------------------------------------------------


def test_the_section_of_a_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_exact, "CASES", {"64x48": (1, 3)})
    candidates = our_candidates(("bf16", "nvfp4"), backends=("torch", "sm90", "exact"))
    section = bench_exact.measure_exactness(candidates, torch.device("cpu"))
    assert section.form == rule.form(torch.device("cpu")) and section.against_cpu.share == 1.0
    ran = [(c.backend, c.tokens, c.activation_scale) for c in section.cases if c.found is not None]
    assert len(ran) == 2 * 2 * 3 and {backend for backend, _, _ in ran} == {"torch", "exact"}
    assert all("Hopper" in (c.reason or "") for c in section.cases if c.backend == "sm90")
    assert all(c.found.outputs[1].share == 1.0 for c in section.cases if c.backend == "exact" and c.found)
