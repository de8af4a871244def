# SPDX-License-Identifier: Apache-2.0
"""Reading: every format of every dialect decodes to the values it was made from; names, layers, dialects, hub ids."""

from __future__ import annotations

import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file

from nvfp4_experts.checkpoints import load_projection, open_checkpoint, projection_input_scale
from nvfp4_experts.checkpoints.dialects import fp8_block, parse_name
from nvfp4_experts.checkpoints.errors import HubError, MissingExpertError, NotACheckpointError
from tests.checkpoints import factory


@pytest.mark.parametrize("naming", factory.WORDS)
@pytest.mark.parametrize("kind", factory.MAKERS)
def test_every_format_decodes_to_its_values(tmp_path: Path, kind: str, naming: str) -> None:
    tensors, values = factory.model(factory.MAKERS[kind], naming=naming)
    checkpoint = open_checkpoint(factory.write(tmp_path / "c", tensors, shards=3))
    assert checkpoint.problems == []
    assert [(e.layer, e.kind, e.index) for e in checkpoint.experts] == [
        (layer, kind, index) for layer in (0, 1) for kind, index in (("shared", None), ("routed", 0), ("routed", 1))
    ]
    for entry in checkpoint.experts:
        assert list(entry.projections) == ["gate", "up", "down"]
        for name, projection in entry.projections.items():
            assert projection.format == factory.FORMATS.get(kind, "fp8_block")
            loaded = load_projection(checkpoint, projection)
            decoded = loaded.float() if isinstance(loaded, torch.Tensor) else loaded.dequantize()
            assert torch.equal(decoded, values[entry.prefix][name])
            assert projection.shape == tuple(decoded.shape)
            assert projection_input_scale(checkpoint, projection) is None
            rows = load_projection(checkpoint, projection, 64, 90) if projection.block is None else None
            if rows is not None:
                part = rows.float() if isinstance(rows, torch.Tensor) else rows.dequantize()
                assert torch.equal(part, decoded[64:90])


@pytest.mark.parametrize(
    ("shared", "routed", "dialect"),
    [
        ("bf16", "bf16", "plain"),
        ("fp8-128-e8m0", "mxfp4", "deepseek"),
        ("fp8-128-e8m0", "modelopt", "mixed"),
        ("modelopt", "bf16", "modelopt"),
        ("compressed-tensors", "compressed-tensors", "compressed-tensors"),
        ("modelopt", "compressed-tensors", "mixed"),
    ],
)
def test_dialect_of_a_checkpoint(tmp_path: Path, shared: str, routed: str, dialect: str) -> None:
    tensors, _ = factory.model(factory.MAKERS[shared], factory.MAKERS[routed])
    assert open_checkpoint(factory.write(tmp_path / "c", tensors)).dialect == dialect


def test_input_scales_are_read_in_decode_direction(tmp_path: Path) -> None:
    for maker in (factory.modelopt(input_scale=0.25), factory.compressed_tensors(input_scale=4.0)):
        tensors, _ = factory.model(maker)
        checkpoint = open_checkpoint(factory.write(tmp_path / str(id(maker)), tensors))
        found = {projection_input_scale(checkpoint, p) for e in checkpoint.experts for p in e.projections.values()}
        assert found == {0.25}


def test_every_tensor_of_the_trained_checkpoint_reads_as_the_library_reads_it() -> None:
    checkpoint = open_checkpoint(factory.TINY)
    reference = load_file(factory.TINY / "model.safetensors")
    assert checkpoint.tensors.keys() == reference.keys()
    assert all(torch.equal(checkpoint.read(name), t) for name, t in reference.items())
    assert (checkpoint.layers, checkpoint.swiglu_limit, checkpoint.dialect) == ([0, 1, 2, 3], 10.0, "plain")
    assert len(checkpoint.experts) == 4 * 9


def test_names() -> None:
    def parts(name: str) -> tuple[object, ...] | None:
        found = parse_name(name)
        return found and (found.prefix, found.layer, found.index, found.projection, found.suffix)

    assert parts("layers.12.ffn.shared_experts.w3.scale") == ("layers.12.ffn.shared_experts", 12, None, "up", "scale")
    assert parts("model.layers.0.ffn.experts.255.w2.weight") == (
        "model.layers.0.ffn.experts.255",
        0,
        255,
        "down",
        "weight",
    )
    prefix = "model.layers.3.mlp.shared_expert"
    assert parts(f"{prefix}.gate_proj.weight_scale_2") == (prefix, 3, None, "gate", "weight_scale_2")
    prefix = "model.language_model.layers.3.mlp.experts.1"
    assert parts(f"{prefix}.up_proj.weight") == (prefix, 3, 1, "up", "weight")
    for other in (
        "mtp.0.ffn.shared_experts.w1.weight",
        "layers.0.ffn.gate.weight",
        "layers.0.ffn.shared_experts.w4.weight",
        "layers.01.ffn.shared_experts.w1.weight",
        "xlayers.0.ffn.shared_experts.w1.weight",
        "layers.0.ffn.shared_experts.w1",
        "model.layers.0.mlp.experts.gate_up_proj",
        "model.layers.0.mlp.shared_expert_gate.weight",
        "model.layers.0.mlp.gate_proj.weight",
    ):
        assert parts(other) is None, other


def test_layers_beyond_the_configs_are_mtp_and_no_experts(tmp_path: Path) -> None:
    tensors, _ = factory.model(factory.plain(), naming="transformers", layers=3)
    checkpoint = open_checkpoint(factory.write(tmp_path / "c", tensors))  # its config says 2 layers
    assert checkpoint.layers == [0, 1]
    with pytest.raises(MissingExpertError, match=r"layers with a shared expert are \[0, 1\]"):
        checkpoint.shared_expert(2)


@pytest.mark.parametrize("shape", [(1, 1), (32, 33), (33, 32), (128, 129), (130, 70), (300, 260)])
@pytest.mark.parametrize("block", [(128, 128), (32, 32)])
def test_fp8_blocks_are_told_by_shape(shape: tuple[int, int], block: tuple[int, int]) -> None:
    def grid(b: tuple[int, int]) -> tuple[int, int]:
        return (-(-shape[0] // b[0]), -(-shape[1] // b[1]))

    found = fp8_block("w", shape, grid(block), None)
    ranges = [
        [(r // b[0], c // b[1]) for r in range(shape[0]) for c in range(shape[1])]  # which scale each value gets
        for b in (found, block)
    ]
    assert ranges[0] == ranges[1]


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        ({}, None),
        ({"swiglu_limit": 0}, None),
        ({"swiglu_limit": None}, None),
        ({"swiglu_limit": 7}, 7.0),
        ({"text_config": {"swiglu_limit": 3.5}}, 3.5),
    ],
)
def test_swiglu_limit(tmp_path: Path, config: dict, limit: float | None) -> None:
    assert open_checkpoint(factory.write(tmp_path / "c", factory.rest(), config)).swiglu_limit == limit


def test_a_single_file_opens(tmp_path: Path) -> None:
    tensors, _ = factory.model(factory.plain())
    path = factory.write(tmp_path / "c", tensors) / "model.safetensors"
    checkpoint = open_checkpoint(path)
    assert (checkpoint.path, checkpoint.layers, checkpoint.swiglu_limit) == (path, [0, 1], 10.0)
    assert torch.equal(checkpoint.read("embed.weight"), tensors["embed.weight"])


def test_local_paths_never_touch_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("asked the hub"))
    (tmp_path / "org").mkdir()
    factory.write(tmp_path / "org" / "name", factory.rest())
    monkeypatch.chdir(tmp_path)
    assert open_checkpoint("org/name").tensors
    for missing in ("./org/other", "/org/other", "other", "a/b/c", "../org/other"):
        with pytest.raises(NotACheckpointError, match="must exist, or be a hub id"):
            open_checkpoint(missing)


def test_a_hub_id_is_downloaded_and_its_cache_links_are_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "models--org--name"
    snapshot, blobs = repository / "snapshots" / "abc", repository / "blobs"
    factory.write(snapshot, factory.rest())
    blobs.mkdir()
    for file in list(snapshot.iterdir()):
        shutil.move(file, blobs / file.name)
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **k: asked.append(name) or str(snapshot))
    assert "scalar" in open_checkpoint("org/name").tensors
    assert asked == ["org/name"]


def test_a_failed_download_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise OSError("no network here")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(HubError, match=r"^org/name: there is no such path here, so .* no network here"):
        open_checkpoint("org/name")
