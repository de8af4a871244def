# SPDX-License-Identifier: Apache-2.0
"""Run a shared expert of a checkpoint, or a whole block: its output, how long it took, and what went in and came out.

Time is wall clock around whole calls, the device synchronised before and after each: what a caller waits, launch
included. `warmup` calls come first and are not counted; the output is that of the last call.
"""

from __future__ import annotations

import statistics as stats
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..checkpoints import load_moe, load_shared_expert, open_checkpoint
from ..errors import InputError
from ..layers.kept_expert import KeptSharedExpert
from ..layers.moe import Nvfp4MoE
from ..layers.routed_experts import Nvfp4RoutedExperts
from ..layers.shared_expert import Nvfp4SharedExpert
from .blocks import block_formats
from .metrics import TensorStatistics, statistics


@dataclass(frozen=True)
class BlockFacts:
    """What a whole block has beside what a shared expert has: how it routes, how it treats its shared expert.

    routed, shared: as they are stored. shared_runs: "nvfp4" or "kept"; None without one. experts_hit: by this batch.
    """

    experts: int
    top_k: int
    by_token_id: bool
    weighting: str
    routed: str | None
    shared: str | None
    shared_runs: str | None
    shared_activation_scale: str | None
    experts_hit: int


@dataclass(frozen=True)
class RunReport:
    """What ran, where, how fast (milliseconds per call), and what the tensors look like.

    Of a block, what a layer has (sizes, backend, activations) is that of its routed experts.
    """

    checkpoint: str
    layer: int
    stored: tuple[str, ...]
    hidden_size: int
    intermediate_size: int
    tokens: int
    dtype: str
    device: str
    backend: str
    activations: str
    activation_scale: str | None
    swiglu_limit: float
    resident_bytes: int
    load_seconds: float
    calls: int
    median_ms: float
    min_ms: float
    input: TensorStatistics
    output: TensorStatistics
    block: BlockFacts | None = None

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


@dataclass(frozen=True)
class LoadedLayer:
    """A module, and where it came from: the formats its experts are stored in, the seconds to load it."""

    module: Nvfp4SharedExpert | Nvfp4MoE
    checkpoint: str
    layer: int
    stored: tuple[str, ...]
    seconds: float

    @property
    def expert(self) -> Nvfp4SharedExpert | Nvfp4RoutedExperts:
        """What tells sizes and activations."""
        return self.module.routed if isinstance(self.module, Nvfp4MoE) else self.module

    @property
    def vocabulary(self) -> int | None:
        """How many token ids the router has experts for; None for what does not go by token id."""
        table = self.module.router.tid2eid if isinstance(self.module, Nvfp4MoE) else None
        return len(table) if isinstance(table, Tensor) else None


def load_layer(checkpoint: str, layer: int, **options: Any) -> LoadedLayer:
    """`load_shared_expert`, timed. Weights that are not stored in NVFP4 are quantised, which `stored` shows."""
    opened = open_checkpoint(checkpoint)
    formats = (projection.format for projection in opened.shared_expert(layer).projections.values())
    start = time.perf_counter()
    expert = load_shared_expert(opened, layer, **options)
    return LoadedLayer(expert, checkpoint, layer, tuple(dict.fromkeys(formats)), time.perf_counter() - start)


def load_block(checkpoint: str, layer: int, **options: Any) -> LoadedLayer:
    """`load_moe`, timed; `stored` has the formats of the routed experts."""
    opened = open_checkpoint(checkpoint)
    formats = (p.format for entry in opened.routed_experts(layer) for p in entry.projections.values())
    start = time.perf_counter()
    block = load_moe(opened, layer, **options)
    return LoadedLayer(block, checkpoint, layer, tuple(dict.fromkeys(formats)), time.perf_counter() - start)


def run_layer(
    loaded: LoadedLayer, x: Tensor, token_ids: Tensor | None = None, *, warmup: int = 1, repeat: int = 5
) -> tuple[Tensor, RunReport]:
    """Call a layer `warmup` + `repeat` times on x and report the last `repeat`.

    Args:
        loaded: the layer.
        x: (..., H); moved to the layer's device first.
        token_ids: (...) integers, for a block that routes by them.
        warmup: >= 0.
        repeat: >= 1.

    Raises:
        InputError: counts out of range, or x does not fit the layer.
    """
    module, expert = loaded.module, loaded.expert
    if warmup < 0 or repeat < 1:
        raise InputError("warmup, repeat", "must be at least 0 and 1", (warmup, repeat), "time at least one call")
    device = next(module.buffers()).device
    x = x.to(device)
    ids = None if token_ids is None else token_ids.to(device)
    call: Callable[[], Tensor] = (lambda: module(x, ids)) if isinstance(module, Nvfp4MoE) else (lambda: module(x))
    for _ in range(warmup):
        call()
    milliseconds = []
    for _ in range(repeat):
        _synchronize(device)
        start = time.perf_counter()
        y = call()
        _synchronize(device)
        milliseconds.append(1000 * (time.perf_counter() - start))
    return y, RunReport(
        checkpoint=loaded.checkpoint,
        layer=loaded.layer,
        stored=loaded.stored,
        hidden_size=expert.hidden_size,
        intermediate_size=expert.intermediate_size,
        tokens=x.numel() // expert.hidden_size,
        dtype=str(x.dtype).removeprefix("torch."),
        device=str(device),
        backend=expert.backend,
        activations=expert.activations,
        activation_scale=_scale(expert),
        swiglu_limit=expert.swiglu_limit,
        resident_bytes=module.resident_bytes,
        load_seconds=loaded.seconds,
        calls=repeat,
        median_ms=stats.median(milliseconds),
        min_ms=min(milliseconds),
        input=statistics(x),
        output=statistics(y),
        block=_block_facts(loaded, module, x, ids) if isinstance(module, Nvfp4MoE) else None,
    )


def _block_facts(loaded: LoadedLayer, block: Nvfp4MoE, x: Tensor, ids: Tensor | None) -> BlockFacts:
    formats = block_formats(open_checkpoint(loaded.checkpoint), [loaded.layer])[0]
    shared = block.shared
    return BlockFacts(
        experts=block.routed.num_experts,
        top_k=block.routed.top_k,
        by_token_id=loaded.vocabulary is not None,
        weighting=block.routed.weighting,
        routed=formats.routed,
        shared=formats.shared,
        shared_runs=None if shared is None else "kept" if isinstance(shared, KeptSharedExpert) else "nvfp4",
        shared_activation_scale=_scale(shared) if isinstance(shared, Nvfp4SharedExpert) else None,
        experts_hit=len(block.router(x, ids)[0].unique()),
    )


def _scale(expert: Nvfp4SharedExpert | Nvfp4RoutedExperts) -> str | None:
    return expert.activation_scale if expert.activations == "nvfp4" else None


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
