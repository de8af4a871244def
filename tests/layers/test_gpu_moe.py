# SPDX-License-Identifier: Apache-2.0
"""Blocks from checkpoints on a GPU: the numbers of a CPU, and one expert in memory beside the packed ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nvfp4_experts import load_moe, load_routed_experts
from nvfp4_experts.checkpoints import load_kept_expert
from tests.checkpoints import factory
from tests.checkpoints.test_memory import sparse_checkpoint
from tests.tolerances import against_reference

pytestmark = pytest.mark.gpu

BLOCK = 512  # bytes that torch's allocator hands out at a time


@pytest.mark.parametrize(
    "kind", [kind for kind in factory.MAKERS if factory.FORMATS.get(kind) not in ("nvfp4", "mxfp4")]
)
def test_a_kept_shared_expert(tmp_path: Path, kind: str) -> None:
    tensors, _, config = factory.blocks(factory.MAKERS[kind], factory.mxfp4())
    path, x = factory.write(tmp_path / "c", tensors, config), torch.randn(33, 160)
    want, got = (load_kept_expert(path, 1, device)(x.to(device)).cpu() for device in ("cpu", "cuda"))
    assert (got - want).norm() <= against_reference("bf16", "torch", 33 * 96) * want.norm()


@pytest.mark.parametrize("shared", ["nvfp4", "keep"])
@pytest.mark.parametrize("layer", [0, 1])
def test_a_hybrid_block(tmp_path: Path, layer: int, shared: str) -> None:
    """Every format crosses over as it is stored and is decoded on the device."""
    tensors, _, config = factory.hybrid()
    path = factory.write(tmp_path / "c", tensors, config)
    x, ids = torch.randn(33, 160), torch.randint(11, (33,))
    options = {"shared": shared, "activations": "bf16", "backend": "torch"}
    want, got = (load_moe(path, layer, d, **options)(x.to(d), ids.to(d)).cpu() for d in ("cpu", "cuda"))
    assert (got - want).norm() <= against_reference("bf16", "torch", 33 * 96) * want.norm()


@pytest.mark.parametrize("kind", ["BF16", "FP8", "MXFP4"])
def test_one_expert_lies_beside_the_packed_ones(tmp_path: Path, kind: str) -> None:
    sparse_checkpoint(tmp_path / "c", kind, 1024, 1024, experts=32)

    def peak(experts: range) -> tuple[int, int]:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        options = {"experts": experts, "activations": "bf16", "backend": "torch", "top_k": 1}
        loaded = load_routed_experts(tmp_path / "c", 0, "cuda", **options)
        in_blocks = sum(-(-buffer.nbytes // BLOCK) * BLOCK for buffer in loaded.buffers())
        return torch.cuda.max_memory_allocated() - before, in_blocks

    peak(range(1))  # what the first use of the device needs once
    of_one, _ = peak(range(1))
    of_all, packed = peak(range(32))
    assert packed <= of_all <= packed + of_one
