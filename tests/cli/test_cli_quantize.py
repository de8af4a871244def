# SPDX-License-Identifier: Apache-2.0
"""`quantize`: what it reports is what it wrote, in both dialects; a dry run writes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nvfp4_experts.formats.nvfp4 import quantize
from tests.cli.commands import error_of, invoke, output_of

W2 = "model.layers.1.ffn.shared_experts.w2"


@pytest.mark.parametrize("recipe", ["modelopt", "kernel"])
def test_the_recipes_bytes_are_written(tiny_checkpoint: Path, tmp_path: Path, recipe: str) -> None:
    report = output_of("quantize", tiny_checkpoint, tmp_path / "out", "--recipe", recipe)
    made = load_file(tmp_path / "out" / "model.safetensors")
    expected = quantize(load_file(tiny_checkpoint / "model.safetensors")[f"{W2}.weight"], recipe)
    assert torch.equal(made[f"{W2}.weight"], expected.codes)
    assert torch.equal(made[f"{W2}.weight_scale"].view(torch.uint8), expected.block_scales.view(torch.uint8))
    assert torch.equal(made[f"{W2}.weight_scale_2"], expected.global_scale)
    assert report["converted"] == {"bf16": 12} and report["copied"] == 198
    assert report["source_bytes"] - report["output_bytes"] == 12 * (2 * 65536 - 65536 // 2 - 65536 // 16 - 4)
    assert [(t["format"], t["modules"]) for t in report["before"]] == [("bf16", 108)]
    assert [(t["format"], t["modules"]) for t in report["after"]] == [("nvfp4", 12), ("bf16", 96)]
    assert report["after"][0]["bits_per_weight"] == pytest.approx(4.5 + 32 / 65536)
    assert report["seconds"] > 0 and report["peak_memory_bytes"] > 2**20


def test_gate_and_up_share_a_scale_unless_told_otherwise(tiny_checkpoint: Path, tmp_path: Path) -> None:
    shared = output_of("quantize", tiny_checkpoint, tmp_path / "shared")
    separate = output_of("quantize", tiny_checkpoint, tmp_path / "separate", "--separate-scales")
    assert shared["separate"] == [] and len(separate["separate"]) == 4


def test_all_experts_in_compressed_tensors(compressed: Path) -> None:
    made = load_file(compressed / "model.safetensors")
    assert sum(name.endswith("weight_packed") for name in made) == 108
    assert made[f"{W2}.weight_global_scale"].item() > 1  # 2688 / amax


def test_input_scales_are_stored(modelopt: Path) -> None:
    made = load_file(modelopt / "model.safetensors")
    assert made[f"{W2}.input_scale"].item() == pytest.approx(50 / 2688)
    assert made["model.layers.1.ffn.shared_experts.w1.input_scale"].item() == pytest.approx(6.5 / 2688)


def test_a_dry_run_tells_the_truth_and_writes_nothing(tiny_checkpoint: Path, tmp_path: Path) -> None:
    arguments = ("quantize", tiny_checkpoint, tmp_path / "out", "--experts", "all")
    planned = output_of(*arguments, "--dry-run")
    assert list(tmp_path.iterdir()) == []
    done = output_of(*arguments)
    for name in ("path", "dialect", "converted", "copied", "source_bytes", "output_bytes", "before"):
        assert planned[name] == done[name], name
    assert planned["dry_run"] is True


def test_tables(tiny_checkpoint: Path, tmp_path: Path) -> None:
    planned = invoke("quantize", tiny_checkpoint, tmp_path / "out", "--dry-run").stdout
    assert "would convert" in planned and "16.8 MB → 15.7 MB" in planned
    done = invoke("quantize", tiny_checkpoint, tmp_path / "out", "--separate-scales").stdout
    assert "12 weight matrices from bf16" in done and "gate and up differ in 4 experts" in done
    assert "16.8 MB → 15.7 MB" in done and "peak memory" in done


def test_nothing_is_overwritten(tiny_checkpoint: Path, modelopt: Path) -> None:
    before = (modelopt / "model.safetensors").stat()
    assert error_of("quantize", tiny_checkpoint, modelopt)["error"] == "OutputExistsError"
    assert (modelopt / "model.safetensors").stat() == before


def test_input_scales_of_another_model_are_refused(tmp_path: Path, tiny_checkpoint: Path) -> None:
    from nvfp4_experts.checkpoints import save_input_scales

    save_input_scales(tmp_path / "scales.safetensors", {9: (0.1, 0.1)})
    error = error_of("quantize", tiny_checkpoint, tmp_path / "out", "--input-scales", tmp_path / "scales.safetensors")
    assert error["error"] == "InputScalesError"
    assert not (tmp_path / "out").exists()
