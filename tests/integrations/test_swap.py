# SPDX-License-Identifier: Apache-2.0
"""Swapping experts inside the embedded model, and in models that merely look alike."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import Tensor, nn

from examples.heldout import load_windows, nats_per_byte
from nvfp4_experts import Nvfp4RoutedExperts, Nvfp4SharedExpert
from nvfp4_experts.checkpoints import convert, load_input_scales, open_checkpoint, save_input_scales
from nvfp4_experts.errors import CalibrationError, CheckpointError, InputError
from nvfp4_experts.integrations.transformers import (
    calibrate_model,
    experts_of,
    find_experts,
    find_shared_experts,
    swap_experts,
    swap_shared_experts,
)


@pytest.fixture(scope="module")
def original(tiny_checkpoint: Path) -> nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.bfloat16).eval()


@pytest.fixture
def model(original: nn.Module) -> nn.Module:
    """The loaded model; what a test swaps is put back afterwards."""
    modules = find_shared_experts(original) | find_experts(original, "routed")
    yield original
    for name, module in modules.items():
        original.set_submodule(name, module)


@pytest.fixture(scope="module")
def windows(tiny_checkpoint: Path) -> tuple[Tensor, Tensor]:
    return load_windows(tiny_checkpoint / "heldout.txt", 4)


def test_swap_and_restore(model: nn.Module, windows: tuple[Tensor, Tensor]) -> None:
    before = nats_per_byte(model, *windows)
    modules = find_shared_experts(model)
    handle = swap_shared_experts(model, activations="bf16")
    assert list(handle.experts) == [f"model.layers.{i}.mlp.shared_experts" for i in range(4)]
    assert all(isinstance(model.get_submodule(name), Nvfp4SharedExpert) for name in modules)
    swapped = nats_per_byte(model, *windows)
    # Weight-only NVFP4 of the shared experts costs 0.0002 nats/byte on this model; exchanged gate and up cost 0.11.
    assert swapped != before and abs(swapped - before) < 0.005
    handle.restore()
    assert find_shared_experts(model) == modules
    assert nats_per_byte(model, *windows) == before


def test_all_experts_and_back(model: nn.Module, windows: tuple[Tensor, Tensor]) -> None:
    before = nats_per_byte(model, *windows)
    modules = find_shared_experts(model) | find_experts(model, "routed")
    handle = swap_experts(model, activations="nvfp4", activation_scale="per_token")
    assert handle.experts == experts_of(model) and handle.experts.keys() == modules.keys()
    assert list(handle.routed) == list(handle.shared) == [0, 1, 2, 3]
    assert {(e.num_experts, e.top_k, e.weighting, e.swiglu_limit) for e in handle.routed.values()} == {
        (8, 2, "before_down", 10.0)
    }
    swapped = nats_per_byte(model, *windows)
    # All experts in NVFP4, activations too, cost 0.003 nats/byte on this model; exchanged gate and up cost 1.07.
    assert swapped != before and abs(swapped - before) < 0.02
    handle.set_activations("bf16")
    assert nats_per_byte(model, *windows) != swapped
    handle.restore()
    assert find_shared_experts(model) | find_experts(model, "routed") == modules
    assert nats_per_byte(model, *windows) == before


def test_routed_experts_from_a_checkpoint_are_those_of_the_model(
    model: nn.Module, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    convert(tiny_checkpoint, tmp_path / "nvfp4", experts="all")
    from_disk = swap_experts(model, checkpoint=tmp_path / "nvfp4", experts="routed", activations="bf16")
    from_disk.restore()
    assert not from_disk.shared
    quantised = swap_experts(model, experts="routed", activations="bf16")
    for layer, experts in quantised.routed.items():
        assert isinstance(experts, Nvfp4RoutedExperts)
        ours, theirs = experts.state_dict(), from_disk.routed[layer].state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[k].view(torch.uint8), theirs[k].view(torch.uint8)) for k in ours)


def test_calibration_covers_routed_experts(model: nn.Module, tiny_checkpoint: Path) -> None:
    handle = swap_experts(model, activations="nvfp4", activation_scale="static")
    scales = calibrate_model(model, [load_windows(tiny_checkpoint / "calibration.txt", 4)[0]])
    assert scales.keys() == set(range(4)) | {(layer, expert) for layer in range(4) for expert in range(8)}
    for layer, experts in handle.routed.items():
        assert [scales[layer, n][1] for n in range(8)] == experts.hidden_scale.tolist()
        assert not experts.uncalibrated and experts.activation_scale == "static"
        assert (experts.hidden_scale > 0).all() and len(experts.hidden_scale.unique()) == 8


def test_calibration_of_all_experts_goes_to_disk_and_back(
    model: nn.Module, windows: tuple[Tensor, Tensor], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    handle = swap_experts(model, activations="nvfp4", activation_scale="static")
    scales = calibrate_model(model, [load_windows(tiny_checkpoint / "calibration.txt", 4)[0]])
    static = nats_per_byte(model, *windows)
    save_input_scales(tmp_path / "scales.safetensors", scales)
    convert(
        tiny_checkpoint,
        tmp_path / "nvfp4",
        experts="all",
        input_scales=load_input_scales(tmp_path / "scales.safetensors"),
    )
    handle.restore()
    again = swap_experts(model, checkpoint=tmp_path / "nvfp4", activations="nvfp4")
    assert {e.activation_scale for e in again.experts.values()} == {"static"}
    assert nats_per_byte(model, *windows) == static


def test_an_expert_that_no_token_reached_has_no_scale_to_write(model: nn.Module) -> None:
    swap_experts(model)
    scales = calibrate_model(model, [torch.tensor([[256]])])
    assert sum(isinstance(expert, tuple) for expert in scales) == 4 * 2  # of eight experts one token reaches two


def test_the_limit_comes_from_the_model(model: nn.Module) -> None:
    assert {e.swiglu_limit for e in swap_shared_experts(model).experts.values()} == {10.0}


def test_from_an_nvfp4_checkpoint(model: nn.Module, tiny_checkpoint: Path, tmp_path: Path) -> None:
    convert(tiny_checkpoint, tmp_path / "nvfp4")
    from_disk = swap_shared_experts(model, checkpoint=tmp_path / "nvfp4", activations="bf16")
    experts = from_disk.experts
    from_disk.restore()
    for name, expert in swap_shared_experts(model, activations="bf16").experts.items():
        for part in ("gate", "up", "down"):
            ours, theirs = getattr(expert, part), getattr(experts[name], part)
            assert torch.equal(ours.codes, theirs.codes) and torch.equal(ours.global_scale, theirs.global_scale)


def test_a_checkpoint_that_lacks_a_layer_changes_nothing(model: nn.Module, tmp_path: Path) -> None:
    modules = find_shared_experts(model)
    with pytest.raises(CheckpointError):
        swap_shared_experts(model, checkpoint=tmp_path / "missing")
    assert find_shared_experts(model) == modules


def test_calibration_goes_to_disk_and_back(
    model: nn.Module, windows: tuple[Tensor, Tensor], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    handle = swap_shared_experts(model, activations="nvfp4", activation_scale="static")
    with pytest.raises(CalibrationError, match="calibrate"):
        model(input_ids=windows[0][:1])
    scales = calibrate_model(model, windows[0].split(4))
    assert set(scales) == {0, 1, 2, 3}
    static = nats_per_byte(model, *windows)
    save_input_scales(tmp_path / "scales.safetensors", scales)
    assert load_input_scales(tmp_path / "scales.safetensors") == scales
    convert(tiny_checkpoint, tmp_path / "nvfp4", input_scales=scales)
    handle.restore()
    again = swap_shared_experts(model, checkpoint=open_checkpoint(tmp_path / "nvfp4").path, activations="nvfp4")
    assert {e.activation_scale for e in again.experts.values()} == {"static"}
    assert {n: (e.input_scale, e.hidden_scale) for n, e in again.shared.items()} == scales
    assert nats_per_byte(model, *windows) == static


def test_set_activations_changes_every_expert(model: nn.Module) -> None:
    handle = swap_shared_experts(model, activations="bf16")
    handle.set_activations("nvfp4", "per_token")
    assert {(m.activations, m.activation_scale) for m in model.modules() if isinstance(m, Nvfp4SharedExpert)} == {
        ("nvfp4", "per_token")
    }


def test_calibration_refuses(model: nn.Module) -> None:
    with pytest.raises(InputError, match="swap_experts"):
        calibrate_model(model, [])
    swap_shared_experts(model)
    with pytest.raises(CalibrationError, match="batches"):
        calibrate_model(model, [])


def test_an_expert_that_was_not_reached_is_told_even_if_it_has_scales() -> None:
    model = other_model(Mlp())
    swap_shared_experts(model, input_scale=1.0, hidden_scale=1.0)
    model.forward = lambda x: x
    with pytest.raises(CalibrationError, match="none"):
        calibrate_model(model, [torch.ones(1, 32)])


def test_calibration_leaves_forward_alone_even_when_it_fails(model: nn.Module) -> None:
    handle = swap_shared_experts(model, activations="fp8")
    with pytest.raises(Exception, match="input_ids"):
        calibrate_model(model, [{"nonsense": 1}])
    assert all("forward" not in vars(e) and e.activations == "fp8" for e in handle.experts.values())


class Mlp(nn.Module):
    """A shared expert of another model family: singular name, limit in no place."""

    def __init__(self, bias: bool = False, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(32, 48, bias), nn.Linear(32, 48, bias)
        self.down_proj = nn.Linear(48, 32, bias)
        self.act_fn = activation or nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def other_model(mlp: nn.Module) -> nn.Module:
    layer = nn.Module()
    layer.mlp = nn.Module()
    layer.mlp.shared_expert = mlp
    model = nn.Module()
    model.layers = nn.ModuleList([layer])
    model.config = SimpleNamespace()
    return model


def test_by_rule_not_by_list() -> None:
    model, x = other_model(Mlp()), torch.randn(4, 32)
    want = model.layers[0].mlp.shared_expert(x)
    handle = swap_shared_experts(model, activations="bf16")
    assert handle.shared[0].swiglu_limit == 0.0
    got = model.layers[0].mlp.shared_expert(x)
    assert (got - want).norm() < 0.3 * want.norm()


@pytest.mark.parametrize(
    ("mlp", "reason"), [(Mlp(bias=True), "bias"), (Mlp(activation=nn.GELU()), "act_fn"), (nn.Identity(), "gate_proj")]
)
def test_what_does_not_fit_the_rule_is_refused_by_name(mlp: nn.Module, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        swap_shared_experts(other_model(mlp))


def test_a_model_without_shared_experts_is_refused() -> None:
    with pytest.raises(InputError, match="shared_expert"):
        swap_shared_experts(nn.Linear(4, 4))


def test_swapping_twice_is_refused(model: nn.Module) -> None:
    swap_shared_experts(model)
    with pytest.raises(InputError, match="already"):
        swap_shared_experts(model)
