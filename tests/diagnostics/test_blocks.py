# SPDX-License-Identifier: Apache-2.0
"""What `inspect` says of each layer's experts, and that loading does what it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from nvfp4_experts import KeptSharedExpert, Nvfp4SharedExpert
from nvfp4_experts.checkpoints import load_moe, open_checkpoint
from nvfp4_experts.diagnostics.blocks import BlockFormats, block_formats
from nvfp4_experts.diagnostics.inspect import inspect_checkpoint
from nvfp4_experts.errors import Nvfp4Error
from tests.checkpoints import factory


def test_a_hybrid_of_nvidias(tmp_path: Path) -> None:
    tensors, _, config = factory.hybrid(block=(128, 128))
    path = factory.write(tmp_path / "c", tensors, config)
    fp8 = "fp8_block 128x128, e8m0 scales"
    kept = "kept, 1 bytes a weight, bf16 activations"
    want = [BlockFormats(n, False, "4 nvfp4", fp8, "quantised to nvfp4", kept) for n in (0, 1)]
    mtp = BlockFormats(0, True, "4 mxfp4", fp8, "not loaded", "not loaded")
    assert inspect_checkpoint(str(path)).blocks == [*want, mtp]
    assert inspect_checkpoint(str(path)).to_dict()["blocks"][2]["routed"] == "4 mxfp4"
    assert inspect_checkpoint(str(path), layers=[1]).blocks == want[1:]


@pytest.mark.parametrize("kind", factory.MAKERS)
def test_loading_does_what_is_said(tmp_path: Path, kind: str) -> None:
    tensors, _, config = factory.blocks(factory.MAKERS[kind], factory.mxfp4())
    path = factory.write(tmp_path / "c", tensors, config)
    said = block_formats(open_checkpoint(path))[1]
    assert said.routed == "4 mxfp4" and said.shared.startswith(factory.FORMATS.get(kind, "fp8_block"))
    quantised, kept = (load_moe(path, 1, shared=shared).shared for shared in ("nvfp4", "keep"))
    assert isinstance(quantised, Nvfp4SharedExpert)
    assert isinstance(kept, KeptSharedExpert) == said.under_keep.startswith("kept")
    assert (said.under_nvfp4 == "quantised to nvfp4") == (factory.FORMATS.get(kind) not in ("nvfp4", "mxfp4"))
    if isinstance(kept, KeptSharedExpert):
        weights = 3 * kept.hidden_size * kept.intermediate_size
        assert f" {kept.resident_bytes / weights:.3g} bytes" in said.under_keep


def test_experts_of_two_formats(tmp_path: Path) -> None:
    mixed = {"gate": factory.fp8(), "up": factory.fp8(), "down": factory.modelopt()}
    tensors, _, config = factory.blocks(mixed, factory.mxfp4())
    tensors = {name: t for name, t in tensors.items() if not name.startswith("layers.1.ffn.experts.3.")}
    tensors |= factory.expert(factory.plain(), "layers.1.ffn.experts.3")[0]
    path = factory.write(tmp_path / "c", tensors, config)
    said = block_formats(open_checkpoint(path))[1]
    assert said.routed == "3 mxfp4, 1 bf16"
    assert said.shared == "fp8_block 128x128, e8m0 scales + nvfp4"
    assert (said.under_nvfp4, said.under_keep) == ("quantised to nvfp4", "refused: projections of several formats")
    assert isinstance(load_moe(path, 1).shared, Nvfp4SharedExpert)
    with pytest.raises(Nvfp4Error, match="all three projections"):
        load_moe(path, 1, shared="keep")


def test_malformed_and_absent_experts(tmp_path: Path) -> None:
    tensors, _, config = factory.hybrid()
    tensors = {name: t for name, t in tensors.items() if "layers.0.ffn.shared" not in name}
    del tensors["layers.1.ffn.shared_experts.w1.scale"]
    del tensors["layers.1.ffn.experts.0.w1.weight_scale"]
    found = block_formats(open_checkpoint(factory.write(tmp_path / "c", tensors, config)))
    assert found[0] == BlockFormats(0, False, "4 nvfp4", None, None, None)
    assert found[1] == BlockFormats(1, False, "1 malformed, 3 nvfp4", "malformed", "refused", "refused")


def test_mtp_layers_under_the_layers_own_names(tmp_path: Path) -> None:
    tensors, _, config = factory.blocks(factory.fp8(), factory.mxfp4(), layers=3)
    found = block_formats(open_checkpoint(factory.write(tmp_path / "c", tensors, {**config, "num_hidden_layers": 2})))
    assert [(block.layer, block.is_mtp) for block in found] == [(0, False), (1, False), (2, True)]
