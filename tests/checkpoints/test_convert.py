# SPDX-License-Identifier: Apache-2.0
"""Conversion: every source format into both dialects, against whole-tensor quantisation and the safetensors library."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from nvfp4_experts.checkpoints import convert, errors, load_projection, open_checkpoint, projection_input_scale, weights
from nvfp4_experts.errors import InputError
from nvfp4_experts.formats.nvfp4 import RECIPES, quantize
from tests.checkpoints import factory

DIALECTS = ("modelopt", "compressed-tensors")
SCALED = [
    kind for kind in factory.MAKERS if factory.FORMATS.get(kind, "fp8_block") in ("bf16", "fp16", "fp32", "fp8_block")
]
OUT = {
    "modelopt": ("weight", "weight_scale", "weight_scale_2", "input_scale"),
    "compressed-tensors": ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale"),
}


@pytest.fixture(autouse=True)
def small_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bands of 30 rows at most (32 or 128 for FP8), so that every weight here takes several."""
    monkeypatch.setattr(weights, "BAND_VALUES", 160 * 30)


def all_tensors(path: Path) -> dict[str, Tensor]:
    return {name: t for file in sorted(path.glob("*.safetensors")) for name, t in load_file(file).items()}


def fingerprint(path: Path) -> dict[str, str]:
    """Content of every file below a directory."""
    files = (file for file in sorted(path.rglob("*")) if file.is_file())
    return {str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def same(a: Tensor, b: Tensor) -> bool:
    flat = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*flat)


def modules(values: dict[str, dict[str, Tensor]], naming: str, kind: str) -> Iterator[tuple[str, str, str]]:
    """(prefix of the expert, projection, name of the module) of the experts of a kind."""
    for prefix, projections in values.items():
        if kind == "all" or ("shared" in prefix) == (kind == "shared"):
            yield from ((prefix, name, f"{prefix}.{factory.WORDS[naming][name]}") for name in projections)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("kind", SCALED)
def test_scaled_weights_become_what_quantize_makes_of_the_whole(tmp_path: Path, kind: str, dialect: str) -> None:
    tensors, values = factory.model(factory.MAKERS[kind])
    source = factory.write(tmp_path / "src", tensors, shards=4)
    before = fingerprint(source)
    report = convert(source, tmp_path / "dst", dialect=dialect)
    assert fingerprint(source) == before
    assert report.converted == {factory.FORMATS.get(kind, "fp8_block"): 6}
    out = all_tensors(tmp_path / "dst")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(kind, torch.float32)
    replaced = set()
    for prefix, name, module in modules(values, "official", "shared"):
        partner = {"gate": "up", "up": "gate"}.get(name, name)
        amax = torch.maximum(values[prefix][name].abs().max(), values[prefix][partner].abs().max())
        expected = quantize(values[prefix][name].to(dtype), "modelopt", amax)
        codes, block_scales, global_scale, input_scale = (f"{module}.{suffix}" for suffix in OUT[dialect])
        assert same(out[codes], expected.codes)
        assert same(out[block_scales], expected.block_scales)
        stored = out[global_scale] if dialect == "modelopt" else out[global_scale].reciprocal().reshape(())
        assert torch.allclose(stored, expected.global_scale, rtol=2e-7, atol=0)
        assert out[global_scale].shape == (() if dialect == "modelopt" else (1,))
        assert input_scale not in out
        replaced |= {codes, block_scales, global_scale} | {n for n in tensors if n.startswith(f"{module}.")}
    assert out.keys() - replaced == tensors.keys() - replaced
    assert all(same(out[name], tensors[name]) for name in out.keys() - replaced)
    result = open_checkpoint(tmp_path / "dst")
    assert result.problems == [] and {e.kind for e in result.experts} == {"shared", "routed"}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_recipe(tmp_path: Path, recipe: str, dialect: str) -> None:
    tensors, values = factory.model(factory.plain())
    convert(factory.write(tmp_path / "src", tensors), tmp_path / "dst", dialect=dialect, recipe=recipe)
    checkpoint = open_checkpoint(tmp_path / "dst")
    down = load_projection(checkpoint, checkpoint.shared_expert(1).projections["down"])
    expected = quantize(values["layers.1.ffn.shared_experts"]["down"].bfloat16(), recipe)
    assert same(down.codes, expected.codes) and same(down.block_scales, expected.block_scales)
    if dialect == "modelopt" or recipe in ("compressed-tensors", "kernel"):  # made as a reciprocal: exact both ways
        assert same(down.global_scale, expected.global_scale)


def test_separate_scales_are_those_of_each_weight(tmp_path: Path) -> None:
    tensors, values = factory.model(factory.plain())
    source = factory.write(tmp_path / "src", tensors)
    joint = convert(source, tmp_path / "joint")
    separate = convert(source, tmp_path / "separate", separate_scales=True)
    assert joint.separate == []
    assert separate.separate == ["layers.0.ffn.shared_experts", "layers.1.ffn.shared_experts"]
    out = all_tensors(tmp_path / "separate")
    for prefix, name, module in modules(values, "official", "shared"):
        assert same(out[f"{module}.weight"], quantize(values[prefix][name].bfloat16()).codes)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_mxfp4_is_cast_exactly_under_one_scale(tmp_path: Path, dialect: str, dtype: torch.dtype) -> None:
    tensors, values = factory.model(factory.plain(), factory.mxfp4(dtype=dtype), naming="transformers")
    convert(factory.write(tmp_path / "src", tensors, shards=3), tmp_path / "dst", dialect=dialect, experts="routed")
    checkpoint = open_checkpoint(tmp_path / "dst")
    out = all_tensors(tmp_path / "dst")
    for prefix, name, module in modules(values, "transformers", "routed"):
        entry = next(e for e in checkpoint.experts if e.prefix == prefix)
        assert torch.equal(load_projection(checkpoint, entry.projections[name]).dequantize(), values[prefix][name])
        assert same(out[f"{module}.{OUT[dialect][0]}"], tensors[f"{module}.weight"].view(torch.uint8))
        assert f"{module}.scale" not in out
        gate, up = (load_projection(checkpoint, entry.projections[n]) for n in ("gate", "up"))
        assert same(gate.global_scale, up.global_scale)


def test_mxfp4_pairs_too_far_apart_for_one_scale_keep_two_and_stay_exact(tmp_path: Path) -> None:
    far = {"gate": factory.mxfp4(-4, -4), "up": factory.mxfp4(-30, -26), "down": factory.mxfp4()}
    tensors, values = factory.model(far)
    report = convert(factory.write(tmp_path / "src", tensors), tmp_path / "dst")
    assert report.separate == ["layers.0.ffn.shared_experts", "layers.1.ffn.shared_experts"]
    checkpoint = open_checkpoint(tmp_path / "dst")
    for entry in (checkpoint.shared_expert(0), checkpoint.shared_expert(1)):
        for name, projection in entry.projections.items():
            assert torch.equal(load_projection(checkpoint, projection).dequantize(), values[entry.prefix][name])


@pytest.mark.parametrize("zeros", ["gate", "a band of up", "gate and up"])
def test_zero_blocks_do_not_move_an_mxfp4_exponent(tmp_path: Path, zeros: str) -> None:
    tensors, values = factory.model(factory.mxfp4(-40, -30), layers=1)
    for name in ("gate", "up"):
        if name in zeros:
            rows = slice(0, 30) if "band" in zeros else slice(None)
            prefix = "layers.0.ffn.shared_experts"
            tensors[f"{prefix}.{factory.WORDS['official'][name]}.weight"][rows] = -128  # nibbles 0 and -0
            values[prefix][name][rows] = 0.0
    convert(factory.write(tmp_path / "src", tensors), tmp_path / "dst")
    checkpoint = open_checkpoint(tmp_path / "dst")
    entry = checkpoint.shared_expert(0)
    loaded = {name: load_projection(checkpoint, p) for name, p in entry.projections.items()}
    assert all(torch.equal(t.dequantize(), values[entry.prefix][name]) for name, t in loaded.items())
    assert loaded["gate"].global_scale == loaded["up"].global_scale
    assert loaded["up"].global_scale == (2.0**-126 if zeros == "gate and up" else 2.0**-38)


def test_an_mxfp4_weight_that_no_cast_holds_is_refused(tmp_path: Path) -> None:
    tensors, _ = factory.model(factory.mxfp4(-30, 2))
    with pytest.raises(errors.InexactCastError, match="span at most 17"):
        convert(factory.write(tmp_path / "src", tensors), tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize("naming", factory.WORDS)
@pytest.mark.parametrize(("source", "target"), [DIALECTS, DIALECTS[::-1]])
def test_nvfp4_of_the_other_dialect_keeps_its_bytes(tmp_path: Path, source: str, target: str, naming: str) -> None:
    make = {"modelopt": factory.modelopt, "compressed-tensors": factory.compressed_tensors}[source]
    one, two = (1e-4, 3e-4) if source == "modelopt" else (1e4, 3e3)
    maker = {"gate": make(one, 0.02), "up": make(two, 0.02), "down": make(one, 3.0)}
    tensors, _ = factory.model(maker, naming=naming)
    report = convert(
        factory.write(tmp_path / "src", tensors, shards=2), tmp_path / "dst", dialect=target, experts="all"
    )
    assert len(report.separate) == 6 and report.converted == {"nvfp4": 18}
    out = all_tensors(tmp_path / "dst")
    before, after = open_checkpoint(tmp_path / "src"), open_checkpoint(tmp_path / "dst")
    for old, new in zip(before.experts, after.experts, strict=True):
        for name in old.projections:
            a, b = (load_projection(c, e.projections[name]) for c, e in ((before, old), (after, new)))
            assert same(a.codes, b.codes) and same(a.block_scales, b.block_scales)
            assert torch.allclose(a.global_scale, b.global_scale, rtol=2e-7, atol=0)
            x, y = (projection_input_scale(c, e.projections[name]) for c, e in ((before, old), (after, new)))
            assert y == pytest.approx(x, rel=2e-7)
    assert not any(name.endswith(tuple(set(OUT[source]) - set(OUT[target]) - {"weight"})) for name in out)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_input_scales_are_written_where_they_belong(tmp_path: Path, dialect: str) -> None:
    tensors, _ = factory.model(factory.plain())
    source = factory.write(tmp_path / "src", tensors)
    convert(source, tmp_path / "dst", dialect=dialect, experts="all", input_scales={1: (0.25, 4.0)})
    out = all_tensors(tmp_path / "dst")
    suffix = OUT[dialect][3]
    x, h = (0.25, 4.0) if dialect == "modelopt" else ([4.0], [0.25])
    prefix = "layers.1.ffn.shared_experts"
    assert {n: t.tolist() for n, t in out.items() if n.endswith(suffix)} == {
        f"{prefix}.w1.{suffix}": x, f"{prefix}.w3.{suffix}": x, f"{prefix}.w2.{suffix}": h,
    }  # fmt: skip


@pytest.mark.parametrize("dialect", DIALECTS)
def test_input_scales_of_routed_experts_are_written_where_they_belong(tmp_path: Path, dialect: str) -> None:
    source = factory.write(tmp_path / "src", factory.model(factory.plain())[0])
    given = {(0, 1): (0.25, 4.0), 1: (0.5, 2.0)}
    convert(source, tmp_path / "dst", dialect=dialect, experts="all", input_scales=given)
    checkpoint = open_checkpoint(tmp_path / "dst")
    found = {}
    for entry in checkpoint.experts:
        of = {projection_input_scale(checkpoint, entry.projections[name]) for name in ("gate", "up")}
        (x,) = of
        key = entry.layer if entry.index is None else (entry.layer, entry.index)
        found[key] = x, projection_input_scale(checkpoint, entry.projections["down"])
    assert {key: pair for key, pair in found.items() if pair != (None, None)} == given


@pytest.mark.parametrize("dialect", DIALECTS)
def test_input_scales_can_be_given_to_a_checkpoint_that_is_nvfp4_already(tmp_path: Path, dialect: str) -> None:
    maker = factory.modelopt(1.7e-4, 0.5) if dialect == "modelopt" else factory.compressed_tensors(7777.7, 2.0)
    tensors, _ = factory.model(maker)
    source = factory.write(tmp_path / "src", tensors)
    convert(source, tmp_path / "dst", dialect=dialect, input_scales={0: (0.25, 4.0)})
    out = all_tensors(tmp_path / "dst")
    assert out.keys() == tensors.keys()
    suffix = OUT[dialect][3]
    changed = {n for n in out if not same(out[n], tensors[n])}
    assert changed == {f"layers.0.ffn.shared_experts.{w}.{suffix}" for w in ("w1", "w2", "w3")}


@pytest.mark.parametrize("experts", ["shared", "routed", "all"])
def test_only_the_experts_asked_for_are_converted(tmp_path: Path, experts: str) -> None:
    tensors, values = factory.model(factory.fp8(), factory.mxfp4())
    convert(factory.write(tmp_path / "src", tensors), tmp_path / "dst", experts=experts)
    out = all_tensors(tmp_path / "dst")
    converted = {name.rpartition(".")[0] for name in out if name.endswith("weight_scale_2")}
    assert converted == {module for _, _, module in modules(values, "official", experts)}


def test_the_trained_checkpoint_survives_in_both_dialects(tmp_path: Path) -> None:
    original = open_checkpoint(factory.TINY)
    for dialect in DIALECTS:
        convert(factory.TINY, tmp_path / dialect, dialect=dialect, experts="all")
        made = open_checkpoint(tmp_path / dialect)
        for a, b in zip(original.experts, made.experts, strict=True):
            for name in a.projections:
                w = load_projection(original, a.projections[name]).float()
                error = (load_projection(made, b.projections[name]).dequantize() - w).norm() / w.norm()
                assert 0.08 < error < 0.11  # 0.095 on normals


def test_compressed_tensors_itself_reads_its_dialect(tmp_path: Path) -> None:
    convert(factory.TINY, tmp_path / "dst", dialect="compressed-tensors", recipe="compressed-tensors")
    out = all_tensors(tmp_path / "dst")
    checkpoint = open_checkpoint(tmp_path / "dst")
    entry = checkpoint.shared_expert(2)
    for projection in entry.projections.values():
        state = {suffix: out[f"{projection.prefix}.{suffix}"] for suffix in OUT["compressed-tensors"][:3]}
        theirs = decompress(state)
        ours = load_projection(checkpoint, projection).dequantize()
        assert torch.allclose(theirs.float(), ours, rtol=2**-8, atol=0)


def decompress(state: dict[str, Tensor]) -> Tensor:
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.quant_scheme import NVFP4A16

    scheme = QuantizationScheme(targets=["Linear"], **NVFP4A16)
    oracle = pytest.importorskip("compressed_tensors.compressors.nvfp4.base")
    return oracle.NVFP4PackedCompressor.decompress(dict(state), scheme)["weight"]


def test_a_single_file_becomes_a_directory(tmp_path: Path) -> None:
    tensors, _ = factory.model(factory.plain())
    source = factory.write(tmp_path / "src", tensors) / "model.safetensors"
    source = source.rename(source.with_name("other.safetensors"))
    convert(source, tmp_path / "dst")
    assert sorted(p.name for p in (tmp_path / "dst").iterdir()) == [
        "config.json",
        "hf_quant_config.json",
        "model.safetensors",
    ]
    assert open_checkpoint(tmp_path / "dst").dialect == "modelopt"


def test_index_shards_and_metadata(tmp_path: Path) -> None:
    tensors, _ = factory.model(factory.fp8())
    source = factory.write(tmp_path / "src", tensors, shards=5, metadata={"format": "pt", "note": "kept"})
    report = convert(source, tmp_path / "dst")
    index = json.loads((tmp_path / "dst" / "model.safetensors.index.json").read_text())
    actual = {n: f.name for f in (tmp_path / "dst").glob("*.safetensors") for n in load_file(f)}
    assert index["weight_map"] == actual
    assert (
        index["metadata"]["total_size"]
        == report.output_bytes
        == sum(t.nbytes for t in all_tensors(tmp_path / "dst").values())
    )
    result = open_checkpoint(tmp_path / "dst")
    assert all(m == {"format": "pt", "note": "kept"} for m in result.metadata.values())
    before = open_checkpoint(source)
    assert all(
        result.tensors[n].shard == before.tensors[n].shard for n in result.tensors.keys() & before.tensors.keys()
    )


def test_a_shard_that_held_only_scales_disappears(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tensors, _ = factory.model(factory.fp8())
    source = factory.write(tmp_path / "src", tensors, shards=2)
    scales = {n: t for n, t in tensors.items() if n.endswith(".scale") and "shared" in n}
    index = json.loads((source / "model.safetensors.index.json").read_text())
    for shard in set(index["weight_map"].values()):
        save_file({n: t for n, t in load_file(source / shard).items() if n not in scales}, source / shard)
    save_file(scales, source / "scales.safetensors")
    index["weight_map"] |= dict.fromkeys(scales, "scales.safetensors")
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    convert(source, tmp_path / "dst")
    assert not (tmp_path / "dst" / "scales.safetensors").exists()
    assert open_checkpoint(tmp_path / "dst").problems == []


def test_other_files_are_copied_and_other_weights_are_named(tmp_path: Path) -> None:
    source = factory.write(tmp_path / "src", factory.model(factory.plain())[0])
    (source / "encoding").mkdir()
    (source / "encoding" / "encode.py").write_text("x = 1\n")
    (source / "pytorch_model.bin").write_bytes(b"old")
    (source / ".cache").mkdir()
    (source / ".cache" / "etag").write_text("1")
    (source / "LICENSE").symlink_to("tokenizer.json")
    report = convert(source, tmp_path / "dst")
    assert report.left_out == ["pytorch_model.bin"]
    found = {str(p.relative_to(tmp_path / "dst")) for p in (tmp_path / "dst").rglob("*") if p.is_file()}
    own = {"model.safetensors", "config.json", "hf_quant_config.json"}
    assert found == own | {"encoding/encode.py", "tokenizer.json", "LICENSE"}
    assert not (tmp_path / "dst" / "LICENSE").is_symlink()
    assert (tmp_path / "dst" / "LICENSE").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_a_link_out_of_the_source_is_not_copied(tmp_path: Path) -> None:
    source = factory.write(tmp_path / "src", factory.model(factory.plain())[0])
    (source / "notes.md").symlink_to("/etc/hosts")
    with pytest.raises(errors.UnsafePathError, match=r"notes\.md"):
        convert(source, tmp_path / "dst")


def test_progress_counts_every_byte_once(tmp_path: Path) -> None:
    source = factory.write(tmp_path / "src", factory.model(factory.plain())[0], shards=3)
    seen: list[tuple[int, int, str]] = []
    report = convert(source, tmp_path / "dst", progress=lambda *step: seen.append(step))
    assert all(a[0] <= b[0] for a, b in pairwise(seen))
    assert seen[-1][:2] == (report.output_bytes, report.output_bytes)
    assert [name for name, _ in {s[2]: 0 for s in seen}.items()] == open_checkpoint(source).shards


# --- refusals --------------------------------------------------------------------------------------------------------


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    source = factory.write(tmp_path / "src", factory.model(factory.plain())[0])
    for name, make in (("folder", Path.mkdir), ("file", Path.touch), ("link", lambda p: p.symlink_to("nowhere"))):
        make(tmp_path / name)
        with pytest.raises(errors.OutputExistsError, match="nothing is overwritten"):
            convert(source, tmp_path / name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder", "link", "src"]


def test_the_source_is_no_place_for_the_output(tmp_path: Path) -> None:
    source = factory.write(tmp_path / "src", factory.model(factory.plain())[0])
    before = fingerprint(source)
    (tmp_path / "alias").symlink_to(source)
    for inside in (source / "dst", tmp_path / "alias" / "dst", source / ".." / "src" / "deep" / "dst"):
        with pytest.raises(errors.OutputInsideSourceError):
            convert(source, inside)
    with pytest.raises(errors.OutputExistsError):
        convert(source, source)
    assert fingerprint(source) == before


@pytest.mark.parametrize(("kind", "options"), [("modelopt", {}), ("modelopt", {"experts": "all"})])
def test_there_must_be_something_to_convert(tmp_path: Path, kind: str, options: dict) -> None:
    source = factory.write(tmp_path / "src", factory.model(factory.MAKERS[kind])[0])
    with pytest.raises(errors.NothingToConvertError, match="none of"):
        convert(source, tmp_path / "dst", **options)
    with pytest.raises(errors.NothingToConvertError):
        convert(factory.write(tmp_path / "empty", factory.rest()), tmp_path / "dst", **options)


def test_an_output_of_two_dialects_is_refused(tmp_path: Path) -> None:
    source = factory.write(tmp_path / "src", factory.model(factory.modelopt())[0])
    with pytest.raises(errors.MixedOutputError, match="experts='all'"):
        convert(source, tmp_path / "dst", dialect="compressed-tensors")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, bad: float) -> None:
    tensors, _ = factory.model(factory.plain())
    tensors["layers.0.ffn.shared_experts.w3.weight"][70, 5] = bad
    with pytest.raises(errors.NonFiniteWeightError, match=r"shared_experts\.w3: .*rows 60\.\.90"):
        convert(factory.write(tmp_path / "src", tensors), tmp_path / "dst")


def test_a_nan_scale_byte_of_mxfp4_is_refused(tmp_path: Path) -> None:
    tensors, _ = factory.model(factory.mxfp4())
    tensors["layers.0.ffn.shared_experts.w3.scale"].view(torch.uint8)[70, 1] = 0xFF
    with pytest.raises(errors.NonFiniteWeightError, match="0xFF"):
        convert(factory.write(tmp_path / "src", tensors), tmp_path / "dst")


def test_a_reciprocal_scale_does_not_pass_through(tmp_path: Path) -> None:
    source = factory.write(tmp_path / "src", factory.model(factory.modelopt(1e4))[0])
    with pytest.raises(errors.SuspiciousScaleError):
        convert(source, tmp_path / "dst", dialect="compressed-tensors", experts="all")


@pytest.mark.parametrize(
    "scales",
    [
        {7: (1.0, 1.0)}, {0: (0.0, 1.0)}, {0: (1.0, float("nan"))}, {0: (1.0, -1.0)}, {0: (1.0,)}, {0: 1.0},
        {0: None}, {0: ("a", 1.0)}, {"0": (1.0, 1.0)}, {(0, 0): (1.0, 0.0)}, {(0, 0, 0): (1.0, 1.0)}, {(): (1.0, 1.0)},
        {(0, -1): (1.0, 1.0)},
    ],
    ids=str,
)  # fmt: skip
def test_input_scales_that_do_not_fit(tmp_path: Path, scales: dict) -> None:
    source = factory.write(tmp_path / "src", factory.model(factory.plain())[0])
    with pytest.raises(errors.InputScalesError):
        convert(source, tmp_path / "dst", input_scales=scales)


@pytest.mark.parametrize(
    ("experts", "scales", "message"),
    [
        ("routed", {0: (1.0, 1.0)}, "layer 0, which would stay"),
        ("shared", {(0, 1): (1.0, 1.0)}, "layer 0 routed expert 1, which would stay"),
        ("all", {(0, 99): (1.0, 1.0)}, "layer 0 routed expert 99"),
        ("routed", {0: (1.0, 1.0), (0, 1): (1.0, 1.0)}, "experts='all', shared='nvfp4'"),
        ("all", {9: (1.0, 1.0)}, r"layers \[0, 1\], and the routed ones, got layer 9"),
        ("all", {(0, n): (1.0, 1.0) for n in range(90, 99)}, "routed expert 93 and 5 more"),
    ],
)
def test_input_scales_of_experts_that_are_not_converted(
    tmp_path: Path, experts: str, scales: dict, message: str
) -> None:
    source = factory.write(tmp_path / "src", factory.model(factory.plain())[0])
    with pytest.raises(errors.InputScalesError, match=message):
        convert(source, tmp_path / "dst", experts=experts, input_scales=scales)
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


@pytest.mark.parametrize("option", [{"dialect": "gguf"}, {"experts": "none"}, {"recipe": "mine"}])
def test_unknown_options_name_the_known_ones(tmp_path: Path, option: dict) -> None:
    with pytest.raises(InputError, match=f"{next(iter(option))}: must be one of .*, got"):
        convert(tmp_path, tmp_path / "dst", **option)


def test_k_that_is_no_multiple_of_16_is_refused_before_writing(tmp_path: Path) -> None:
    tensors, _ = factory.model(factory.plain(), hidden=40, inner=24)
    source = factory.write(tmp_path / "src", tensors, {})
    with pytest.raises(errors.WrongShapeError, match="multiple of 16"):
        convert(source, tmp_path / "dst")
    assert [p.name for p in tmp_path.iterdir()] == ["src"]


def test_input_scales_may_be_tensors(tmp_path: Path) -> None:
    source = factory.write(tmp_path / "src", factory.model(factory.plain())[0])
    convert(source, tmp_path / "dst", input_scales={0: (torch.tensor(0.5), torch.tensor(0.25))})
    checkpoint = open_checkpoint(tmp_path / "dst")
    assert projection_input_scale(checkpoint, checkpoint.shared_expert(0).projections["down"]) == 0.25


def test_a_config_of_any_text_survives(tmp_path: Path) -> None:
    source = factory.write(tmp_path / "src", factory.model(factory.plain())[0], {"é": "\u4e2d", "\ud800": "\udfff"})
    convert(source, tmp_path / "dst")
    config = json.loads((tmp_path / "dst" / "config.json").read_text())
    assert config["é"] == "\u4e2d" and config["\ud800"] == "\udfff"


def test_a_link_to_nothing_is_refused_before_writing(tmp_path: Path) -> None:
    source = factory.write(tmp_path / "src", factory.model(factory.plain())[0])
    (source / "vocabulary.txt").symlink_to("nothing")
    with pytest.raises(errors.UnsafePathError, match=r"vocabulary\.txt"):
        convert(source, tmp_path / "dst")
    assert [path.name for path in tmp_path.iterdir()] == ["src"]
