# SPDX-License-Identifier: Apache-2.0
"""Who runs a problem when there are several backends, of which some refuse: nothing is replaced in silence."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from nvfp4_experts.errors import UnsupportedError
from nvfp4_experts.kernels import dispatch
from nvfp4_experts.kernels.target import Target

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
