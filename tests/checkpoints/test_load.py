# SPDX-License-Identifier: Apache-2.0
"""Loading layers: every format gives the layer of its decoded weights; clamp and static scales come from the files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nvfp4_experts.checkpoints import convert, errors, load_shared_expert, open_checkpoint
from nvfp4_experts.checkpoints.input_scales import load_input_scales, save_input_scales
from nvfp4_experts.layers.shared_expert import Nvfp4SharedExpert
from tests.checkpoints import factory


@pytest.mark.parametrize("naming", factory.WORDS)
@pytest.mark.parametrize("kind", factory.MAKERS)
def test_a_layer_of_every_format_computes_what_its_values_say(tmp_path: Path, kind: str, naming: str) -> None:
    tensors, values = factory.model(factory.MAKERS[kind], naming=naming)
    loaded = load_shared_expert(factory.write(tmp_path / "c", tensors, shards=2), 1, activations="bf16", max_tokens=64)
    assert (loaded.swiglu_limit, loaded.max_tokens, loaded.activations) == (10.0, 64, "bf16")
    w = values[factory.expert_name(naming, 1, None)]
    if factory.FORMATS.get(kind) in ("nvfp4", "mxfp4"):  # exact: the very values
        for name in ("gate", "up", "down"):
            assert torch.equal(getattr(loaded, name).dequantize(), w[name])
    else:
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(kind, torch.float32)
        twin = Nvfp4SharedExpert.from_weights(*(w[n].to(dtype) for n in ("gate", "up", "down")), activations="bf16")
        x = torch.randn(5, 160)
        assert torch.equal(loaded(x), twin(x))


@pytest.mark.parametrize("dialect", ["modelopt", "compressed-tensors"])
@pytest.mark.parametrize("kind", ["bf16", "fp8-32-e8m0", "mxfp4"])
def test_loading_converts_as_convert_does(tmp_path: Path, kind: str, dialect: str) -> None:
    source = factory.write(tmp_path / "src", factory.model(factory.MAKERS[kind])[0])
    convert(source, tmp_path / "dst", dialect=dialect, recipe="compressed-tensors")
    x = torch.randn(7, 160)
    direct = load_shared_expert(source, 0, recipe="compressed-tensors", activations="bf16")(x)
    assert torch.equal(load_shared_expert(tmp_path / "dst", 0, activations="bf16")(x), direct)


@pytest.mark.parametrize("dialect", ["modelopt", "compressed-tensors"])
def test_static_scales_come_from_the_checkpoint(tmp_path: Path, dialect: str) -> None:
    source = factory.write(tmp_path / "src", factory.model(factory.plain())[0])
    convert(source, tmp_path / "dst", dialect=dialect, input_scales={0: (0.003, 0.02)})
    static, dynamic = (load_shared_expert(tmp_path / "dst", layer, activations="nvfp4") for layer in (0, 1))
    assert (static.activation_scale, dynamic.activation_scale) == ("static", "dynamic")
    assert static.input_scale == pytest.approx(0.003, rel=2e-7) and static.hidden_scale == pytest.approx(0.02, rel=2e-7)
    assert dynamic.input_scale is None and dynamic.hidden_scale is None
    assert load_shared_expert(tmp_path / "dst", 0, activation_scale="per_token").activation_scale == "per_token"


def test_of_two_input_scales_the_larger_covers_both(tmp_path: Path) -> None:
    maker = {name: factory.modelopt(input_scale=s) for name, s in (("gate", 0.25), ("up", 0.5), ("down", 4.0))}
    loaded = load_shared_expert(factory.write(tmp_path / "c", factory.model(maker)[0]), 0)
    assert (loaded.input_scale, loaded.hidden_scale, loaded.activation_scale) == (0.5, 4.0, "static")


def test_a_scale_that_one_projection_lacks_is_not_made_up(tmp_path: Path) -> None:
    maker = {
        "gate": factory.modelopt(input_scale=0.25),
        "up": factory.modelopt(),
        "down": factory.modelopt(input_scale=4.0),
    }
    loaded = load_shared_expert(factory.write(tmp_path / "c", factory.model(maker)[0]), 0)
    assert (loaded.input_scale, loaded.activation_scale) == (None, "dynamic")


def test_gate_and_up_keep_their_own_scales(tmp_path: Path) -> None:
    maker = {"gate": factory.modelopt(1e-4), "up": factory.modelopt(3e-4), "down": factory.modelopt(2e-4)}
    tensors, _ = factory.model(maker)
    loaded = load_shared_expert(factory.write(tmp_path / "c", tensors), 0)
    found = [t.global_scale.item() for t in (loaded.gate, loaded.up, loaded.down)]
    assert found == pytest.approx([1e-4, 3e-4, 2e-4], rel=1e-7)


def test_a_limit_of_zero_is_off(tmp_path: Path) -> None:
    path = factory.write(tmp_path / "c", factory.model(factory.plain())[0], {"swiglu_limit": 0.0})
    assert not load_shared_expert(path, 0).swiglu_limit


def test_a_layer_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(errors.MissingExpertError, match=r"\[0, 1, 2, 3\]"):
        load_shared_expert(factory.TINY, 4)


def test_input_scales_round_trip_through_their_file(tmp_path: Path) -> None:
    scales = {(60, 7): (2.0, 1.0), 60: (1e-6, 3.0), (0, 255): (0.5, 0.7), 0: (0.1, 0.2)}
    save_input_scales(tmp_path / "scales.safetensors", scales)
    found = load_input_scales(tmp_path / "scales.safetensors")
    assert found == {n: tuple(torch.tensor(v).item() for v in pair) for n, pair in scales.items()}
    assert list(found) == [0, (0, 255), 60, (60, 7)]
    assert open_checkpoint(tmp_path / "scales.safetensors").tensors.keys() == {
        f"layers.{n}.{kind}"
        for n in ("0", "0.experts.255", "60", "60.experts.7")
        for kind in ("input_scale", "hidden_scale")
    }
    save_input_scales(tmp_path / "scales.safetensors", {1: (1.0, 1.0)})
    assert load_input_scales(tmp_path / "scales.safetensors") == {1: (1.0, 1.0)}


@pytest.mark.parametrize(
    "content",
    [
        {"layers.0.input_scale": torch.tensor(1.0)},
        {"layers.0.input_scale": torch.tensor(1.0), "layers.0.hidden_scale": torch.tensor(0.0)},
        {"layers.0.input_scale": torch.ones(1), "layers.0.hidden_scale": torch.tensor(1.0)},
        {"layers.0.input_scale": torch.tensor(1), "layers.0.hidden_scale": torch.tensor(1.0)},
        {"layers.00.input_scale": torch.tensor(1.0), "layers.00.hidden_scale": torch.tensor(1.0)},
        {"layers.0.experts.1.input_scale": torch.tensor(1.0), "layers.0.hidden_scale": torch.tensor(1.0)},
        {"weight": torch.tensor(1.0)},
    ],
)
def test_a_file_that_holds_no_input_scales(tmp_path: Path, content: dict) -> None:
    from safetensors.torch import save_file

    save_file(content, tmp_path / "scales")
    with pytest.raises(errors.InputScalesError):
        load_input_scales(tmp_path / "scales")


@pytest.mark.parametrize("pair", [(0.0, 1.0), (1.0, -1.0), (float("inf"), 1.0), (1.0, float("nan")), (1e-60, 1.0)])
def test_scales_that_are_none_are_not_saved(tmp_path: Path, pair: tuple[float, float]) -> None:
    with pytest.raises(errors.InputScalesError, match="layer 3"):
        save_input_scales(tmp_path / "scales", {3: pair})
    with pytest.raises(errors.InputScalesError, match="layer 3 routed expert 5"):
        save_input_scales(tmp_path / "scales", {(3, 5): pair})
    assert list(tmp_path.iterdir()) == []
