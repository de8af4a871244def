# SPDX-License-Identifier: Apache-2.0
"""Whole blocks on the command line: `quantize --shared`, `inspect`, `run --moe`, `verify --moe`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nvfp4_experts import load_moe
from tests.checkpoints import factory
from tests.cli.commands import error_of, invoke, output_of


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of NVIDIA's, tiny."""
    tensors, _, config = factory.hybrid()
    return factory.write(tmp_path_factory.mktemp("moe") / "hybrid", tensors, config)


def test_quantize_keeps_or_converts_shared_experts(hybrid: Path, tmp_path: Path) -> None:
    assert output_of("quantize", hybrid, tmp_path / "a", "--experts", "all")["converted"] == {"fp8_block": 6}
    options = ("--dialect", "compressed-tensors", "--experts", "all", "--shared", "keep", "--dry-run")
    planned = output_of("quantize", tmp_path / "a", tmp_path / "b", *options)
    assert planned["converted"] == {"nvfp4": 24}
    assert (
        error_of("quantize", hybrid, tmp_path / "c", "--experts", "shared", "--shared", "keep")["error"] == "InputError"
    )


def test_inspect_states_formats_and_what_becomes_of_them(hybrid: Path) -> None:
    text = " ".join(invoke("inspect", hybrid).stdout.split())
    assert (
        "0…1 4 nvfp4 fp8_block 32x32, e8m0 scales quantised to nvfp4 kept, 1 bytes a weight, bf16 activations" in text
    )
    assert "mtp 0 4 mxfp4 fp8_block 32x32, e8m0 scales not loaded not loaded" in text
    assert [block["is_mtp"] for block in output_of("inspect", hybrid)["blocks"]] == [False, False, True]


@pytest.mark.parametrize("shared", ["nvfp4", "keep"])
@pytest.mark.parametrize("layer", [0, 1])
def test_run_gives_the_blocks_output(hybrid: Path, tmp_path: Path, layer: int, shared: str) -> None:
    x, ids, out = torch.randn(2, 5, 160).bfloat16(), torch.randint(11, (2, 5)), tmp_path / "y.safetensors"
    save_file({"x": x, "ids": ids}, tmp_path / "in.safetensors")
    given = ("--input", tmp_path / "in.safetensors", "--tensor", "x", "--output", out, "--activations", "nvfp4")
    by_id = ("--token-ids", "ids") if layer == 0 else ()
    report = output_of("run", hybrid, "--moe", "--layer", layer, "--shared", shared, *given, *by_id)
    block = load_moe(hybrid, layer, shared=shared, activations="nvfp4")
    assert torch.equal(load_file(out)["y"], block(x, ids))
    assert (report["activations"], report["activation_scale"], report["stored"]) == ("nvfp4", "static", ["nvfp4"])
    assert report["resident_bytes"] == block.resident_bytes == block.routed.resident_bytes + block.shared.resident_bytes
    assert report["block"] == {
        "experts": 4, "top_k": 2, "by_token_id": layer == 0, "weighting": "before_down", "routed": "4 nvfp4",
        "shared": "fp8_block 32x32, e8m0 scales", "shared_runs": {"keep": "kept"}.get(shared, shared),
        "shared_activation_scale": None if shared == "keep" else "dynamic",
        "experts_hit": len(block.router(x, ids)[0].unique()),
    }  # fmt: skip


def test_run_draws_token_ids_with_the_rows(hybrid: Path, tmp_path: Path) -> None:
    files = [tmp_path / f"{i}.safetensors" for i in range(3)]
    for seed, file in zip((1, 1, 2), files, strict=True):
        invoke("run", hybrid, "--moe", "--layer", 0, "--random", 6, "--seed", seed, "--output", file)
    y = [load_file(file)["y"] for file in files]
    assert torch.equal(y[0], y[1]) and not torch.equal(y[0], y[2])
    text = " ".join(invoke("run", hybrid, "--moe", "--layer", 0, "--random", 6, "--shared", "keep").stdout.split())
    assert "2 a token by token id, weighted before down" in text and "e8m0 scales, kept, bf16 activations" in text
    assert output_of("run", hybrid, "--layer", 0, "--random", 6)["block"] is None


def test_run_refuses_what_it_cannot_route(hybrid: Path, tmp_path: Path) -> None:
    file = tmp_path / "in.safetensors"
    tensors = {
        "x": torch.randn(3, 160),
        "few": torch.zeros(2).long(),
        "far": torch.full((3,), 11),
        "real": torch.ones(3),
    }
    save_file(tensors, file)
    arguments = ("run", hybrid, "--moe", "--layer", 0, "--input", file, "--tensor", "x")
    assert error_of(*arguments)["what"] == "--token-ids"
    assert "integers (3,)" in error_of(*arguments, "--token-ids", "few")["rule"]
    assert "integers (3,)" in error_of(*arguments, "--token-ids", "real")["rule"]
    assert "0..10" in error_of(*arguments, "--token-ids", "far")["rule"]
    assert "'none'" in error_of(*arguments, "--token-ids", "none")["rule"]
    for option in (("--shared", "keep"), ("--token-ids", "ids")):
        assert error_of("run", hybrid, "--layer", 1, "--random", 1, *option)["got"] == option[0]


def test_verify_compares_blocks(hybrid: Path, tmp_path: Path) -> None:
    invoke("quantize", hybrid, tmp_path / "nvfp4", "--experts", "all")
    arguments = ("verify", tmp_path / "nvfp4", "--against", hybrid, "--moe", "--tokens", 8)
    report = output_of(*arguments)
    assert report["passed"] and [block["same_routes"] for block in report["blocks"]] == [1, 1]
    text = invoke(*arguments, "--report", tmp_path / "r.json").stdout
    assert "passed" in text and "nvfp4 static" in text and (tmp_path / "r.json").exists()
    failed = invoke(*arguments, "--max-error", 1e-6, code=1).stdout
    assert "failed: 2 of 2 blocks" in failed and "layer 0: " in failed
    kept = output_of("verify", hybrid, "--against", hybrid, "--moe", "--shared", "keep", "--tokens", 8)
    assert all(block["exact"]["rel_l2"] == 0 for block in kept["blocks"])


@pytest.mark.parametrize(
    "options",
    [("--sample", 2), ("--recipe", "modelopt"), ("--picture", "p.png"), ("--experts", "routed")],
    ids=lambda option: option[0],
)
def test_verify_refuses_what_blocks_have_no_use_for(hybrid: Path, options: tuple[object, ...]) -> None:
    arguments = ("verify", hybrid, "--against", hybrid)
    assert error_of(*arguments, "--moe", *options)["got"] == options[0]
    assert error_of(*arguments, "--shared", "keep")["what"] == "--shared"
