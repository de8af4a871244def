# SPDX-License-Identifier: Apache-2.0
"""`from_pretrained`, `generate` and `save_pretrained` on the embedded model in every dialect."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file, save_file
from torch import Tensor

import nvfp4_experts
from examples.heldout import load_windows, nats_per_byte
from nvfp4_experts import Nvfp4RoutedExperts, Nvfp4SharedExpert
from nvfp4_experts.checkpoints import convert, load_projection, open_checkpoint
from nvfp4_experts.checkpoints.errors import ConfigMismatchError, MissingExpertError, MissingTensorError
from nvfp4_experts.errors import InputError, UnsupportedError
from nvfp4_experts.integrations.transformers import (
    Nvfp4ExpertsConfig,
    Nvfp4ExpertsHfQuantizer,
    calibrate_model,
    experts_of,
    set_activations,
)
from nvfp4_experts.integrations.transformers.quantizer import OLDEST
from nvfp4_experts.integrations.transformers.rule import weights_of
from nvfp4_experts.integrations.transformers.source import open_files
from tests.integrations.checkpoints import write_hybrid
from tests.integrations.conftest import DIALECTS

# Four-bit experts and FP8 attention move the loss by some 0.003; exchanged gate and up by 0.1, or more if routed.
NATS_BOUND = 0.02
PROMPT = b"class Node(object):\n    def __init__(self, "
ROUTED, SHARED = {Nvfp4RoutedExperts}, {Nvfp4SharedExpert}
KINDS = {
    "quantize": SHARED,
    "modelopt": ROUTED | SHARED,
    "compressed-tensors": ROUTED | SHARED,
    "hybrid": ROUTED,
}
Load = Callable[..., Any]


def prompt(*texts: bytes) -> dict[str, Tensor]:
    """Left-padded token ids and their mask."""
    longest = max(map(len, texts)) + 1
    rows = [[258] * (longest - 1 - len(text)) + [256, *text] for text in texts]
    mask = [[0] * (longest - 1 - len(text)) + [1] * (1 + len(text)) for text in texts]
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(mask)}


def bytes_of(path: Path) -> dict[str, tuple[str, tuple[int, ...], str]]:
    """Every tensor of a checkpoint: dtype, shape, digest of its bytes (of which pytest would print the difference)."""
    checkpoint = open_checkpoint(path)
    found = {}
    for name, info in checkpoint.tensors.items():
        bytes_ = checkpoint.read(name).reshape(-1).view(torch.uint8).numpy()
        found[name] = info.dtype, info.shape, hashlib.sha256(bytes_).hexdigest()
    return found


@pytest.fixture(scope="module")
def windows(tiny_checkpoint: Path) -> tuple[Tensor, Tensor]:
    return load_windows(tiny_checkpoint / "heldout.txt", 4)


@pytest.fixture(scope="module")
def original_nats(load: Load, tiny_checkpoint: Path, windows: tuple[Tensor, Tensor]) -> float:
    return nats_per_byte(load(tiny_checkpoint), *windows)


def declared(path: Path) -> dict[str, Any]:
    """`quantization_config` of a directory, its patterns in no order."""
    found = json.loads((path / "config.json").read_text())["quantization_config"]
    return found | {"ignore": sorted(found["ignore"])}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_load_evaluate_generate_save(
    dialect: str,
    load: Load,
    checkpoints: dict[str, Path],
    windows: tuple[Tensor, Tensor],
    original_nats: float,
    tmp_path: Path,
) -> None:
    model, report = load(dialect, output_loading_info=True)
    assert not any(report.values()), report
    assert {type(experts) for experts in experts_of(model).values()} == KINDS[dialect]
    assert len(experts_of(model)) == 4 * len(KINDS[dialect])
    assert all(not p.is_meta for p in [*model.parameters(), *model.buffers()])
    assert nats_per_byte(model, *windows) == pytest.approx(original_nats, abs=NATS_BOUND)
    text = model.generate(**prompt(PROMPT), max_new_tokens=12, do_sample=False)
    assert bytes(text[0, 1 + len(PROMPT) :].tolist()).startswith(b"other):\n")

    model.save_pretrained(tmp_path / "again")
    assert bytes_of(tmp_path / "again") == bytes_of(checkpoints[dialect])
    assert declared(tmp_path / "again") == declared(checkpoints[dialect])
    override = {"config": {"quant_method": "nvfp4_experts"}} if dialect == "hybrid" else {}
    again = load(tmp_path / "again", **override)
    with torch.no_grad():
        assert torch.equal(again(**prompt(PROMPT)).logits, model(**prompt(PROMPT)).logits)


def test_generate_a_padded_batch_like_transformers_own_experts(load: Load, tiny_checkpoint: Path) -> None:
    """Through the cache, rows of different lengths, step by step; theirs run on our weights, dequantised."""
    model = load("modelopt", config=Nvfp4ExpertsConfig(activations="bf16"), dtype=torch.float32)
    theirs = load(tiny_checkpoint, dtype=torch.float32)
    with torch.no_grad():
        for name, experts in experts_of(model).items():
            for into, weight in zip(weights_of(name, theirs.get_submodule(name)), experts._projections(), strict=True):
                into.copy_(weight.dequantize())
    asked = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    for batch in (prompt(PROMPT), prompt(PROMPT, b"import os\n", b"def f(x):\n    return ")):
        got, want = (torch.stack(m.generate(**batch, **asked).logits) for m in (model, theirs))
        assert torch.equal(got.argmax(-1), want.argmax(-1))
        # x and h are rounded to bf16, 2^-9 of themselves at most, three times a layer: logits of up to 20 move by
        # some 20 * 2^-9 * sqrt(12) = 0.14 at most. Exchanged experts or gate and up move them by units.
        assert (got - want).abs().max() < 0.14
        assert (got - want).abs().max() > 0


def test_static_scales_are_used_where_the_checkpoint_has_them(load: Load) -> None:
    modes = {name: e.activation_scale for name, e in experts_of(load("modelopt")).items()}
    assert modes == {name: "static" if "shared" in name else "dynamic" for name in modes}
    assert {e.activation_scale for e in experts_of(load("hybrid")).values()} == {"static"}


def test_fp8_weights_decode_to_what_they_mean(load: Load, checkpoints: dict[str, Path]) -> None:
    model, checkpoint = load("hybrid"), open_checkpoint(checkpoints["hybrid"])
    for name, key in (("attn.wq_a", "self_attn.q_a_proj"), ("ffn.shared_experts.w2", "mlp.shared_experts.down_proj")):
        values, scales = (checkpoint.read(f"layers.2.{name}.{suffix}") for suffix in ("weight", "scale"))
        wide = torch.exp2(scales.view(torch.uint8).float() - 127).repeat_interleave(128, 0).repeat_interleave(128, 1)
        want = values.float() * wide[: values.shape[0], : values.shape[1]]
        assert torch.equal(model.get_parameter(f"model.layers.2.{key}.weight").float(), want)


def test_quantising_while_loading_is_converting(load: Load, tiny_checkpoint: Path, tmp_path: Path) -> None:
    options = Nvfp4ExpertsConfig(experts="all", activations="fp8")
    model, report = load(tiny_checkpoint, quantization_config=options, output_loading_info=True)
    assert not any(report.values())
    assert {experts.activations for experts in experts_of(model).values()} == {"fp8"}
    model.save_pretrained(tmp_path / "loaded")
    convert(tiny_checkpoint, tmp_path / "converted", experts="all")
    assert bytes_of(tmp_path / "loaded") == bytes_of(tmp_path / "converted")
    assert declared(tmp_path / "loaded") == declared(tmp_path / "converted")


def test_shared_experts_in_fp8_become_nvfp4_when_asked(load: Load, tmp_path: Path) -> None:
    model = load("hybrid", config=Nvfp4ExpertsConfig(experts="all"))
    assert {type(experts) for experts in experts_of(model).values()} == ROUTED | SHARED
    model.save_pretrained(tmp_path / "all")
    checkpoint = open_checkpoint(tmp_path / "all")
    assert {p.format for p in checkpoint.shared_expert(1).projections.values()} == {"nvfp4"}
    assert not checkpoint.problems and "layers.1.ffn.shared_experts.w1.scale" not in checkpoint.tensors
    assert checkpoint.quantization["quant_method"] == "fp8"  # as the rest is; our own producer makes it load directly
    assert len(experts_of(load(tmp_path / "all"))) == 8


def test_deepseeks_own_checkpoint_is_cast_exactly(load: Load, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Routed experts in MXFP4 become NVFP4 of the same values; saved, they load without a word."""
    source = open_checkpoint(write_hybrid(tiny_checkpoint, tmp_path / "official", routed="mxfp4"))
    model, report = load(source.directory, config=Nvfp4ExpertsConfig(), output_loading_info=True)
    assert not any(report.values())
    for layer, experts in enumerate(experts_of(model).values()):
        for number, entry in enumerate(source.routed_experts(layer)):
            for name, projection in entry.projections.items():
                want = load_projection(source, projection).dequantize()
                assert torch.equal(getattr(experts, name)[number].dequantize(), want)
    model.save_pretrained(tmp_path / "cast")
    assert bytes_of(tmp_path / "cast").keys() > {"layers.1.attn.wq_a.scale", "layers.1.ffn.experts.7.w2.weight_scale_2"}
    assert len(experts_of(load(tmp_path / "cast"))) == 4


@pytest.mark.parametrize("producer", [{"name": "llm-compressor"}, None])
def test_other_peoples_compressed_tensors_and_no_config_at_all(
    producer: dict[str, str] | None, load: Load, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    found = json.loads((checkpoints["compressed-tensors"] / "config.json").read_text())["quantization_config"]
    declares = None if producer is None else found | {"producer": producer}
    path = edited(checkpoints["compressed-tensors"], tmp_path / "theirs", lambda _: None, quantization_config=declares)
    how = {"config": Nvfp4ExpertsConfig()} if producer else {"quantization_config": Nvfp4ExpertsConfig()}
    model = load(path, **how)
    assert len(experts_of(model)) == 8
    model.save_pretrained(tmp_path / "again")
    assert bytes_of(tmp_path / "again") == bytes_of(path)
    assert (
        declared(tmp_path / "again").get("producer", {}).get("name") == (producer or {"name": "nvfp4-experts"})["name"]
    )


def test_options_reach_every_expert(load: Load) -> None:
    options = {"activations": "nvfp4", "activation_scale": "per_token", "max_tokens": 99, "weighting": "after_down"}
    for chosen in (Nvfp4ExpertsConfig(**options), {"quant_method": "nvfp4_experts", **options}):
        experts = experts_of(load("modelopt", config=chosen)).values()
        assert {(e.activations, e.activation_scale, e.max_tokens) for e in experts} == {("nvfp4", "per_token", 99)}
        assert {e.weighting for e in experts if isinstance(e, Nvfp4RoutedExperts)} == {"after_down"}


def test_an_argument_changes_what_the_checkpoint_says_not(load: Load, checkpoints: dict[str, Path]) -> None:
    with pytest.warns(
        UserWarning, match="loading attributes"
    ):  # transformers' own words on an argument beside a config
        model = load("modelopt", quantization_config=Nvfp4ExpertsConfig(activations="fp8"))
    assert {e.activations for e in experts_of(model).values()} == {"fp8"}


def test_activations_change_without_loading_again(load: Load) -> None:
    model = load("quantize")
    weights = {name: e._weights()[0].data_ptr() for name, e in experts_of(model).items()}
    set_activations(model, "nvfp4", "per_token")
    assert {(e.activations, e.activation_scale) for e in experts_of(model).values()} == {("nvfp4", "per_token")}
    assert {name: e._weights()[0].data_ptr() for name, e in experts_of(model).items()} == weights


@pytest.mark.parametrize("dialect", ["modelopt", "compressed-tensors"])
def test_calibration_goes_to_disk_and_back(
    dialect: str, load: Load, tiny_checkpoint: Path, windows: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    """Calibrated after loading, saved, loaded again: static scales, in the direction of the dialect."""
    convert(tiny_checkpoint, tmp_path / "source", experts="all", dialect=dialect)
    model = load(tmp_path / "source")
    assert {e.activation_scale for e in experts_of(model).values()} == {"dynamic"}
    calibrate_model(model, [load_windows(tiny_checkpoint / "calibration.txt", 4)[0]])
    model.save_pretrained(tmp_path / "calibrated")
    again = load(tmp_path / "calibrated", config=Nvfp4ExpertsConfig(activations="nvfp4"))
    for name, experts in experts_of(model).items():
        other = experts_of(again)[name]
        assert other.activation_scale == "static"
        for scale in ("input_scale", "hidden_scale"):
            got, want = (torch.as_tensor(getattr(e, scale)) for e in (other, experts))
            torch.testing.assert_close(got, want, rtol=2**-23, atol=0)  # a reciprocal may come back one step off
    before, after = bytes_of(tmp_path / "source"), bytes_of(tmp_path / "calibrated")
    assert before.items() <= after.items() and len(after) == len(before) + 4 * 9 * 3
    assert ("NVFP4" if dialect == "modelopt" else "local") in json.dumps(declared(tmp_path / "calibrated"))
    assert nats_per_byte(again, *windows) == pytest.approx(nats_per_byte(model, *windows), abs=NATS_BOUND)


@pytest.mark.parametrize("dialect", ["modelopt", "compressed-tensors"])
def test_an_expert_that_calibration_did_not_reach_has_no_scale_on_disk(
    dialect: str, load: Load, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """The others' scales are there, load, and are where a later calibration begins."""
    convert(tiny_checkpoint, tmp_path / "source", experts="all", dialect=dialect)
    model = load(tmp_path / "source")
    calibrate_model(model, [torch.tensor([[256]])])
    routed = {name: e for name, e in experts_of(model).items() if isinstance(e, Nvfp4RoutedExperts)}
    assert {len(e.uncalibrated) for e in routed.values()} == {6}
    model.save_pretrained(tmp_path / "partly")
    checkpoint = open_checkpoint(tmp_path / "partly")
    for layer, experts in enumerate(routed.values()):
        has = {e.index for e in checkpoint.routed_experts(layer) if "input_scale" in e.projections["down"].names}
        assert has == set(range(8)) - set(experts.uncalibrated)

    def halve(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(f".w1.{suffix}")]:
            tensors[name] *= 0.5 if dialect == "modelopt" else 2

    suffix = {"modelopt": "input_scale", "compressed-tensors": "input_global_scale"}[dialect]
    partly = edited(tmp_path / "partly", tmp_path / "uneven", halve)  # up's scales are the layer's
    again = load(partly, config=Nvfp4ExpertsConfig(activations="nvfp4"))
    known = {name: e for name, e in experts_of(again).items() if name in routed}
    before = {name: both_scales(e) for name, e in known.items()}
    for name, experts in routed.items():
        assert known[name].uncalibrated == experts.uncalibrated and known[name].activation_scale == "dynamic"
        for got, want in zip(before[name], both_scales(experts), strict=True):
            torch.testing.assert_close(got, want, rtol=2**-23, atol=0, equal_nan=True)  # of a reciprocal, one step
    again.save_pretrained(tmp_path / "copy")
    assert bytes_of(tmp_path / "copy") == bytes_of(partly) and declared(tmp_path / "copy") == declared(partly)

    calibrate_model(again, [torch.tensor([[256, *b"import"]])])
    again.save_pretrained(tmp_path / "more")
    changed, kept = set(), 0
    for layer, (name, experts) in enumerate(known.items()):
        for was, now, words in zip(before[name], both_scales(experts), (("w1", "w3"), ("w2",)), strict=True):
            assert (now >= was).sum() == (~was.isnan()).sum() < (~now.isnan()).sum()
            numbers = ((now != was) & ~now.isnan()).nonzero().flatten().tolist()
            changed |= {f"model.layers.{layer}.ffn.experts.{n}.{word}.{suffix}" for n in numbers for word in words}
            kept += int((now == was).sum())
    old, new = bytes_of(partly), bytes_of(tmp_path / "more")
    assert {n for n in new if new[n] != old.get(n) and ".experts." in n} == changed and kept > 0
    filled = next(experts for experts in known.values() if experts.uncalibrated)
    assert filled.fill_uncalibrated() and not filled.uncalibrated


def both_scales(experts: Nvfp4RoutedExperts) -> tuple[Tensor, Tensor]:
    return experts.input_scale, experts.hidden_scale


def test_the_experts_implementation_is_no_matter(load: Load) -> None:
    model = load("modelopt")
    with torch.no_grad():
        before = model(**prompt(PROMPT)).logits
        model.set_experts_implementation("nvfp4_experts")
        assert torch.equal(model(**prompt(PROMPT)).logits, before)


@pytest.mark.gpu
@pytest.mark.skipif(Version(transformers.__version__) < Version(OLDEST), reason=f"needs transformers {OLDEST}")
@pytest.mark.parametrize("dialect", ["modelopt", "hybrid"])
def test_on_a_gpu(
    dialect: str, load: Load, checkpoints: dict[str, Path], windows: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    """Moved there, and (where accelerate is) loaded there: text, loss and bytes are the same."""
    nats = nats_per_byte(load(dialect), *windows)
    ways = [lambda: load(dialect).to("cuda")]
    if find_spec("accelerate"):
        ways.append(lambda: load(dialect, device_map="cuda"))
    for number, way in enumerate(ways):
        model = way()
        assert {e._weights()[0].device.type for e in experts_of(model).values()} == {"cuda"}
        there = tuple(t.to("cuda") for t in windows)
        assert nats_per_byte(model, *there) == pytest.approx(nats, abs=NATS_BOUND)
        batch = {name: t.to("cuda") for name, t in prompt(PROMPT).items()}
        text = model.generate(**batch, max_new_tokens=12, do_sample=False)
        assert bytes(text[0, 1 + len(PROMPT) :].tolist()).startswith(b"other):")
        model.save_pretrained(tmp_path / str(number))
        assert bytes_of(tmp_path / str(number)) == bytes_of(checkpoints[dialect])


# --- whose checkpoint it is ------------------------------------------------------------------------------------------


def test_other_peoples_configs_stay_theirs() -> None:
    read = transformers.quantizers.AutoQuantizationConfig.from_dict
    assert type(read({"quant_method": "fp8"})).__name__ == "FineGrainedFP8Config"
    assert isinstance(read({"quant_method": "fp8"}), transformers.FineGrainedFP8Config)
    pytest.importorskip("compressed_tensors")
    theirs = read({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "config_groups": {}})
    assert isinstance(theirs, transformers.CompressedTensorsConfig)
    ours = {"producer": {"name": "nvfp4-experts"}}
    for method in ("fp8", "compressed-tensors", "modelopt"):
        assert isinstance(read({"quant_method": method, **ours}), Nvfp4ExpertsConfig)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "nvfp4"}, "options are experts, activations"),
        ({"experts": "none"}, "experts: must be one of"),
        ({"activations": "int8"}, "activations: must be one of"),
        ({"activation_scale": "fixed"}, "activation_scale: must be one of"),
        ({"weighting": "never"}, "weighting: must be one of"),
        ({"backend": "tpu"}, "backend: must be one of"),
        ({"recipe": "salt"}, "recipe: must be one of"),
        ({"max_tokens": 0}, "max_tokens: must be an integer"),
    ],
)
def test_options_are_checked_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Nvfp4ExpertsConfig(**options)


def test_nothing_in_four_bits_is_told(load: Load, tiny_checkpoint: Path) -> None:
    with pytest.raises(MissingExpertError, match='experts="all"'):
        load(tiny_checkpoint, quantization_config=Nvfp4ExpertsConfig())


def edited(source: Path, place: Path, change: Callable[[dict[str, Tensor]], object], **settings: Any) -> Path:
    """A copy of a single-file checkpoint with other tensors or settings."""
    shutil.copytree(source, place)
    tensors = load_file(place / "model.safetensors")
    change(tensors)
    save_file(tensors, place / "model.safetensors", {"format": "pt"})
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | settings))
    return place


def test_what_neither_side_takes_is_still_unexpected(load: Load, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.1.ffn.experts.extra"] = torch.zeros(1)
        tensors["model.layers.9.ffn.experts.0.w1.weight_scale_2"] = torch.zeros(())
        del tensors["model.layers.1.attn.wq_a.weight"]

    _, report = load(edited(checkpoints["modelopt"], tmp_path / "edited", change), output_loading_info=True)
    assert report["unexpected_keys"] == {
        "model.layers.1.mlp.experts.extra",
        "model.layers.9.mlp.experts.0.w1.weight_scale_2",
    }
    assert report["missing_keys"] == {"model.layers.1.self_attn.q_a_proj.weight"}


def test_experts_that_are_not_there_are_told(load: Load, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    def without(pattern: str) -> Callable[[dict[str, Tensor]], object]:
        return lambda tensors: [tensors.pop(name) for name in list(tensors) if re.search(pattern, name)]

    source = checkpoints["modelopt"]
    with pytest.raises(MissingTensorError, match="weight_scale"):
        load(edited(source, tmp_path / "scale", without(r"layers\.2\..*experts\.3\.w2\.weight_scale$")))
    with pytest.raises(ConfigMismatchError, match=r"experts 0 to 7.*7 experts"):
        load(edited(source, tmp_path / "expert", without(r"layers\.2\..*experts\.3\.")))
    with pytest.raises(MissingExpertError, match=r"layers\.2\.mlp\.shared_experts"):
        path = edited(source, tmp_path / "layer", without(r"layers\.2\.ffn\.shared_experts\."))
        load(path, config=Nvfp4ExpertsConfig(experts="all"))


def test_experts_of_another_models_size_are_told(load: Load, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    path = edited(checkpoints["modelopt"], tmp_path / "wide", lambda _: None, moe_intermediate_size=512)
    with pytest.raises(ConfigMismatchError, match=r"\(I, H\) = \(512, 256\)"):
        load(path)


def test_four_bits_outside_experts_are_refused(load: Load, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        for suffix in ("weight", "weight_scale", "weight_scale_2"):
            tensors[f"model.layers.1.attn.wq_a.{suffix}"] = tensors[f"model.layers.1.ffn.experts.0.w1.{suffix}"].clone()

    with pytest.raises(UnsupportedError, match=r"attn\.wq_a.*outside NVFP4 experts must be FP8 blocks"):
        load(edited(checkpoints["modelopt"], tmp_path / "attention", change))


def test_an_older_transformers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    quantizer = Nvfp4ExpertsHfQuantizer(Nvfp4ExpertsConfig())
    quantizer.validate_environment()
    monkeypatch.setattr(transformers, "__version__", "5.9.1")
    with pytest.raises(UnsupportedError, match=r"5\.23 or newer.*5\.9\.1.*pip install"):
        quantizer.validate_environment()


def test_the_oldest_transformers_is_the_one_that_installing_asks_for() -> None:
    pyproject = Path(__file__).parents[2] / "pyproject.toml"
    assert f'transformers = ["transformers>={OLDEST}"]' in pyproject.read_text()


def test_disk_offload_is_refused() -> None:
    quantizer = Nvfp4ExpertsHfQuantizer(Nvfp4ExpertsConfig())
    with pytest.raises(UnsupportedError, match="device_map"):
        quantizer.validate_environment(device_map={"": "disk"})


def test_a_distributed_model_is_refused(load: Load) -> None:
    model = SimpleNamespace(config=SimpleNamespace(distributed_config=object()))
    with pytest.raises(UnsupportedError, match="a distributed model"):
        Nvfp4ExpertsHfQuantizer(Nvfp4ExpertsConfig())._process_model_before_weight_loading(model, checkpoint_files=None)


@pytest.mark.parametrize("files", [None, [], ["pytorch_model.bin"]])
def test_other_files_are_refused(files: list[str] | None) -> None:
    with pytest.raises(UnsupportedError, match="loads safetensors checkpoints"):
        open_files(files)


def test_changed_weights(load: Load, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """In bf16 they are saved as they are; in FP8 there is no scale for them."""
    model = load("hybrid")
    with torch.no_grad():
        model.lm_head.weight[0, 0] = 2.5
    model.save_pretrained(tmp_path / "head")
    assert open_checkpoint(tmp_path / "head").read("head.weight")[0, 0] == 2.5
    with torch.no_grad():
        model.model.layers[0].self_attn.q_a_proj.weight[0, 0] = 2.5
    with pytest.raises(InputError, match=r"layers.0.self_attn.q_a_proj.weight: must be as it was loaded"):
        model.save_pretrained(tmp_path / "attention")


# --- as documented ---------------------------------------------------------------------------------------------------


def test_the_documented_lines_run_in_a_new_process(
    checkpoints: dict[str, Path], tiny_checkpoint: Path, root: Path, tmp_path: Path
) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (root / "docs" / "transformers.md").read_text(), re.S)
    for name, path in (("tiny-nvfp4", checkpoints["compressed-tensors"]), ("hybrid", checkpoints["hybrid"])):
        (tmp_path / name).symlink_to(path)
    (tmp_path / "tiny").symlink_to(tiny_checkpoint)
    command = [sys.executable, "-c", "\n".join(blocks)]
    environment = {**os.environ, "PYTHONPATH": str(Path(nvfp4_experts.__file__).parents[1])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "class Node(object):\n    def __init__(self, other):" in done.stdout
    assert bytes_of(tmp_path / "copy") == bytes_of(checkpoints["compressed-tensors"])
    readme = re.search(r"```python\n(import nvfp4_experts.integrations.*?)```", (root / "README.md").read_text(), re.S)
    assert readme and readme[1] == blocks[0]
