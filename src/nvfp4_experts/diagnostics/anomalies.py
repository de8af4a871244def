# SPDX-License-Identifier: Apache-2.0
"""What can be wrong with a checkpoint that opens, as a table of small rules; each docstring says why it matters.

A rule looks at one subject (a projection's facts, an expert's projections by name, or the whole checkpoint) and gives
a sentence for every instance it finds. What the reader itself refuses to take for an expert arrives as that error and
is named after its class: MissingTensorError is the anomaly `missing-tensor`.

    error    results are wrong or loading refuses
    warning  legal, but some engine reads it differently or it is most likely not meant
    note     worth knowing
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import count
from typing import Any

from ..checkpoints.dialects import parse_name
from ..checkpoints.errors import WrongShapeError
from ..checkpoints.projections import MAX_SANE_WEIGHT
from ..checkpoints.reader import Checkpoint
from ..errors import CheckpointError
from ..formats.codes import BLOCK_SIZE, E2M1_MAX
from ..layouts.scales import swizzled_shape
from .facts import ModuleFacts

SEVERITIES = ("error", "warning", "note")


@dataclass(frozen=True)
class Anomaly:
    """One thing that is wrong: its name, how bad it is, where, what was seen, and the way out."""

    name: str
    severity: str
    where: str
    message: str
    way_out: str

    def to_dict(self) -> dict[str, str]:
        return asdict(self)


@dataclass(frozen=True)
class Rule:
    """A named check. `find` yields (where, message) for each instance in its subject."""

    name: str
    severity: str
    way_out: str
    find: Callable[[Any], Iterator[tuple[str, str]]]

    @property
    def reason(self) -> str:
        """Why the anomaly matters: the docstring of the check."""
        return " ".join((self.find.__doc__ or "").split())

    def check(self, subject: Any) -> list[Anomaly]:
        return [Anomaly(self.name, self.severity, where, text, self.way_out) for where, text in self.find(subject)]


MODULE_RULES: list[Rule] = []
EXPERT_RULES: list[Rule] = []
CHECKPOINT_RULES: list[Rule] = []

_Find = Callable[[Any], Iterator[tuple[str, str]]]


def _rule(rules: list[Rule], name: str, severity: str, way_out: str) -> Callable[[_Find], _Find]:
    def register(find: _Find) -> _Find:
        rules.append(Rule(name, severity, way_out, find))
        return find

    return register


# --- one projection --------------------------------------------------------------------------------------------------


@_rule(MODULE_RULES, "nan-scale", "error", "export the module again; its shard may be damaged")
def _nan_scale(module: ModuleFacts) -> Iterator[tuple[str, str]]:
    """A NaN scale (e4m3 byte 0x7F or 0xFF, e8m0 byte 0xFF) turns its whole block, and every output row, into NaN."""
    if module.nan_scales:
        yield module.prefix, f"{module.nan_scales} of {module.scale_count} block scales are NaN"


@_rule(MODULE_RULES, "negative-scale", "error", "export the module again with unsigned scales")
def _negative_scale(module: ModuleFacts) -> Iterator[tuple[str, str]]:
    """Scales are magnitudes: tensor cores read them as unsigned, other code multiplies by the sign; results differ."""
    if module.negative_scales:
        yield module.prefix, f"{module.negative_scales} of {module.scale_count} block scales have the sign bit set"


@_rule(MODULE_RULES, "all-zero", "warning", "convert the module again from an original that is not zero")
def _all_zero(module: ModuleFacts) -> Iterator[tuple[str, str]]:
    """A projection of zeros silences its expert; a trained one never is, a failed export often."""
    if module.all_zero or (module.scale_max == 0 and module.nan_scales == 0):
        yield module.prefix, f"every weight of {module.shape} decodes to zero"


@_rule(MODULE_RULES, "invalid-scale", "error", "calibrate or export the module again")
def _invalid_scale(module: ModuleFacts) -> Iterator[tuple[str, str]]:
    """A global or input scale that is zero, negative, infinite or NaN makes every weight or activation so."""
    for role in ("global_scale", "input_scale"):
        value = getattr(module, role)
        if value is not None and not (math.isfinite(value) and value > 0):
            yield module.prefix, f"{role} decodes to {value:g}"


@_rule(MODULE_RULES, "reciprocal-global-scale", "error", "store 2688/amax in compressed-tensors, amax/2688 in ModelOpt")
def _reciprocal_global_scale(module: ModuleFacts) -> Iterator[tuple[str, str]]:
    """The dialects store the global scale in opposite directions; the wrong one makes weights millions of times off."""
    if module.global_scale is None or module.scale_max is None or not math.isfinite(module.global_scale):
        return
    largest = E2M1_MAX * module.scale_max * module.global_scale
    if largest > MAX_SANE_WEIGHT:
        other = E2M1_MAX * module.scale_max / module.global_scale
        yield module.prefix, f"weights would reach {largest:.3g}; with the reciprocal, {other:.3g}"


@_rule(
    MODULE_RULES, "missing-input-scale", "note", "calibrate and convert with --input-scales, or run with dynamic scales"
)
def _missing_input_scale(module: ModuleFacts) -> Iterator[tuple[str, str]]:
    """Without it there are no static activation scales; some engines refuse such a module, some take 1.0."""
    if module.format == "nvfp4" and module.input_scale is None:
        yield module.prefix, "no static activation scale"


# --- one expert: its projections by name -----------------------------------------------------------------------------


@_rule(EXPERT_RULES, "gate-up-global-scales-differ", "warning", "convert again without --separate-scales")
def _global_scales_differ(expert: dict[str, ModuleFacts]) -> Iterator[tuple[str, str]]:
    """Legal, and exact in this package; engines that fuse gate and up take one scale for both and err by the ratio."""
    yield from _differ(expert, "global_scale")


@_rule(
    EXPERT_RULES, "gate-up-input-scales-differ", "warning", "calibrate again; the larger of the two is safe for both"
)
def _input_scales_differ(expert: dict[str, ModuleFacts]) -> Iterator[tuple[str, str]]:
    """Gate and up see the same hidden states, so two scales for them cannot both be calibrated ones."""
    yield from _differ(expert, "input_scale")


def _differ(expert: dict[str, ModuleFacts], role: str) -> Iterator[tuple[str, str]]:
    if not {"gate", "up"} <= expert.keys():
        return
    gate, up = getattr(expert["gate"], role), getattr(expert["up"], role)
    if gate is not None and up is not None and gate != up:
        yield expert["gate"].prefix, f"{role} of gate is {gate:.6g}, of up {up:.6g}"


# --- the whole checkpoint --------------------------------------------------------------------------------------------


@_rule(CHECKPOINT_RULES, "missing-config", "warning", "put the original's config.json beside the shards")
def _missing_config(checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    """Only config.json tells the SwiGLU limit; run without it, large activations come out wrong."""
    if not checkpoint.config:
        yield str(checkpoint.directory), "there is no config.json"


@_rule(CHECKPOINT_RULES, "no-experts", "warning", "give a checkpoint whose experts are stored one by one")
def _no_experts(checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    """No tensor has an expert's name: a dense model, fused experts, or names no table here knows."""
    if not checkpoint.experts:
        yield str(checkpoint.directory), f"none of {len(checkpoint.tensors)} tensors is part of an expert"


@_rule(CHECKPOINT_RULES, "missing-expert", "error", "fetch or convert the missing shard again")
def _missing_expert(checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    """A routed expert that is not there (a gap in the numbers, or fewer than config.json says), or a shared one."""
    found: dict[int, set[int | None]] = defaultdict(set)
    for entry in checkpoint.experts:
        found[entry.layer].add(entry.index)
    declared = checkpoint.setting("n_routed_experts")
    for layer, indices in sorted(found.items()):
        routed = {index for index in indices if index is not None}
        expected = declared if isinstance(declared, int) else max(routed, default=-1) + 1
        missing = expected - sum(index < expected for index in routed)  # numbers may be huge: no set of them all
        if routed and missing > 0:
            first = next(index for index in count() if index not in routed)
            yield f"layer {layer}", f"{missing} of {expected} routed experts are missing, first {first}"
        if None not in indices and checkpoint.setting("n_shared_experts"):
            yield f"layer {layer}", "the shared expert is missing"


@_rule(CHECKPOINT_RULES, "unknown-tensor", "warning", "remove it, or export in one of the known dialects")
def _unknown_tensor(checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    """A tensor inside an expert that belongs to none of its projections is read by nobody, or means something new."""
    prefixes = {entry.prefix for entry in checkpoint.experts}
    for name, info in checkpoint.tensors.items():
        expert = next((name[:dot] for dot in _dots(name) if name[:dot] in prefixes), None)
        if expert and parse_name(name) is None:
            yield name, f"{info.dtype} {list(info.shape)} is no part of gate, up or down"


def _dots(name: str) -> Iterator[int]:
    return (match.start() for match in re.finditer(r"\.", name))


# --- what the reader refuses -----------------------------------------------------------------------------------------


def from_error(error: CheckpointError, checkpoint: Checkpoint | None = None) -> Anomaly:
    """The anomaly that an error of the reader stands for, named after its class."""
    if checkpoint is not None and isinstance(error, WrongShapeError) and _looks_swizzled(error, checkpoint):
        message = f"{list(checkpoint.tensors[error.what].shape)} is the padded 128x4 swizzled shape; {error.rule}"
        return Anomaly("swizzled-scales", "error", error.what, message, "unswizzle the scales: files store them linear")
    name = re.sub(r"(?<!^)(?=[A-Z])", "-", type(error).__name__.removesuffix("Error")).lower()
    return Anomaly(name, "error", error.what, f"{error.rule}, got {error.got}", error.way_out)


def _looks_swizzled(error: WrongShapeError, checkpoint: Checkpoint) -> bool:
    """Whether a tensor refused for its shape has that of swizzled scales (or their flat form) for its codes."""
    module, _, suffix = error.what.rpartition(".")
    codes = checkpoint.tensors.get(f"{module}.weight_packed") or checkpoint.tensors.get(f"{module}.weight")
    if suffix != "weight_scale" or codes is None or len(codes.shape) != 2:
        return False
    padded = tuple(swizzled_shape(codes.shape[0], codes.shape[1] * 2 // BLOCK_SIZE))
    return checkpoint.tensors[error.what].shape in (padded, (math.prod(padded),))
