# SPDX-License-Identifier: Apache-2.0
"""How far an NVFP4 checkpoint is from the checkpoint it was made from, expert by expert.

    weights   each projection against the original's, both decoded to fp32
    outputs   y = layer(x) in each activation format, against two truths in exact fp32 math:
              the ORIGINAL weights (everything: what a user gets) and
              the checkpoint's own weights (what the activation format alone costs)
    bits      where the conversion promises them (see promises.py), the first mismatch
    hints     what kind of mistake would explain weights that are far off (see diagnosis.py)

An expert passes when its bound figure, the rel-L2 of its bf16-activation output against the original weights, is at
most `max_error`, and every promise of bits is kept. For an expert that is not in NVFP4 the bound figure is that of
its weights in exact math.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field

from torch import Tensor

from ..checkpoints.load import shared_input_scales
from ..checkpoints.projections import load_projection
from ..checkpoints.reader import Checkpoint, ExpertEntry, open_checkpoint
from ..errors import CheckpointError, InputError
from ..formats.nvfp4 import Nvfp4Tensor
from ..kernels.reference import swiglu
from ..kernels.target import usable_device
from ..layers.shared_expert import Nvfp4SharedExpert
from .diagnosis import diagnose
from .hidden_states import synthetic_hidden_states
from .metrics import ErrorFigures, compare
from .promises import BitCheck, check_bits
from .weights import Weight, values

# Three projections at NVFP4's 0.095 each add in quadrature to 0.165; half as much again is room for unlucky weights.
DEFAULT_MAX_ERROR = 0.25

FORMATS: tuple[tuple[str, str | None], ...] = (
    ("bf16", None), ("fp8", None), ("nvfp4", "static"), ("nvfp4", "dynamic"), ("nvfp4", "per_token"),
)  # fmt: skip

ProgressCallback = Callable[[int, int, str], None]


@dataclass(frozen=True)
class WeightError:
    """One projection against the original's."""

    projection: str
    format: str
    original_format: str
    shape: tuple[int, ...]
    error: ErrorFigures


@dataclass(frozen=True)
class OutputError:
    """The layer's output in one activation format, against both truths."""

    activations: str
    activation_scale: str | None
    against_original: ErrorFigures
    against_own_weights: ErrorFigures

    @property
    def label(self) -> str:
        return f"{self.activations} {self.activation_scale}" if self.activation_scale else self.activations


@dataclass(frozen=True)
class ExpertVerification:
    """Everything found out about one expert."""

    layer: int
    kind: str
    index: int | None
    weights: list[WeightError]
    exact: ErrorFigures  # the output of exact math: the checkpoint's weights against the original's
    outputs: list[OutputError]
    bits: list[BitCheck]
    hints: list[str]

    @property
    def name(self) -> str:
        return f"layer {self.layer} {self.kind}" + ("" if self.index is None else f" {self.index}")

    @property
    def bound_figure(self) -> ErrorFigures:
        """What `max_error` bounds; see the module docstring."""
        plain = [output.against_original for output in self.outputs if output.activations == "bf16"]
        return plain[0] if plain else self.exact

    @property
    def broken_promises(self) -> list[BitCheck]:
        return [check for check in self.bits if check.mismatch is not None]

    def to_dict(self) -> dict[str, object]:
        return {
            **asdict(self),
            "bits": [check.to_dict() for check in self.bits],
            "bound_figure": self.bound_figure.rel_l2,
        }


@dataclass(frozen=True)
class VerificationReport:
    """The verdict and everything behind it."""

    checkpoint: str
    original: str
    hidden_states: str
    tokens: int
    max_error: float
    recipe: str | None
    experts: list[ExpertVerification] = field(default_factory=list)

    @property
    def offenders(self) -> list[ExpertVerification]:
        """Experts past the bound, NaN included, or with broken promises."""
        return [e for e in self.experts if not e.bound_figure.within(self.max_error) or e.broken_promises]

    @property
    def passed(self) -> bool:
        return not self.offenders

    def to_dict(self) -> dict[str, object]:
        return {
            "checkpoint": self.checkpoint, "original": self.original, "hidden_states": self.hidden_states,
            "tokens": self.tokens, "max_error": self.max_error, "recipe": self.recipe, "passed": self.passed,
            "offenders": [e.name for e in self.offenders], "experts": [e.to_dict() for e in self.experts],
        }  # fmt: skip


def verify_checkpoint(
    checkpoint: str,
    original: str,
    *,
    layers: list[int] | None = None,
    experts: str = "shared",
    sample: int | None = None,
    hidden_states: Tensor | None = None,
    tokens: int = 64,
    seed: int = 0,
    recipe: str | None = None,
    max_error: float = DEFAULT_MAX_ERROR,
    device: str = "cpu",
    backend: str = "auto",
    progress: ProgressCallback | None = None,
) -> VerificationReport:
    """Compare a checkpoint with its original; see the module docstring for what is compared.

    Args:
        checkpoint, original: directories or hub ids, in any dialect the reader knows.
        layers: which layers; None is all that the checkpoint has.
        experts: "shared", "routed" or "all". A routed expert is run alone, with routing weight 1.
        sample: at most so many routed experts per layer, evenly spaced; None is all.
        hidden_states: (..., H) for every layer; None draws (tokens, H) of N(0, 1) from `seed`.
        recipe: promise that the checkpoint was made from the original by this recipe, bit for bit.
        max_error: bound on the rel-L2 of the bf16-activation output against the original weights.
        device, backend: where and by what the layers run; the exact math runs on the same device.
        progress: called with (experts done, experts in all, name).

    Raises:
        CheckpointError: either cannot be read, or the original lacks an expert that the checkpoint has.
        InputError: nothing selected, or hidden states that do not fit.
        UnsupportedError: a device or backend that does not work here.

    Cost: one expert at a time; at its peak about 20 bytes per weight of that expert.
    """
    usable_device(device)
    ours, theirs = open_checkpoint(checkpoint), open_checkpoint(original)
    chosen = choose_experts(ours, layers, experts, sample)
    truths = {(entry.layer, entry.kind, entry.index): entry for entry in theirs.experts}
    described = f"N(0, 1), seed {seed}" if hidden_states is None else "given"
    count = tokens if hidden_states is None else hidden_states.numel() // max(hidden_states.shape[-1], 1)
    verified = []
    for done, entry in enumerate(chosen):
        if progress:
            progress(done, len(chosen), entry.prefix)
        truth = truths.get((entry.layer, entry.kind, entry.index))
        if truth is None:
            raise CheckpointError(original, f"must hold the original of {entry.prefix}", "none", "check both paths")
        x = (
            synthetic_hidden_states(tokens, entry.projections["gate"].shape[-1], seed)
            if hidden_states is None
            else hidden_states
        )
        verified.append(_verify_expert(ours, entry, theirs, truth, x, recipe, device, backend))
    return VerificationReport(str(ours.path), str(theirs.path), described, count, max_error, recipe, verified)


def exact_expert(x: Tensor, weights: dict[str, Tensor], limit: float) -> Tensor:
    """swiglu(x @ gate.T, x @ up.T) @ down.T in fp32 on the device of x: the layer with nothing rounded."""
    gate, up, down = (weights[name].to(x.device) for name in ("gate", "up", "down"))
    return swiglu(x @ gate.T, x @ up.T, limit) @ down.T


def choose_experts(
    checkpoint: Checkpoint, layers: list[int] | None, experts: str, sample: int | None
) -> list[ExpertEntry]:
    """The experts that `layers`, `experts` and `sample` of `verify_checkpoint` select.

    Raises:
        InputError: none.
    """
    kinds = ("shared", "routed") if experts == "all" else (experts,)
    chosen = []
    for layer in sorted({entry.layer for entry in checkpoint.experts}) if layers is None else layers:
        here = [entry for entry in checkpoint.experts if entry.layer == layer and entry.kind in kinds]
        routed = [entry for entry in here if entry.kind == "routed"]
        if sample is not None and len(routed) > sample:
            kept = [routed[i * len(routed) // sample] for i in range(sample)]
            here = [entry for entry in here if entry.kind == "shared"] + kept
        chosen += here
    if not chosen:
        what = f"experts={experts!r}, layers={layers or 'all'}"
        raise InputError(what, "must select at least one expert", f"none of {len(checkpoint.experts)}", "see `inspect`")
    return chosen


def _verify_expert(
    ours: Checkpoint,
    entry: ExpertEntry,
    theirs: Checkpoint,
    truth: ExpertEntry,
    x: Tensor,
    recipe: str | None,
    device: str,
    backend: str,
) -> ExpertVerification:
    for name, p in entry.check().projections.items():
        if p.shape != (expected := truth.check().projections[name].shape):
            raise CheckpointError(p.prefix, f"must have the original's shape {expected}", p.shape, "check both paths")
    actual: dict[str, Weight] = {name: load_projection(ours, p) for name, p in entry.projections.items()}
    original: dict[str, Weight] = {name: load_projection(theirs, p) for name, p in truth.projections.items()}
    own = {name: values(weight) for name, weight in actual.items()}
    true = {name: values(weight) for name, weight in original.items()}
    weights = [
        WeightError(name, p.format, truth.projections[name].format, tuple(p.shape), compare(own[name], true[name]))
        for name, p in entry.projections.items()
    ]
    hidden = own["gate"].shape[-1]
    if x.shape[-1] != hidden:
        raise InputError(
            "hidden states", f"must be (..., {hidden}) for {entry.prefix}", tuple(x.shape), "check the layer"
        )
    x = x.reshape(-1, hidden).float().to(device)
    limit = ours.swiglu_limit or 0.0
    y_true, y_own = exact_expert(x, true, limit), exact_expert(x, own, limit)
    return ExpertVerification(
        entry.layer,
        entry.kind,
        entry.index,
        weights,
        compare(y_own, y_true),
        _output_errors(ours, entry, actual, x, y_true, y_own, device, backend),
        check_bits(actual, original, recipe),
        diagnose(actual, true),
    )


def _output_errors(
    checkpoint: Checkpoint,
    entry: ExpertEntry,
    actual: dict[str, Weight],
    x: Tensor,
    y_true: Tensor,
    y_own: Tensor,
    device: str,
    backend: str,
) -> list[OutputError]:
    """The layer's error in every activation format that can run; none unless all three projections are NVFP4."""
    packed = {name: weight.to(device) for name, weight in actual.items() if isinstance(weight, Nvfp4Tensor)}
    if len(packed) < len(actual):
        return []
    input_scale, hidden_scale = shared_input_scales(checkpoint, entry)
    static = input_scale is not None and hidden_scale is not None
    layer = Nvfp4SharedExpert.from_weights(
        packed["gate"],
        packed["up"],
        packed["down"],
        swiglu_limit=checkpoint.swiglu_limit,
        activations="bf16",
        input_scale=input_scale,
        hidden_scale=hidden_scale,
        max_tokens=max(len(x), 1),
        backend=backend,
    )
    found = []
    for activations, scale in FORMATS:
        if scale == "static" and not static:
            continue
        y = layer.with_activations(activations, scale)(x)
        found.append(OutputError(activations, scale, compare(y, y_true), compare(y, y_own)))
    return found
