# SPDX-License-Identifier: Apache-2.0
"""`from_pretrained` of a rank's part of the experts, in a process group of one; more: tests/examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from examples.heldout import load_windows
from nvfp4_experts.errors import InputError, UnsupportedError
from nvfp4_experts.integrations.transformers import Nvfp4ExpertsConfig, experts_of
from nvfp4_experts.layers.parallel import PLANS, parallelize
from nvfp4_experts.layers.part import LayerPart

Load = Callable[..., Any]


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize(("dialect", "plan"), [*(("modelopt", plan) for plan in PLANS), ("hybrid", "ep")])
def test_a_model_in_parts(dialect: str, plan: str, load: Load, tiny_checkpoint: Path, tmp_path: Path) -> None:
    whole = load(dialect, config=Nvfp4ExpertsConfig(activations="bf16"))
    model = load(dialect, config=Nvfp4ExpertsConfig(activations="bf16", plan=plan))
    parts = [m for m in model.modules() if isinstance(m, LayerPart)]
    has_shared_parts = dialect == "modelopt" and plan != "dispatch"
    assert len(parts) == (8 if has_shared_parts else 4) and {part.plan for part in parts} == {plan}
    assert sum(e.resident_bytes for e in experts_of(model).values()) == sum(
        e.resident_bytes for e in experts_of(whole).values()
    )
    tokens = load_windows(tiny_checkpoint / "heldout.txt", 1)[0][:, :32]
    with torch.no_grad():
        with pytest.raises(InputError, match=f"call parallelize\\(model, plan='{plan}'\\)"):
            model(tokens)
        assert parallelize(model, plan=plan) is model
        assert torch.equal(model(tokens).logits, whole(tokens).logits)
    with pytest.raises(UnsupportedError, match="save a model that was loaded whole"):
        model.save_pretrained(tmp_path / "copy")


def test_parts_of_no_group(load: Load) -> None:
    with pytest.raises(InputError, match="init_process_group"):
        load("modelopt", config=Nvfp4ExpertsConfig(plan="ep"))
    with pytest.raises(InputError, match=r"plan: must be one of \('tp', 'ep'"):
        Nvfp4ExpertsConfig(plan="pp")
