# SPDX-License-Identifier: Apache-2.0
"""Who runs a problem when there are several backends, of which some refuse: nothing is replaced in silence."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import pytest
import torch

from nvfp4_experts.errors import UnsupportedError
from nvfp4_experts.kernels import dispatch
from nvfp4_experts.kernels.target import Target
from nvfp4_experts.layers.shared_expert import Nvfp4SharedExpert

PROBLEM = dispatch.Problem(64, 32, "bf16", Target("cpu", "cpu"))


@dataclass
class Named:
    """A backend that only answers whether it would run."""

    name: str
    reason: str | None

    def refusal(self, problem: dispatch.Problem) -> str | None:
        return self.reason


@pytest.fixture
def three_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {b.name: b for b in (Named("picky", "needs a moon"), Named("able", None), Named("also able", None))}
    monkeypatch.setattr(dispatch, "BACKENDS", tuple(known))
    monkeypatch.setattr(dispatch, "get_backend", known.__getitem__)


@pytest.mark.usefixtures("three_backends")
def test_auto_takes_the_first_that_can() -> None:
    assert dispatch.choose_backend("auto", PROBLEM).name == "able"


@pytest.mark.usefixtures("three_backends")
def test_a_name_is_an_order() -> None:
    assert dispatch.choose_backend("also able", PROBLEM).name == "also able"


@pytest.mark.usefixtures("three_backends")
def test_a_named_backend_that_refuses_is_not_replaced() -> None:
    with pytest.raises(UnsupportedError, match="picky: needs a moon; able: can run this; also able: can run this"):
        dispatch.choose_backend("picky", PROBLEM)


def test_on_a_cpu_its_own_kernel_comes_before_torch_and_hopper_says_what_it_needs() -> None:
    assert dispatch.BACKENDS == ("sm100", "sm90", "cpu", "torch")
    assert dispatch.choose_backend("auto", PROBLEM).name == "cpu"
    assert dispatch.choose_backend("torch", PROBLEM).name == "torch"
    assert "Hopper" in (dispatch.get_backend("sm90").refusal(PROBLEM) or "")


def test_auto_never_takes_what_must_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = dispatch.Problem(64, 32, "nvfp4", Target("cpu", "cpu"))
    assert dispatch.choose_backend("exact", problem).name == "exact"
    for name in dispatch.BACKENDS:
        monkeypatch.setattr(type(dispatch.get_backend(name)), "refusal", lambda self, problem: "needs a moon")
    with pytest.raises(UnsupportedError, match="needs a moon"):
        dispatch.choose_backend("auto", problem)
    assert dispatch.choose_backend("exact", problem).name == "exact"


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0), (12, 0)])
def test_hopper_kernels_run_on_hopper_alone(capability: tuple[int, int]) -> None:
    other = dispatch.Problem(64, 32, "bf16", Target("cuda", "another", capability, 100))
    assert "Hopper" in (dispatch.get_backend("sm90").refusal(other) or "")


def test_a_layer_that_is_told_to_run_on_hopper_does_not_fall_back() -> None:
    weights = torch.randn(32, 64), torch.randn(32, 64), torch.randn(64, 32)
    with pytest.raises(
        UnsupportedError, match=r"backend 'sm90'.*sm90: needs a Hopper GPU.*; cpu: can run this; torch: can"
    ):
        Nvfp4SharedExpert.from_weights(*weights, backend="sm90")


def test_hopper_without_a_compiler_is_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from nvfp4_experts.kernels.sm90 import backend

    monkeypatch.setitem(sys.modules, "cuda.core", None)
    backend._compiler_problem.cache_clear()
    problem = dispatch.Problem(64, 32, "bf16", Target("cuda", "a Hopper", (9, 0), 132))
    with pytest.warns(UserWarning, match="cannot run on this Hopper GPU"):
        refusal = backend.BACKEND.refusal(problem)
    assert backend.BACKEND.refusal(problem) == refusal  # and warns no more: a warning would raise here
    backend._compiler_problem.cache_clear()
    assert refusal is not None and "nvfp4-experts[gpu]" in refusal
