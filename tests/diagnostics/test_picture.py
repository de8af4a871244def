# SPDX-License-Identifier: Apache-2.0
"""The picture: drawn for every kind of report, in the size promised; its absence of matplotlib named."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from nvfp4_experts.diagnostics.picture import draw
from nvfp4_experts.diagnostics.plotting import check_plotting
from nvfp4_experts.diagnostics.verify import verify_checkpoint
from nvfp4_experts.errors import UnsupportedError

OKABE_ITO_BLUE = np.array([0x00, 0x72, 0xB2]) / 255
BOUND_RED = np.array([0xB2, 0x22, 0x22]) / 255


def pixels_of(image: np.ndarray, colour: np.ndarray) -> int:
    return int((np.abs(image[..., :3] - colour).max(-1) < 0.01).sum())


def test_a_report_is_drawn(tiny_nvfp4: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    report = verify_checkpoint(str(tiny_nvfp4), str(tiny_checkpoint), tokens=8)
    draw(report, tmp_path / "verify.png")
    image = matplotlib.image.imread(tmp_path / "verify.png")
    assert image.shape[:2] == (736, 1600)
    assert pixels_of(image, OKABE_ITO_BLUE) > 200  # markers of gate and of bf16
    assert pixels_of(image, BOUND_RED) > 500  # the bound


def test_unconverted_experts_can_be_drawn_too(tiny_checkpoint: Path, tmp_path: Path) -> None:
    report = verify_checkpoint(str(tiny_checkpoint), str(tiny_checkpoint), experts="routed", layers=[1], tokens=2)
    draw(report, tmp_path / "verify.svg")
    text = (tmp_path / "verify.svg").read_text()
    assert text.lstrip().startswith("<?xml") and "</svg>" in text


def test_an_unknown_suffix_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    report = verify_checkpoint(str(tiny_checkpoint), str(tiny_checkpoint), layers=[0], tokens=1)
    with pytest.raises(UnsupportedError, match="must end in one of"):
        draw(report, tmp_path / "verify.xyz")
    assert not (tmp_path / "verify.xyz").exists()


def test_no_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match=r"nvfp4-experts\[plot\]"):
        check_plotting()
