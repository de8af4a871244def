# SPDX-License-Identifier: Apache-2.0
"""Tensors of a checkpoint that a model has no place for: saved as they were, from where they were read."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nvfp4_experts.checkpoints import open_checkpoint
from nvfp4_experts.errors import UnsupportedError
from nvfp4_experts.integrations.transformers import Nvfp4ExpertsConfig
from tests.integrations.checkpoints import write_hybrid


def test_mtp_layers_are_saved_and_must_still_be_there(
    load: Callable[..., Any], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    source = open_checkpoint(write_hybrid(tiny_checkpoint, tmp_path / "hybrid"))
    mtp = {name: info.dtype for name, info in source.tensors.items() if name.startswith("mtp.")}
    assert {"I8", "F8_E8M0", "F8_E4M3", "BF16"} <= set(mtp.values()) and len(mtp) > 60
    model = load(source.directory, config=Nvfp4ExpertsConfig())
    model.save_pretrained(tmp_path / "copy")
    saved = open_checkpoint(tmp_path / "copy")
    assert {name: saved.tensors[name].dtype for name in mtp} == mtp
    shutil.move(source.directory, tmp_path / "elsewhere")
    with pytest.raises(UnsupportedError, match=r"must find mtp\.0\..*, got .*No such file.* put back .*hybrid"):
        model.save_pretrained(tmp_path / "second")
