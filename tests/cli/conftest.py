# SPDX-License-Identifier: Apache-2.0
"""The trained checkpoint converted on the command line, once; never written to: copy it first."""

from __future__ import annotations

from pathlib import Path

import pytest

from nvfp4_experts.checkpoints import save_input_scales
from tests.cli.commands import invoke


@pytest.fixture(scope="session")
def input_scales(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of static scales for the four layers; amax of x 6.5, of h 50."""
    path = tmp_path_factory.mktemp("scales") / "scales.safetensors"
    save_input_scales(path, {layer: (6.5 / 2688, 50 / 2688) for layer in range(4)})
    return path


@pytest.fixture(scope="session")
def modelopt(tiny_checkpoint: Path, input_scales: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared experts in NVFP4 with input scales, ModelOpt dialect, converted on the command line."""
    path = tmp_path_factory.mktemp("cli") / "modelopt"
    invoke("quantize", tiny_checkpoint, path, "--input-scales", input_scales)
    return path


@pytest.fixture(scope="session")
def compressed(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All experts in NVFP4 without input scales, compressed-tensors dialect."""
    path = tmp_path_factory.mktemp("cli") / "compressed"
    invoke("quantize", tiny_checkpoint, path, "--dialect", "compressed-tensors", "--experts", "all")
    return path
