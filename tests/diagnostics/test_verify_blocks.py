# SPDX-License-Identifier: Apache-2.0
"""Whole blocks against their originals: honest conversions pass, and what only a block can show is seen."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nvfp4_experts.checkpoints import convert, load_moe, open_checkpoint
from nvfp4_experts.diagnostics.verify_blocks import BlocksReport, exact_block, verify_blocks
from nvfp4_experts.errors import CheckpointError, InputError
from tests.checkpoints import factory
from tests.tolerances import AGAINST_EXACT_MATH, NVFP4_OF_GAUSSIAN


@pytest.fixture(scope="module")
def converted(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("blocks") / "nvfp4"
    convert(tiny_checkpoint, path, experts="all")
    return path


@pytest.fixture(scope="module")
def report(converted: Path, tiny_checkpoint: Path) -> BlocksReport:
    return verify_blocks(str(converted), str(tiny_checkpoint), tokens=32)


def test_an_honest_conversion_passes(report: BlocksReport) -> None:
    assert report.passed and [block.layer for block in report.blocks] == [0, 1, 2, 3]
    for block in report.blocks:
        found = {output.label: output for output in block.outputs}
        assert block.same_routes == 1 and list(found) == ["bf16", "fp8", "nvfp4 dynamic", "nvfp4 per_token"]
        assert block.exact.rel_l2 <= 3**0.5 * NVFP4_OF_GAUSSIAN
        for activations, label in (("bf16", "bf16"), ("fp8", "fp8"), ("nvfp4", "nvfp4 per_token")):
            assert found[label].against_own_weights.rel_l2 <= AGAINST_EXACT_MATH[activations]
        assert block.bound_figure == found["bf16"].against_original


def test_against_itself_only_activations_are_rounded(tiny_checkpoint: Path) -> None:
    found = verify_blocks(str(tiny_checkpoint), str(tiny_checkpoint), layers=[1], shared="keep", tokens=8)
    assert found.blocks[0].exact.rel_l2 == 0 and found.shared == "keep"


def test_exact_block_is_the_definition(tmp_path: Path) -> None:
    tensors, values, config = factory.hybrid()
    path = factory.write(tmp_path / "c", tensors, config)
    block, x = load_moe(path, 1), torch.randn(5, 160)
    indices, weights = block.router(x)
    want = torch.zeros(5, 160, dtype=torch.float64)

    def one(prefix: str, row: torch.Tensor) -> torch.Tensor:
        w = {name: value.double() for name, value in values[prefix].items()}
        gate, up = row @ w["gate"].T, row @ w["up"].T
        return (torch.nn.functional.silu(gate.clamp(max=10)) * up.clamp(-10, 10)) @ w["down"].T

    for t in range(5):
        row = x[t].double()
        want[t] = one("layers.1.ffn.shared_experts", row)
        for s in range(2):
            want[t] += weights[t, s].double() * one(f"layers.1.ffn.experts.{int(indices[t, s])}", row)
    got = exact_block(open_checkpoint(path), 1, x, indices, weights)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5 * float(want.abs().amax()))


def damage(source: Path, target: Path, change: object) -> str:
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors")
    return str(target)


def test_another_router_is_seen(converted: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.2.ffn.gate.bias"] = tensors["model.layers.2.ffn.gate.bias"].roll(1) + torch.arange(8) / 4

    wrong = damage(converted, tmp_path / "c", change)
    found = verify_blocks(wrong, str(tiny_checkpoint), tokens=16, max_error=10.0)
    assert not found.passed and [block.within(10.0) for block in found.blocks] == [True, True, False, True]
    assert found.blocks[2].same_routes < 1


def test_experts_under_each_others_numbers_are_seen(converted: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        a, b = ("model.layers.1.ffn.experts.0.", "model.layers.1.ffn.experts.1.")
        for name in [name for name in tensors if name.startswith(a)]:
            other = b + name.removeprefix(a)
            tensors[name], tensors[other] = tensors[other], tensors[name]

    found = verify_blocks(damage(converted, tmp_path / "c", change), str(tiny_checkpoint), layers=[1], tokens=64)
    assert not found.passed and found.blocks[0].same_routes == 1


def test_static_scales_are_used_where_there_are_some(tmp_path: Path) -> None:
    tensors, _, config = factory.hybrid()
    path = str(factory.write(tmp_path / "c", tensors, config))
    found = verify_blocks(path, path, tokens=4, max_error=1.0)
    assert "nvfp4 static" in [output.label for output in found.blocks[0].outputs]
    assert found.to_dict()["blocks"][0]["bound_figure"] == found.blocks[0].bound_figure.rel_l2


@pytest.mark.parametrize("missing", [(0, 5), 0])
def test_static_scales_that_some_expert_lacks_are_not_used(
    missing: object, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """A routed expert without any leaves static out; a shared one without any is dynamic then."""
    scales = {key: (0.004, 0.05) for key in (0, *((0, expert) for expert in range(8))) if key != missing}
    convert(tiny_checkpoint, tmp_path / "c", experts="all", input_scales=scales)
    found = verify_blocks(str(tmp_path / "c"), str(tiny_checkpoint), layers=[0], tokens=8, max_error=1.0)
    labels = [output.label for output in found.blocks[0].outputs]
    assert ("nvfp4 static" in labels) == (missing == 0) and "nvfp4 dynamic" in labels


def test_what_does_not_fit_raises(converted: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    ours, theirs = str(converted), str(tiny_checkpoint)
    with pytest.raises(InputError, match="routed experts"):
        verify_blocks(ours, theirs, layers=[9])
    with pytest.raises(InputError, match=r"\(\.\.\., 256\)"):
        verify_blocks(ours, theirs, layers=[1], hidden_states=torch.randn(3, 128))
    with pytest.raises(InputError, match="nvfp4"):
        verify_blocks(ours, theirs, shared="some")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".experts.3." in name]:
            del tensors[name]

    with pytest.raises(CheckpointError, match="must hold expert 3 of layer"):
        verify_blocks(ours, damage(tiny_checkpoint, tmp_path / "c", change), layers=[1])
