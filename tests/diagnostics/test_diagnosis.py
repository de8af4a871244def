# SPDX-License-Identifier: Apache-2.0
"""Each known mistake, made on purpose, is named; faithful weights and plain noise are not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nvfp4_experts.diagnostics.diagnosis import diagnose
from nvfp4_experts.diagnostics.weights import Weight
from nvfp4_experts.formats.nvfp4 import Nvfp4Tensor, quantize
from nvfp4_experts.layouts.scales import swizzle_scales


@pytest.fixture
def original() -> dict[str, Tensor]:
    # Rows of different size, so that scales in the wrong place show.
    rows = torch.linspace(0.2, 2.0, 128).unsqueeze(1)
    return {name: rows * torch.randn(128, 128) for name in ("gate", "up", "down")}


@pytest.fixture
def actual(original: dict[str, Tensor]) -> dict[str, Nvfp4Tensor]:
    return {name: quantize(weight) for name, weight in original.items()}


def test_faithful_weights_need_no_hint(original: dict[str, Tensor], actual: dict[str, Weight]) -> None:
    assert diagnose(actual, original) == []


def test_gate_and_up_exchanged(original: dict[str, Tensor], actual: dict[str, Weight]) -> None:
    hints = diagnose({**actual, "gate": actual["up"], "up": actual["gate"]}, original)
    assert hints == ["gate and up look exchanged: error drops from 1.42 to 0.095 when exchanged"]


def test_nibbles_exchanged(original: dict[str, Tensor], actual: dict[str, Nvfp4Tensor]) -> None:
    codes = actual["down"].codes
    actual["down"] = replace(actual["down"], codes=(codes % 16) * 16 + codes // 16)
    (hint,) = diagnose({**actual}, original)
    assert hint.startswith("down: codes look packed with the odd k in the low nibble: error drops from 1.4")


def test_scales_swizzled(original: dict[str, Tensor], actual: dict[str, Nvfp4Tensor]) -> None:
    swizzled = swizzle_scales(actual["up"].block_scales)
    assert swizzled.shape == actual["up"].block_scales.shape  # so that nothing but the values can tell
    actual["up"] = replace(actual["up"], block_scales=swizzled)
    (hint,) = diagnose({**actual}, original)
    assert hint.startswith("up: block scales look swizzled: error drops from ")
    assert hint.endswith("to 0.095 when unswizzled")


@pytest.mark.parametrize(("factor", "undone"), [(1.05, 0.9), (2.0, 0.5), (1e-3, 1e3), (-1.0, -1.0)])
def test_constant_factor(
    original: dict[str, Tensor], actual: dict[str, Nvfp4Tensor], factor: float, undone: float
) -> None:
    actual["gate"] = replace(actual["gate"], global_scale=actual["gate"].global_scale * factor)
    (hint,) = diagnose({**actual}, original)
    assert hint.startswith("gate: off by a constant factor: error drops from ")
    assert float(hint.rpartition(" ")[2]) == pytest.approx(undone, rel=0.06)


def test_unrelated_weights_get_no_wrong_hint(original: dict[str, Tensor], actual: dict[str, Weight]) -> None:
    assert diagnose({**actual, "down": quantize(torch.randn(128, 128))}, original) == []


def test_nan_gets_no_hint(original: dict[str, Tensor], actual: dict[str, Weight]) -> None:
    nan = torch.full((128, 128), torch.nan)
    assert diagnose({**actual, "gate": nan, "up": nan}, original) == []
