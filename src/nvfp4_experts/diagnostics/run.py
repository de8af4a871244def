# SPDX-License-Identifier: Apache-2.0
"""Run one shared expert of a checkpoint: its output, how long it took, and what went in and came out.

Time is wall clock around whole calls, the device synchronised before and after each: what a caller waits, launch
included. `warmup` calls come first and are not counted; the output is that of the last call.
"""

from __future__ import annotations

import statistics as stats
import time
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from ..checkpoints import load_shared_expert, open_checkpoint
from ..errors import InputError
from ..layers.shared_expert import Nvfp4SharedExpert
from .metrics import TensorStatistics, statistics


@dataclass(frozen=True)
class RunReport:
    """What ran, where, how fast (milliseconds per call), and what the tensors look like."""

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

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


@dataclass(frozen=True)
class LoadedLayer:
    """A shared expert, and where it came from: the formats its projections are stored in, the seconds to load it."""

    expert: Nvfp4SharedExpert
    checkpoint: str
    layer: int
    stored: tuple[str, ...]
    seconds: float


def load_layer(
    checkpoint: str,
    layer: int,
    *,
    max_tokens: int,
    device: str,
    activations: str,
    activation_scale: str | None,
    backend: str,
) -> LoadedLayer:
    """`load_shared_expert`, timed. Weights that are not stored in NVFP4 are quantised, which `stored` shows."""
    projections = open_checkpoint(checkpoint).shared_expert(layer).projections.values()
    start = time.perf_counter()
    expert = load_shared_expert(
        checkpoint,
        layer,
        device,
        max_tokens,
        activations=activations,
        activation_scale=activation_scale,
        backend=backend,
    )
    stored = tuple(dict.fromkeys(projection.format for projection in projections))
    return LoadedLayer(expert, checkpoint, layer, stored, time.perf_counter() - start)


def run_layer(loaded: LoadedLayer, x: Tensor, *, warmup: int = 1, repeat: int = 5) -> tuple[Tensor, RunReport]:
    """Call a layer `warmup` + `repeat` times on x and report the last `repeat`.

    Args:
        loaded: the layer.
        x: (..., H); moved to the layer's device first.
        warmup: >= 0.
        repeat: >= 1.

    Raises:
        InputError: counts out of range, or x does not fit the layer.
    """
    expert = loaded.expert
    if warmup < 0 or repeat < 1:
        raise InputError("warmup, repeat", "must be at least 0 and 1", (warmup, repeat), "time at least one call")
    device = expert.gate.device
    x = x.to(device)
    for _ in range(warmup):
        expert(x)
    milliseconds = []
    for _ in range(repeat):
        _synchronize(device)
        start = time.perf_counter()
        y: Tensor = expert(x)
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
        activation_scale=expert.activation_scale if expert.activations == "nvfp4" else None,
        swiglu_limit=expert.swiglu_limit,
        resident_bytes=expert.resident_bytes,
        load_seconds=loaded.seconds,
        calls=repeat,
        median_ms=stats.median(milliseconds),
        min_ms=min(milliseconds),
        input=statistics(x),
        output=statistics(y),
    )


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
