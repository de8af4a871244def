# SPDX-License-Identifier: Apache-2.0
"""Swapping experts inside the embedded model, and in models that merely look alike."""

from __future__ import annotations

import copy
import pickle
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from examples.heldout import load_windows, nats_per_byte
from nvfp4_experts import Nvfp4MoE, Nvfp4RoutedExperts, Nvfp4SharedExpert
from nvfp4_experts.checkpoints import convert, load_input_scales, load_moe, open_checkpoint, save_input_scales
from nvfp4_experts.errors import CalibrationError, CheckpointError, InputError, UnsupportedError
from nvfp4_experts.integrations.transformers import (
    calibrate_model,
    experts_of,
    find_experts,
    find_shared_experts,
    set_activations,
    swap_experts,
    swap_shared_experts,
)
from nvfp4_experts.layers.parallel import parallelize
from nvfp4_experts.layers.part import part_of
from nvfp4_experts.layers.routing import Router


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
    vars(original).pop("save_pretrained", None)


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


@pytest.mark.parametrize("by_handle", [True, False])
def test_set_activations_packs_one_layer_at_a_time(
    by_handle: bool, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where another format has a backend of its own, as fp8 on Hopper: the old layer goes as the new one comes."""
    monkeypatch.setattr(Nvfp4SharedExpert, "_choose", lambda self, _: {"fp8": "torch"}.get(self.activations, "cpu"))
    handle = swap_shared_experts(model, activations="bf16")
    packed = [weakref.ref(experts._weights()[0]) for experts in handle.experts.values()]
    with_activations, alive = Nvfp4SharedExpert.with_activations, []

    def counted(self: Nvfp4SharedExpert, *mode: Any) -> Nvfp4SharedExpert:
        alive.append(sum(old() is not None for old in packed))
        return with_activations(self, *mode)

    monkeypatch.setattr(Nvfp4SharedExpert, "with_activations", counted)
    if by_handle:
        handle.set_activations("fp8")
        assert handle.experts == experts_of(model)
    else:
        handle.experts.clear()
        set_activations(model, "fp8")
    assert {(experts.activations, experts.backend) for experts in experts_of(model).values()} == {("fp8", "torch")}
    assert alive == [4, 3, 2, 1] and all(old() is None for old in packed)


def test_activations_that_one_layer_cannot_have_change_none(model: nn.Module) -> None:
    shared = swap_shared_experts(model, activations="nvfp4")
    routed = swap_experts(model, experts="routed", activations="nvfp4", backend="exact")
    before = experts_of(model)
    for order in (shared.experts | routed.experts, routed.experts | shared.experts):
        with pytest.raises(UnsupportedError, match="backend 'exact'"):
            set_activations(model, "bf16", experts=order)
    with pytest.raises(InputError, match="activation_scale"):
        shared.set_activations("nvfp4", "fixed")
    assert experts_of(model) == before == shared.experts | routed.experts


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


@pytest.fixture
def block() -> Nvfp4MoE:
    """A whole block, its formats other than calibration's."""
    scale, options = 0.2, {"activations": "nvfp4", "activation_scale": "static", "swiglu_limit": 0.5}
    routed = Nvfp4RoutedExperts.from_weights(
        *(scale * torch.randn(4, *shape) for shape in ((48, 32), (48, 32), (32, 48))), top_k=2, **options
    )
    shared = Nvfp4SharedExpert.from_weights(
        *(scale * torch.randn(shape) for shape in ((48, 32), (48, 32), (32, 48))), **options
    )
    return Nvfp4MoE(Router(torch.randn(4, 32), 2), routed, shared)


class OneBlock(nn.Module):
    """A model of such a block, which may give it the memory for its result."""

    def __init__(self, block: nn.Module, gives_out: bool = False) -> None:
        super().__init__()
        self.layers, self.gives_out = nn.ModuleList([block]), gives_out

    def forward(self, x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        y = self.layers[0](x, out=out) if self.gives_out else self.layers[0](x)
        return out if self.gives_out else y


@pytest.mark.parametrize("gives_out", [False, True])
def test_calibration_of_whole_blocks(block: Nvfp4MoE, gives_out: bool) -> None:
    """Their experts run together, past their own forward: both are calibrated, and the model runs on."""
    x, parts, seen = torch.randn(40, 32).bfloat16(), copy.deepcopy(block), []
    model = OneBlock(block, gives_out)
    model.register_forward_hook(lambda *call: seen.append(call[2]))
    scales = calibrate_model(model, [x])
    parts.routed.calibrate(x, *parts.router(x))
    parts.shared.calibrate(x)
    assert scales == {0: (parts.shared.input_scale, parts.shared.hidden_scale)} | {
        (0, n): pair
        for n, pair in enumerate(
            zip(parts.routed.input_scale.tolist(), parts.routed.hidden_scale.tolist(), strict=True)
        )
    }
    in_bf16 = (part.with_activations("bf16") for part in (block.routed, block.shared))
    assert torch.equal(seen[0], Nvfp4MoE(block.router, *in_bf16)(x))
    assert block(x).isfinite().all()  # with the static scales, its methods its own again
    assert not {"forward", "with_shared"} & (vars(block.routed).keys() | vars(block.shared).keys())


def test_scales_of_modules_without_a_layer_number_of_their_own_are_in_the_modules_alone(block: Nvfp4MoE) -> None:
    x = torch.randn(40, 32).bfloat16()
    twins = nn.ModuleDict({"encoder": OneBlock(block, False), "decoder": OneBlock(copy.deepcopy(block), False)})
    for model, run in ((block, block), (twins, nn.Sequential(*twins.values()))):
        calibrated = copy.deepcopy(model) if model is block else model
        if model is not block:
            calibrated.forward = run.forward
        assert calibrate_model(calibrated, [x]) == {}
        assert all(e.hidden_scale is not None for e in experts_of(calibrated).values())


@pytest.mark.parametrize("shared", ["keep", None])
def test_calibration_of_blocks_without_an_nvfp4_shared_expert(
    block: Nvfp4MoE, shared: str | None, tiny_checkpoint: Path
) -> None:
    """Which give their routed experts memory for the result."""
    block = Nvfp4MoE(block.router, block.routed) if shared is None else load_moe(tiny_checkpoint, 1, shared=shared)
    x, seen = torch.randn(30, block.routed.hidden_size).bfloat16(), []
    model = OneBlock(block, gives_out=True)
    model.register_forward_hook(lambda *call: seen.append(call[2]))
    scales = calibrate_model(model, [x])
    assert scales and all(isinstance(expert, tuple) for expert in scales)
    again = Nvfp4MoE(block.router, block.routed.with_activations("bf16"), block.shared)
    assert torch.equal(seen[0], again(x))


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("plan", ["tp", "ep", "dispatch"])
def test_a_model_over_ranks_was_to_be_calibrated_before(block: Nvfp4MoE, plan: str) -> None:
    x, model = torch.randn(5, 32), OneBlock(copy.deepcopy(block))
    calibrate_model(model, [torch.randn(40, 32)])
    want = model(x)
    parallelize(model, plan=plan)
    assert torch.equal(model(x), want)
    for parts in (model, OneBlock(part_of(block, plan, 0, 2))):
        with pytest.raises(CalibrationError, match=r"one rank's part of layers\.0.*before parallelize"):
            calibrate_model(parts, [x])


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


# --- saving ----------------------------------------------------------------------------------------------------------


def test_a_swapped_model_is_not_saved(model: nn.Module, tmp_path: Path) -> None:
    """transformers' own would write names that neither it nor anybody else reads."""
    shared, routed = swap_shared_experts(model), swap_experts(model, experts="routed")
    routed.set_activations("fp8")
    for handle in (shared, routed):
        with pytest.raises(UnsupportedError, match=r"save_pretrained.*restore\(\).*quantize.*Nvfp4ExpertsConfig"):
            model.save_pretrained(tmp_path / "swapped")
        handle.restore()
    assert not (tmp_path / "swapped").exists() and "save_pretrained" not in vars(model)
    model.save_pretrained(tmp_path / "restored")
    _, report = type(model).from_pretrained(tmp_path / "restored", output_loading_info=True)
    assert not any(report.values())


def test_originals_that_were_let_go_do_not_come_back_to_be_saved(model: nn.Module, tmp_path: Path) -> None:
    handle = swap_shared_experts(model)
    originals = dict(handle.originals)
    handle.originals.clear()
    handle.restore()
    with pytest.raises(UnsupportedError, match=r"4 of them, model\.layers\.0\.mlp\.shared_experts for one"):
        model.save_pretrained(tmp_path)
    handle.originals.update(originals)
    handle.restore()
    assert "save_pretrained" not in vars(model)


def test_what_somebody_else_put_in_the_place_of_save_pretrained_comes_back() -> None:
    model = other_model(Mlp())
    model.save_pretrained = str.upper
    handle = swap_shared_experts(model)
    for swapped in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(UnsupportedError, match="while experts are swapped"):
            swapped.save_pretrained("there")
    handle.restore()
    assert model.save_pretrained is str.upper
    del model.save_pretrained
    swap_shared_experts(model)
    assert not hasattr(model, "save_pretrained")
