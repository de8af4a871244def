# SPDX-License-Identifier: Apache-2.0
"""Conversions of whole blocks: hybrids made, hybrids read, shared experts kept or not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nvfp4_experts.checkpoints import convert, errors, load_moe, load_routed_experts, open_checkpoint
from nvfp4_experts.errors import InputError
from tests.checkpoints import factory
from tests.checkpoints.test_convert import DIALECTS, all_tensors, fingerprint, same

FP8 = {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic"}


def deepseek(path: Path, **config: Any) -> Path:
    """As DeepSeek publishes V4: shared experts FP8, routed ones MXFP4, and an MTP layer alike."""
    tensors, _, settings = factory.blocks(factory.fp8((32, 32)), factory.mxfp4())
    for index in (None, 0):
        prefix = factory.expert_name("official", 0, index).replace("layers", "mtp")
        tensors |= factory.expert(factory.fp8((32, 32)) if index is None else factory.mxfp4(), prefix)[0]
    return factory.write(path, tensors, settings | {"expert_dtype": "fp4", "quantization_config": FP8}, shards=3)


def hybrid(path: Path, **options: Any) -> Path:
    tensors, _, config = factory.hybrid(**options)
    return factory.write(path, tensors, config, shards=3)


def blocks_agree(a: Path, b: Path, shared: str) -> bool:
    x, ids = torch.randn(9, 160), torch.randint(11, (9,))
    options = {"shared": shared, "activations": "nvfp4"}
    return all(
        torch.equal(load_moe(a, layer, **options)(x, ids), load_moe(b, layer, **options)(x, ids)) for layer in (0, 1)
    )


def changed(before: Path, after: Path) -> set[str]:
    """Modules that are not, byte for byte, what they were."""
    old, new = all_tensors(before), all_tensors(after)
    names = {name for name in old.keys() | new.keys() if not _same(old.get(name), new.get(name))}
    return {name.rpartition(".")[0] for name in names}


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and same(a, b)


@pytest.mark.parametrize("shared", ["nvfp4", "keep"])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_of_deepseeks_own(tmp_path: Path, dialect: str, shared: str) -> None:
    source = deepseek(tmp_path / "src")
    report = convert(source, tmp_path / "dst", dialect=dialect, experts="all", shared=shared)
    assert report.converted == ({"fp8_block": 6} if shared == "nvfp4" else {}) | {"mxfp4": 24}
    touched = changed(source, tmp_path / "dst")
    assert any("shared_experts" in name for name in touched) == (shared == "nvfp4")
    assert not any(name.startswith("mtp") or ".gate" in name for name in touched)
    assert blocks_agree(source, tmp_path / "dst", shared)
    section = json.loads((tmp_path / "dst" / "config.json").read_text())["quantization_config"]
    assert section["moe_quant_algo"] == "NVFP4" and section["quant_method"] == "fp8"
    assert open_checkpoint(tmp_path / "dst").problems == []


def test_to_keep_shared_experts_is_to_convert_the_routed_ones(tmp_path: Path) -> None:
    source = deepseek(tmp_path / "src")
    convert(source, tmp_path / "keep", experts="all", shared="keep")
    convert(source, tmp_path / "routed", experts="routed")
    assert fingerprint(tmp_path / "keep") == fingerprint(tmp_path / "routed")


def test_the_shared_experts_of_a_hybrid(tmp_path: Path) -> None:
    source = hybrid(tmp_path / "src")
    convert(source, tmp_path / "dst", experts="all")
    assert changed(source, tmp_path / "dst") == {
        f"layers.{layer}.ffn.shared_experts.{word}" for layer in (0, 1) for word in ("w1", "w2", "w3")
    }
    assert blocks_agree(source, tmp_path / "dst", "nvfp4")
    section = json.loads((tmp_path / "dst" / "config.json").read_text())["quantization_config"]
    assert section["moe_quant_algo"] == "NVFP4" and not any(
        "shared_experts" in p for p in section["ignore"] if p[0] == "l"
    )
    with pytest.raises(errors.NothingToConvertError, match="routed experts that are not yet"):
        convert(source, tmp_path / "none", experts="all", shared="keep")


def test_a_hybrid_in_the_other_dialect_keeps_codes_and_static_scales(tmp_path: Path) -> None:
    source = hybrid(tmp_path / "src")
    convert(source, tmp_path / "ct", dialect="compressed-tensors", experts="all", shared="keep")
    convert(tmp_path / "ct", tmp_path / "back", experts="routed")
    before, there, back = (load_routed_experts(tmp_path / name, 1) for name in ("src", "ct", "back"))
    assert there.activation_scale == back.activation_scale == "static"
    state = before.state_dict()
    for other in (there.state_dict(), back.state_dict()):
        for name, tensor in state.items():
            if name.endswith(("codes", "block_scales")):
                assert torch.equal(other[name].float(), tensor.float()), name
            else:  # through a reciprocal and back
                torch.testing.assert_close(other[name], tensor, rtol=2**-22, atol=0)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_the_trained_checkpoint(tmp_path: Path, dialect: str) -> None:
    """Loading quantises as converting does: all four blocks, bit for bit."""
    convert(factory.TINY, tmp_path / "dst", dialect=dialect, experts="all", recipe="compressed-tensors")
    x, ids = torch.randn(6, 256), torch.randint(256, (6,))
    for layer in range(4):
        loaded = load_moe(factory.TINY, layer, activations="nvfp4", recipe="compressed-tensors")
        converted = load_moe(tmp_path / "dst", layer, activations="nvfp4")
        assert torch.equal(converted(x, ids), loaded(x, ids))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"experts": "shared", "shared": "keep"}, InputError),
        ({"experts": "all", "shared": "fp8"}, InputError),
        ({"experts": "all", "shared": "keep", "input_scales": {0: (1.0, 1.0)}}, errors.InputScalesError),
    ],
)
def test_options_that_contradict_each_other(tmp_path: Path, options: dict[str, Any], error: type[Exception]) -> None:
    source = deepseek(tmp_path / "src")
    with pytest.raises(error):
        convert(source, tmp_path / "dst", **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["src"]
