# SPDX-License-Identifier: Apache-2.0
"""Each anomaly on a checkpoint broken in just that way, and none on a clean one, in both dialects."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nvfp4_experts.checkpoints.errors import NotACheckpointError
from nvfp4_experts.diagnostics.anomalies import CHECKPOINT_RULES, EXPERT_RULES, MODULE_RULES, SEVERITIES
from nvfp4_experts.diagnostics.inspect import InspectionReport, inspect_checkpoint
from nvfp4_experts.errors import InputError
from nvfp4_experts.layouts.scales import swizzle_scales
from tests.checkpoints import factory

RULES = [*MODULE_RULES, *EXPERT_RULES, *CHECKPOINT_RULES]
CONFIG = {
    "hidden_size": 160,
    "num_hidden_layers": 2,
    "swiglu_limit": 10.0,
    "n_routed_experts": 2,
    "n_shared_experts": 1,
}
SHARED = "layers.1.ffn.shared_experts"
DOWN, GATE, UP = f"{SHARED}.w2", f"{SHARED}.w1", f"{SHARED}.w3"
ROUTED = "layers.0.ffn.experts.1"

Tensors = dict[str, Tensor]
Break = Callable[[Tensors], object]


def modelopt() -> Tensors:
    return factory.model(factory.modelopt(input_scale=0.01))[0]


def inspected(tmp_path: Path, tensors: Tensors, config: dict | None = None) -> InspectionReport:
    return inspect_checkpoint(str(factory.write(tmp_path / "ckpt", tensors, CONFIG if config is None else config)))


def scale_byte(name: str, byte: int) -> Break:
    def edit(tensors: Tensors) -> None:
        tensors[name].view(torch.uint8)[3, 1] = byte

    return edit


def multiply(name: str, factor: float) -> Break:
    return lambda tensors: tensors[name].mul_(factor)


def replace(name: str, change: Callable[[Tensor], Tensor]) -> Break:
    return lambda tensors: tensors.update({name: change(tensors[name])})


def remove(prefix: str) -> Break:
    return lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith(prefix)]


def add(name: str, tensor: Tensor) -> Break:
    return lambda tensors: tensors.update({name: tensor})


# anomaly, where it must be found, how to break the checkpoint
BROKEN: list[tuple[str, str, Break]] = [
    ("nan-scale", DOWN, scale_byte(f"{DOWN}.weight_scale", 0x7F)),
    ("nan-scale", DOWN, scale_byte(f"{DOWN}.weight_scale", 0xFF)),
    ("negative-scale", DOWN, scale_byte(f"{DOWN}.weight_scale", 0xB8)),
    ("negative-scale", DOWN, scale_byte(f"{DOWN}.weight_scale", 0x80)),
    ("all-zero", DOWN, lambda t: t[f"{DOWN}.weight"].bitwise_and_(0x88)),
    ("all-zero", DOWN, lambda t: t[f"{DOWN}.weight_scale"].view(torch.uint8).zero_()),
    ("invalid-scale", DOWN, multiply(f"{DOWN}.weight_scale_2", 0.0)),
    ("invalid-scale", DOWN, multiply(f"{DOWN}.weight_scale_2", -1.0)),
    ("invalid-scale", DOWN, multiply(f"{DOWN}.weight_scale_2", float("nan"))),
    ("invalid-scale", DOWN, multiply(f"{DOWN}.input_scale", float("inf"))),
    ("reciprocal-global-scale", DOWN, replace(f"{DOWN}.weight_scale_2", torch.reciprocal)),
    ("missing-input-scale", DOWN, remove(f"{DOWN}.input_scale")),
    ("gate-up-global-scales-differ", GATE, multiply(f"{UP}.weight_scale_2", 1.5)),
    ("gate-up-input-scales-differ", GATE, multiply(f"{UP}.input_scale", 1.5)),
    ("missing-expert", "layer 0", remove(f"{ROUTED}.")),
    ("missing-expert", "layer 1", remove(f"{SHARED}.")),
    ("no-experts", "", lambda t: [t.pop(name) for name in list(t) if "expert" in name]),
    ("unknown-tensor", f"{SHARED}.w4.weight", add(f"{SHARED}.w4.weight", torch.ones(2))),
    ("unknown-tensor", f"{ROUTED}.bias", add(f"{ROUTED}.bias", torch.ones(2))),
    ("swizzled-scales", f"{DOWN}.weight_scale", replace(f"{DOWN}.weight_scale", swizzle_scales)),
    ("swizzled-scales", f"{DOWN}.weight_scale", replace(f"{DOWN}.weight_scale", lambda s: swizzle_scales(s).flatten())),
    ("wrong-shape", f"{DOWN}.weight_scale", replace(f"{DOWN}.weight_scale", lambda s: s[:, :-1])),
    ("wrong-dtype", f"{DOWN}.weight_scale", replace(f"{DOWN}.weight_scale", Tensor.float)),
    ("missing-tensor", f"{DOWN}.weight_scale_2", remove(f"{DOWN}.weight_scale_2")),
    ("missing-tensor", f"{SHARED}: down", remove(f"{DOWN}.")),
    ("extra-tensor", f"{DOWN}.bias", add(f"{DOWN}.bias", torch.ones(160))),
    ("unknown-format", f"{DOWN}.weight", replace(f"{DOWN}.weight", Tensor.short)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "where", "damage"), BROKEN, ids=[f"{i}-{b[0]}" for i, b in enumerate(BROKEN)])
def test_each_anomaly_alone(tmp_path: Path, name: str, where: str, damage: Break) -> None:
    tensors = modelopt()
    damage(tensors)
    report = inspected(tmp_path, tensors)
    assert [anomaly.name for anomaly in report.anomalies] == [name]
    assert report.anomalies[0].where == (where or str(tmp_path / "ckpt"))
    assert report.anomalies[0].message and report.anomalies[0].way_out


def test_every_rule_is_broken_above() -> None:
    broken = {name for name, _, _ in BROKEN} | {"missing-config"}
    assert {rule.name for rule in RULES} <= broken


def test_every_rule_says_why_and_how_bad() -> None:
    assert len({rule.name for rule in RULES}) == len(RULES)
    for rule in RULES:
        assert len(rule.reason) > 30, rule.name
        assert rule.severity in SEVERITIES


@pytest.mark.parametrize(
    "maker",
    [
        factory.modelopt(input_scale=0.01),
        factory.compressed_tensors(input_scale=100.0),
        factory.plain(),
        factory.fp8((32, 32)),
        factory.mxfp4(),
    ],
)
def test_a_clean_checkpoint_has_none(tmp_path: Path, maker: factory.Maker) -> None:
    assert inspected(tmp_path, factory.model(maker)[0]).anomalies == []


def test_no_config_is_an_anomaly_and_not_a_crash(tmp_path: Path) -> None:
    report = inspected(tmp_path, modelopt(), {})
    assert [anomaly.name for anomaly in report.anomalies] == ["missing-config"]


def test_a_reciprocal_scale_is_seen_in_compressed_tensors_too(tmp_path: Path) -> None:
    tensors = factory.model(factory.compressed_tensors(input_scale=100.0))[0]
    replace(f"{DOWN}.weight_global_scale", torch.reciprocal)(tensors)
    assert [anomaly.name for anomaly in inspected(tmp_path, tensors).anomalies] == ["reciprocal-global-scale"]


@pytest.mark.parametrize("maker", [factory.mxfp4(), factory.fp8((32, 32))])
def test_nan_scales_of_other_formats(tmp_path: Path, maker: factory.Maker) -> None:
    tensors = factory.model(maker)[0]
    tensors[f"{DOWN}.scale"].view(torch.uint8)[0, 0] = 0xFF
    assert [anomaly.name for anomaly in inspected(tmp_path, tensors).anomalies] == ["nan-scale"]


def test_one_broken_module_hides_no_other(tmp_path: Path) -> None:
    tensors = modelopt()
    remove(f"{GATE}.weight_scale_2")(tensors)
    scale_byte(f"{DOWN}.weight_scale", 0x7F)(tensors)
    scale_byte(f"{ROUTED}.w1.weight_scale", 0x81)(tensors)
    report = inspected(tmp_path, tensors)
    assert {anomaly.name for anomaly in report.anomalies} == {"missing-tensor", "nan-scale", "negative-scale"}
    assert len(report.modules) == 17  # of 2 layers x 3 experts x 3 projections


def test_a_file_that_cannot_be_opened_is_reported(tmp_path: Path) -> None:
    path = factory.write(tmp_path / "ckpt", modelopt(), CONFIG)
    shard = path / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    report = inspect_checkpoint(str(path))
    assert [anomaly.name for anomaly in report.anomalies] == ["truncated-file"]
    assert report.modules == [] and report.dialect is None


def test_what_is_no_checkpoint_raises(tmp_path: Path) -> None:
    with pytest.raises(NotACheckpointError):
        inspect_checkpoint(str(tmp_path))


def test_facts_and_groups(tmp_path: Path) -> None:
    tensors = modelopt()
    report = inspected(tmp_path, tensors)
    assert (report.dialect, report.swiglu_limit, report.shards) == ("modelopt", 10.0, 1)
    assert report.tensors == len(tensors)
    assert report.nbytes == sum(t.nbytes for t in tensors.values())
    assert report.expert_bytes == sum(module.nbytes for module in report.modules)
    names = [(g.layer, g.kind, g.experts, g.format) for g in report.groups]
    assert names == [(n, kind, count, "nvfp4") for n in (0, 1) for kind, count in (("shared", 1), ("routed", 2))]

    down = next(module for module in report.modules if module.prefix == DOWN)
    scales = tensors[f"{DOWN}.weight_scale"].float()
    assert down.shape == (160, 96)
    assert (down.scale_min, down.scale_max) == (scales.min().item(), scales.max().item())
    assert down.nbytes == 160 * 96 // 2 + 160 * 6 + 4 + 4
    assert down.bits_per_weight == pytest.approx(4.5 + 64 / (160 * 96))
    assert down.global_scale == pytest.approx(1e-4)
    assert down.input_scale == pytest.approx(0.01)


def test_scalars_are_in_decode_direction_in_both_dialects(tmp_path: Path) -> None:
    report = inspected(tmp_path, factory.model(factory.compressed_tensors(2e4, 50.0))[0])
    assert [module.global_scale for module in report.modules] == pytest.approx([5e-5] * 18)
    assert [module.input_scale for module in report.modules] == pytest.approx([0.02] * 18)


def test_layers_restrict_what_is_looked_at(tmp_path: Path) -> None:
    path = factory.write(tmp_path / "ckpt", modelopt(), CONFIG)
    assert {module.layer for module in inspect_checkpoint(str(path), layers=[1]).modules} == {1}


def test_the_trained_checkpoint_is_clean(tiny_checkpoint: Path) -> None:
    report = inspect_checkpoint(str(tiny_checkpoint))
    assert report.anomalies == []
    assert [(g.layer, g.kind, g.experts) for g in report.groups] == [
        (layer, kind, count) for layer in range(4) for kind, count in (("shared", 1), ("routed", 8))
    ]
    assert {g.bits_per_weight for g in report.groups} == {16.0}


def test_a_layer_that_is_not_there_is_told(tmp_path: Path) -> None:
    path = factory.write(tmp_path / "c", modelopt(), CONFIG)
    with pytest.raises(InputError, match=r"got \[7\]"):
        inspect_checkpoint(str(path), layers=[0, 7])


def test_huge_expert_numbers_cost_no_memory(tmp_path: Path) -> None:
    tensors = {name.replace("experts.1.", "experts.999999999."): t for name, t in modelopt().items()}
    report = inspect_checkpoint(str(factory.write(tmp_path / "c", tensors, {**CONFIG, "n_routed_experts": 10**15})))
    found = [anomaly.message for anomaly in report.anomalies if anomaly.name == "missing-expert"]
    assert found and all(f"{10**15 - 2} of {10**15} routed experts are missing, first 1" in text for text in found)
