# SPDX-License-Identifier: Apache-2.0
"""The trained checkpoint in NVFP4, converted once; never written to: copy it first."""

from __future__ import annotations

from pathlib import Path

import pytest

from nvfp4_experts.checkpoints import convert

# What calibration on held-out text gives, within a few per cent; amax / 2688.
INPUT_SCALES = {layer: (6.5 / 2688, 50 / 2688) for layer in range(4)}


@pytest.fixture(scope="session")
def tiny_nvfp4(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared experts in NVFP4, ModelOpt dialect, with input scales."""
    path = tmp_path_factory.mktemp("tiny") / "nvfp4"
    convert(tiny_checkpoint, path, input_scales=INPUT_SCALES)
    return path
