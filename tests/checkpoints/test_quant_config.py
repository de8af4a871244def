# SPDX-License-Identifier: Apache-2.0
"""The configs of an output, as the packages that read them understand them."""

from __future__ import annotations

import importlib.util
import json
import re
from fnmatch import fnmatchcase
from pathlib import Path
from types import ModuleType

import pytest
import torch

from nvfp4_experts._version import __version__
from nvfp4_experts.checkpoints import convert, open_checkpoint
from nvfp4_experts.checkpoints.quant_config import patterns
from tests.checkpoints import factory

oracle = pytest.importorskip("compressed_tensors.quantization", reason="the configs' reader is not installed")
schemes = pytest.importorskip("compressed_tensors.quantization.quant_scheme")
utils = pytest.importorskip("compressed_tensors.utils")

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def modelopt_converter() -> ModuleType:
    """ModelOpt's own file that makes config.json's section of hf_quant_config.json (the package is slow to import)."""
    root = importlib.util.find_spec("modelopt").submodule_search_locations[0]
    spec = importlib.util.spec_from_file_location("convert_hf_config", Path(root) / "torch/export/convert_hf_config.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def converted(
    tmp_path: Path, shared: str = "bf16", routed: str | None = None, config: dict | None = None, **options: object
):
    """(quantization_config, hf_quant_config or None, converted modules, other modules) of a conversion."""
    base = {"hidden_size": 160, "num_hidden_layers": 2, "model_type": "deepseek_v4", "expert_dtype": "fp4"}
    naming = options.pop("naming", "official")
    maker = factory.MAKERS[shared]
    tensors, _ = factory.model(maker, factory.MAKERS[routed or shared], naming=naming, layers=options.pop("layers", 2))
    convert(factory.write(tmp_path / "src", tensors, base | (config or {})), tmp_path / "dst", **options)
    result = json.loads((tmp_path / "dst" / "config.json").read_text())
    assert {k: v for k, v in result.items() if k != "quantization_config"} == base | {
        k: v for k, v in (config or {}).items() if k != "quantization_config"
    }
    extra = tmp_path / "dst" / "hf_quant_config.json"
    out = open_checkpoint(tmp_path / "dst").tensors
    nvfp4 = {n.rpartition(".")[0] for n in out if n.endswith(("weight_scale_2", "weight_packed"))}
    matrices = {n.rpartition(".")[0] for n, i in out.items() if n.endswith(".weight") and len(i.shape) == 2}
    return (
        result["quantization_config"],
        json.loads(extra.read_text()) if extra.exists() else None,
        nvfp4,
        matrices - nvfp4,
    )


@pytest.mark.parametrize("naming", factory.WORDS)
@pytest.mark.parametrize(
    ("options", "algo"),
    [
        ({}, "W4A16_NVFP4"),
        ({"experts": "all"}, "W4A16_NVFP4"),
        ({"input_scales": {0: (0.1, 0.2), 1: (0.1, 0.2)}}, "NVFP4"),
        ({"input_scales": {0: (0.1, 0.2)}}, "MIXED_PRECISION"),
        ({"experts": "all", "input_scales": {0: (0.1, 0.2), 1: (0.1, 0.2)}}, "MIXED_PRECISION"),
    ],
)
def test_modelopts_own_converter_agrees(tmp_path: Path, options: dict, algo: str, naming: str) -> None:
    section, hf_quant_config, nvfp4, others = converted(tmp_path, naming=naming, **options)
    assert section["quant_algo"] == algo == hf_quant_config["quantization"]["quant_algo"]
    assert {"group_size", "kv_cache_quant_algo", "exclude_modules"} <= hf_quant_config["quantization"].keys()
    theirs = modelopt_converter().convert_hf_quant_config_format(hf_quant_config)
    assert theirs == {key: value for key, value in section.items() if key != "group_size"}
    assert section["producer"] == {"name": "nvfp4-experts", "version": __version__, "recipe": "modelopt"}
    assert all(any(fnmatchcase(module, glob) for glob in section["ignore"]) for module in others)
    assert not any(fnmatchcase(module, glob) for glob in section["ignore"] for module in nvfp4)
    if algo == "MIXED_PRECISION":
        listed = section["quantized_layers"]
        for module in nvfp4:
            (entry,) = [v for k, v in listed.items() if module == k or module.startswith(f"{k}.")]
            has_input = "input_scale" in {
                n.rpartition(".")[2] for n in open_checkpoint(tmp_path / "dst").tensors if n.startswith(f"{module}.")
            }
            assert entry == {"quant_algo": "NVFP4" if has_input else "W4A16_NVFP4", "group_size": 16}


def tree(names: set[str]) -> torch.nn.Module:
    """Modules with these names, each a Linear."""
    root = torch.nn.Module()
    for name in sorted(names):
        parent = root
        *path, last = name.split(".")
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, torch.nn.Module())
            parent = getattr(parent, part)
        parent.add_module(last, torch.nn.Linear(1, 1))
    return root


@pytest.mark.parametrize("naming", factory.WORDS)
@pytest.mark.parametrize("experts", ["shared", "routed", "all"])
@pytest.mark.parametrize("calibrated", [(), (0,), (0, 1)])
def test_compressed_tensors_matches_exactly_the_converted_modules(
    tmp_path: Path, naming: str, experts: str, calibrated: tuple[int, ...]
) -> None:
    if experts == "routed" and calibrated:
        calibrated = ()
    section, hf_quant_config, nvfp4, others = converted(
        tmp_path, naming=naming, dialect="compressed-tensors", experts=experts,
        input_scales=dict.fromkeys(calibrated, (0.1, 0.2)),
    )  # fmt: skip
    assert hf_quant_config is None
    config = oracle.QuantizationConfig.model_validate(section)
    assert config.format == "nvfp4-pack-quantized"
    model = tree(nvfp4 | others)
    seen: dict[str, str] = {}
    for scheme in config.config_groups.values():
        reference = schemes.NVFP4 if scheme.input_activations else schemes.NVFP4A16
        ignored = {"observer", "observer_kwargs"}
        assert scheme.weights.model_dump(exclude=ignored) == reference["weights"].model_dump(exclude=ignored)
        if scheme.input_activations:
            assert scheme.input_activations.model_dump(exclude=ignored) == reference["input_activations"].model_dump(
                exclude=ignored
            )
        for name, _ in utils.match_named_modules(model, scheme.targets, config.ignore):
            assert name not in seen
            seen[name] = "W4A4" if scheme.input_activations else "W4A16"
    assert seen.keys() == nvfp4
    shared = {f"{factory.expert_name(naming, layer, None)}." for layer in calibrated}
    assert {n for n, kind in seen.items() if kind == "W4A4"} == {
        n for n in nvfp4 if n.startswith(tuple(shared) or ("-",))
    }
    assert all(any(re.match(p[3:], m) if p.startswith("re:") else p == m for p in config.ignore) for m in others)


def test_beside_fp8_the_config_stays_fp8_and_says_what_is_not(tmp_path: Path) -> None:
    """As NVIDIA's exports of DeepSeek V4: routed experts in NVFP4, shared ones in FP8."""
    section, hf_quant_config, nvfp4, _ = converted(
        tmp_path, "fp8-128-e8m0", "mxfp4", {"quantization_config": FP8}, experts="routed"
    )
    assert FP8.items() <= section.items()
    assert section["quant_algo"] == "MIXED_PRECISION" == hf_quant_config["quantization"]["quant_algo"]
    assert (section["moe_quant_algo"], section["group_size"]) == ("NVFP4", 16)
    entry = {"quant_algo": "W4A16_NVFP4", "group_size": 16}
    assert section["quantized_layers"] == {"layers.0.ffn.experts": entry, "layers.1.ffn.experts": entry}
    assert "layers.*.ffn.shared_experts.w1" in section["ignore"]
    assert "mtp.*.ffn.shared_experts.w1" in section["ignore"]
    assert not any(fnmatchcase(module, glob) for glob in section["ignore"] for module in nvfp4)
    checkpoint = open_checkpoint(tmp_path / "dst")
    assert checkpoint.problems == [] and checkpoint.dialect == "mixed"


def test_shared_experts_beside_fp8_name_no_moe_algorithm(tmp_path: Path) -> None:
    section, _, _, _ = converted(tmp_path, "fp8-128-e8m0", "mxfp4", {"quantization_config": FP8})
    assert "moe_quant_algo" not in section
    assert section["quant_method"] == "fp8" and len(section["quantized_layers"]) == 6
    assert open_checkpoint(tmp_path / "dst").problems == []


def test_compressed_tensors_beside_fp8_keeps_its_groups(tmp_path: Path) -> None:
    section, _, nvfp4, _ = converted(
        tmp_path, "fp8-128-e8m0", "mxfp4", {"quantization_config": FP8}, dialect="compressed-tensors", experts="routed"
    )
    assert FP8.items() <= section.items()
    (group,) = section["config_groups"].values()
    assert all(any(re.match(t[3:], module) for t in group["targets"]) for module in nvfp4)


def test_what_the_source_says_of_the_kv_cache_is_kept(tmp_path: Path) -> None:
    scheme = {"dynamic": False, "num_bits": 8, "type": "float"}
    section, hf_quant_config, _, _ = converted(
        tmp_path,
        config={
            "quantization_config": {"quant_method": "modelopt", "kv_cache_quant_algo": "FP8", "kv_cache_scheme": scheme}
        },
    )
    assert section["kv_cache_scheme"] == scheme
    assert hf_quant_config["quantization"]["kv_cache_quant_algo"] == "FP8"


def test_mtp_layers_under_the_layers_own_names_are_listed_one_by_one(tmp_path: Path) -> None:
    """Layer 2 of two is an MTP layer: not converted, and no pattern may say that all layers are."""
    section, _, nvfp4, others = converted(tmp_path, naming="transformers", layers=3)
    assert "model.layers.2.mlp.shared_experts.gate_proj" in section["ignore"]
    assert "model.layers.2.mlp.shared_experts.gate_proj" in others
    assert not any(fnmatchcase(module, glob) for glob in section["ignore"] for module in nvfp4)


def test_patterns() -> None:
    assert patterns(["a.0.b", "a.1.b", "c"], ["a.0.d"]) == ["a.*.b", "c"]
    assert patterns(["a.0.b"], ["a.1.b"]) == ["a.0.b"]
    assert patterns(["a.0.b"], ["a.0.x.b"]) == ["a.0.b"]  # `*` would match across the dots
    assert patterns([], ["a"]) == []
