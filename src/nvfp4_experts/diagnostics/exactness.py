# SPDX-License-Identifier: Apache-2.0
"""How far a backend's nvfp4 results are from what Blackwell's FP4 tensor core computes by rule (backend "exact").

    y      the layer's output in bf16 and in fp32, both backends on the same hidden states (rounded to bf16)
    h      what enters the down projection, read out through a down projection that copies channels:
           a token whose h is the same in both can differ only in the sum of the down projection

A sum in another order rarely changes a bf16 output. It may move a value of h, or the scale of its block, across a
boundary of the format, and then all outputs of that token move: so tokens are counted too.

An expert passes in one activation scale mode when at least `min_equal` of its bf16 outputs are bit-equal.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from ..checkpoints.load import shared_input_scales
from ..checkpoints.projections import load_projection
from ..checkpoints.reader import Checkpoint, ExpertEntry, open_checkpoint
from ..errors import InputError
from ..formats.codes import BLOCK_SIZE
from ..formats.nvfp4 import Nvfp4Tensor
from ..kernels.exact import rule
from ..kernels.target import usable_device
from ..layers.shared_expert import Nvfp4SharedExpert
from .bits import BitComparison, compare_bits
from .hidden_states import synthetic_hidden_states
from .verify import ProgressCallback, choose_experts

DEFAULT_MIN_EQUAL = 0.99
FIRST_HALF, SECOND_HALF = "h as it enters the down projection", "the sum of the down projection"


@dataclass(frozen=True)
class Exactness:
    """One layer in one activation scale mode, a backend against "exact".

    Args:
        backend: what ran.
        activation_scale: "static", "dynamic" or "per_token".
        tokens: how many rows were compared.
        tokens_with_other_h: in how many of them h, as it enters the down projection, differs.
        outputs: of bf16 and of fp32.
        stages: for each of `outputs`, what differs first in the token of its first mismatch: FIRST_HALF or SECOND_HALF.
    """

    backend: str
    activation_scale: str
    tokens: int
    tokens_with_other_h: int
    outputs: tuple[BitComparison, ...]
    stages: tuple[str | None, ...]

    @property
    def share(self) -> float:
        """Share of bf16 outputs that are bit-equal: what a bound is about."""
        return self.outputs[0].share

    def to_dict(self) -> dict[str, object]:
        outputs = [
            {**output.to_dict(), "stage": stage} for output, stage in zip(self.outputs, self.stages, strict=True)
        ]
        figures = {key: value for key, value in asdict(self).items() if key != "stages"}
        return {**figures, "outputs": outputs, "share": self.share}


@dataclass(frozen=True)
class ExpertExactness:
    """One expert of a checkpoint."""

    name: str
    modes: tuple[Exactness, ...]

    def to_dict(self) -> dict[str, object]:
        return {"name": self.name, "modes": [mode.to_dict() for mode in self.modes]}


@dataclass(frozen=True)
class ExactnessReport:
    """The verdict and everything behind it; `form` says what computed the exact side."""

    checkpoint: str
    hidden_states: str
    device: str
    form: str
    min_equal: float
    experts: list[ExpertExactness] = field(default_factory=list)

    @property
    def offenders(self) -> list[str]:
        """Experts with too few equal outputs in some mode."""
        return [e.name for e in self.experts if any(mode.share < self.min_equal for mode in e.modes)]

    @property
    def passed(self) -> bool:
        return not self.offenders

    def to_dict(self) -> dict[str, object]:
        return {
            "checkpoint": self.checkpoint, "hidden_states": self.hidden_states, "device": self.device,
            "form": self.form, "min_equal": self.min_equal, "passed": self.passed, "offenders": self.offenders,
            "experts": [expert.to_dict() for expert in self.experts],
        }  # fmt: skip


def verify_exact(
    checkpoint: str,
    *,
    layers: list[int] | None = None,
    experts: str = "shared",
    sample: int | None = None,
    hidden_states: Tensor | None = None,
    tokens: int = 64,
    seed: int = 0,
    min_equal: float = DEFAULT_MIN_EQUAL,
    device: str = "cpu",
    backend: str = "auto",
    progress: ProgressCallback | None = None,
) -> ExactnessReport:
    """Compare a backend with "exact" on a checkpoint's experts; see the module docstring.

    Args:
        checkpoint, layers, experts, sample, hidden_states, tokens, seed, device, progress: as `verify_checkpoint`.
        min_equal: share of bf16 outputs that must be bit-equal, 0 to 1.
        backend: what is compared, by name or "auto".

    Raises:
        CheckpointError: it cannot be read.
        InputError: nothing selected, an expert that is not NVFP4, hidden states that do not fit, or "exact" itself.
        UnsupportedError: a device or backend that does not work here.
    """
    if backend == "exact":
        raise InputError("backend", "must be another than the one to compare with", "'exact'", "name it, or use 'auto'")
    where = usable_device(device)
    source = open_checkpoint(checkpoint)
    chosen = choose_experts(source, layers, experts, sample)
    found = []
    for done, entry in enumerate(chosen):
        if progress:
            progress(done, len(chosen), entry.prefix)
        hidden = entry.check().projections["gate"].shape[-1]
        x = synthetic_hidden_states(tokens, hidden, seed) if hidden_states is None else hidden_states
        if x.shape[-1] != hidden:
            raise InputError(
                "hidden states", f"must be (..., {hidden}) for {entry.prefix}", tuple(x.shape), "check the layer"
            )
        found.append(_expert(source, entry, x.reshape(-1, hidden).to(where), backend))
    described = f"{tokens} tokens (N(0, 1), seed {seed})" if hidden_states is None else "given"
    return ExactnessReport(str(source.path), described, str(where), rule.form(where), min_equal, found)


def _expert(source: Checkpoint, entry: ExpertEntry, x: Tensor, backend: str) -> ExpertExactness:
    weights = []
    for projection in entry.projections.values():
        weight = load_projection(source, projection)
        if not isinstance(weight, Nvfp4Tensor):
            raise InputError(projection.prefix, "must be NVFP4", projection.format, "convert it with `quantize` first")
        weights.append(weight.to(x.device))
    gate, up, down = weights
    input_scale, hidden_scale = shared_input_scales(source, entry)
    modes = ("dynamic", "per_token") if None in (input_scale, hidden_scale) else ("static", "dynamic", "per_token")
    found = tuple(
        compare_with_exact(gate, up, down, x, mode, backend, source.swiglu_limit, input_scale, hidden_scale)
        for mode in modes
    )
    name = f"layer {entry.layer} {entry.kind}" + ("" if entry.index is None else f" {entry.index}")
    return ExpertExactness(name, found)


def compare_with_exact(
    gate: Nvfp4Tensor,
    up: Nvfp4Tensor,
    down: Nvfp4Tensor,
    x: Tensor,
    activation_scale: str,
    backend: str,
    swiglu_limit: float | None,
    input_scale: float | Tensor | None,
    hidden_scale: float | Tensor | None,
) -> Exactness:
    """One layer, one activation scale mode: x (T, H), rounded to bf16, through a backend and through "exact".

    Raises:
        UnsupportedError: the backend refuses.
    """
    x = x.bfloat16()
    build = functools.partial(
        Nvfp4SharedExpert,
        swiglu_limit=swiglu_limit,
        activations="nvfp4",
        activation_scale=activation_scale,
        input_scale=input_scale,
        hidden_scale=hidden_scale,
        max_tokens=max(len(x), 1),
    )
    theirs, exact = build(gate, up, down, backend=backend), build(gate, up, down, backend="exact")
    outputs = tuple(compare_bits(theirs(x.to(dtype)), exact(x.to(dtype))) for dtype in (torch.bfloat16, torch.float32))
    other_h = _other_h(functools.partial(build, gate, up), theirs.intermediate_size, x, theirs.backend)
    stages = tuple(
        None if output.first is None else FIRST_HALF if bool(other_h[output.first.token]) else SECOND_HALF
        for output in outputs
    )
    return Exactness(theirs.backend, activation_scale, len(x), int(other_h.sum()), outputs, stages)


def _other_h(build: Callable[..., Nvfp4SharedExpert], size: int, x: Tensor, backend: str) -> Tensor:
    """(T,) bool: tokens whose h, as it enters the down projection, differs between a backend and "exact"."""
    different = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    for first in range(0, size, x.shape[1]):
        copy = _copying(x.shape[1], size, first, x.device)
        ours, exact = (build(copy, backend=name)(x.float()) for name in (backend, "exact"))
        same = (ours == exact) | (ours.isnan() & exact.isnan())
        different |= ~same.all(1)
    return different


def _copying(rows: int, columns: int, first: int, device: torch.device) -> Nvfp4Tensor:
    """A down projection whose row n is one at column first + n: its output is h as it entered, exactly."""
    codes = torch.zeros(rows, columns // 2, dtype=torch.uint8)
    channel = torch.arange(first, min(first + rows, columns))
    one = torch.where(channel % 2 == 1, 0x20, 0x02).to(torch.uint8)  # code 2 is 1.0
    codes[channel - first, channel // 2] = one
    ones = torch.ones(rows, columns // BLOCK_SIZE).to(torch.float8_e4m3fn)
    return Nvfp4Tensor(codes.to(device), ones.to(device), torch.ones((), device=device))
