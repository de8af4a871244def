# SPDX-License-Identifier: Apache-2.0
"""One quiet, offline transformers for all tests of this folder, and the embedded model in each dialect, made once."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if find_spec("transformers") is None:
    collect_ignore_glob = ["test_*.py"]

DIALECTS = ("quantize", "modelopt", "compressed-tensors", "hybrid")


@pytest.fixture(scope="session", autouse=True)
def quiet() -> None:
    import transformers

    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def checkpoints(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories: "quantize" is what the command line writes by default, "modelopt" another producer's export."""
    from nvfp4_experts.checkpoints import convert
    from tests.integrations.checkpoints import write_hybrid

    place = tmp_path_factory.mktemp("dialects")
    found = {name: place / name for name in DIALECTS}
    convert(tiny_checkpoint, found["quantize"])
    scales = {layer: (0.004, 0.05) for layer in range(4)}
    convert(tiny_checkpoint, found["modelopt"], experts="all", separate_scales=True, input_scales=scales)
    config = json.loads((found["modelopt"] / "config.json").read_text())
    config["quantization_config"]["producer"] = {"name": "modelopt", "version": "0.41.0"}
    (found["modelopt"] / "config.json").write_text(json.dumps(config))
    convert(tiny_checkpoint, found["compressed-tensors"], experts="all", dialect="compressed-tensors")
    write_hybrid(tiny_checkpoint, found["hybrid"])
    return found


@pytest.fixture(scope="session")
def load(checkpoints: dict[str, Path]) -> Callable[..., Any]:
    """from_pretrained as the documentation says it: the hybrid with its one line, the others without."""
    import transformers

    from nvfp4_experts.integrations.transformers import Nvfp4ExpertsConfig

    def from_pretrained(dialect: str | Path, **options: Any) -> Any:
        path = checkpoints.get(str(dialect), Path(dialect))
        if dialect == "hybrid" or "config" in options:
            config = transformers.AutoConfig.from_pretrained(path)
            config.quantization_config = options.pop("config", Nvfp4ExpertsConfig())
            options["config"] = config
        return transformers.AutoModelForCausalLM.from_pretrained(path, **options)

    return from_pretrained
