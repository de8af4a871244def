# SPDX-License-Identifier: Apache-2.0
"""The distances against arithmetic done by hand, and their behaviour at zero, NaN and inf."""

from __future__ import annotations

import math

import pytest
import torch

from nvfp4_experts.diagnostics.metrics import compare, max_error, rel_l2, sqnr_db, statistics
from nvfp4_experts.errors import FormatError


def test_figures_by_hand() -> None:
    expected = torch.tensor([3.0, 4.0])  # norm 5
    actual = torch.tensor([3.0, 3.5])  # difference norm 0.5
    assert rel_l2(actual, expected) == pytest.approx(0.1)
    assert max_error(actual, expected) == 0.5
    assert sqnr_db(actual, expected) == pytest.approx(20.0)


def test_compare_agrees_with_the_single_figures() -> None:
    generator = torch.Generator().manual_seed(0)
    expected = torch.randn(7, 33, generator=generator)
    actual = expected + 0.01 * torch.randn(7, 33, generator=generator)
    figures = compare(actual, expected)
    assert figures.rel_l2 == rel_l2(actual, expected)
    assert figures.max_error == max_error(actual, expected)
    assert figures.sqnr_db == sqnr_db(actual, expected)
    assert figures.rel_l2 == pytest.approx(0.01, rel=0.2)


def test_rel_l2_divides_by_the_expected_side() -> None:
    assert rel_l2(torch.tensor([2.0]), torch.tensor([1.0])) == 1.0
    assert rel_l2(torch.tensor([1.0]), torch.tensor([2.0])) == 0.5


@pytest.mark.parametrize("shape", [(0,), (4, 16)])
def test_equal_tensors_have_no_error(shape: tuple[int, ...]) -> None:
    figures = compare(torch.zeros(shape), torch.zeros(shape))
    assert (figures.rel_l2, figures.max_error, figures.sqnr_db) == (0.0, 0.0, math.inf)
    assert figures.within(0.0)


def test_error_against_zero_is_infinite() -> None:
    figures = compare(torch.ones(3), torch.zeros(3))
    assert figures.rel_l2 == math.inf
    assert figures.sqnr_db == -math.inf
    assert not figures.within(1e30)


def test_nan_never_passes() -> None:
    for actual, expected in ((torch.tensor([math.nan]), torch.ones(1)), (torch.ones(1), torch.tensor([math.nan]))):
        figures = compare(actual, expected)
        assert math.isnan(figures.rel_l2) and math.isnan(figures.max_error) and math.isnan(figures.sqnr_db)
        assert not figures.within(math.inf)


def test_nan_against_zero_is_nan_and_not_infinite() -> None:
    assert math.isnan(rel_l2(torch.tensor([math.nan]), torch.zeros(1)))


def test_shapes_must_agree() -> None:
    with pytest.raises(FormatError, match=r"shape of expected \(2, 3\), got \(3, 2\)"):
        compare(torch.zeros(3, 2), torch.zeros(2, 3))


def test_statistics_ignore_but_count_what_is_not_finite() -> None:
    seen = statistics(torch.tensor([[3.0, -4.0, math.nan], [math.inf, 0.0, 0.0]]))
    assert seen.shape == (2, 3)
    assert seen.rms == pytest.approx(2.5)  # sqrt(25 / 4)
    assert seen.amax == 4.0
    assert (seen.nan_count, seen.inf_count) == (1, 1)


def test_statistics_of_nothing() -> None:
    assert statistics(torch.empty(0, 16)).to_dict() == {
        "shape": (0, 16),
        "rms": 0.0,
        "amax": 0.0,
        "nan_count": 0,
        "inf_count": 0,
    }
