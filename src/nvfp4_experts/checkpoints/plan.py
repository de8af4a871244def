# SPDX-License-Identifier: Apache-2.0
"""Plans a conversion from headers alone: which bytes each output file will hold, before one of them is written.

every source shard -> one output shard of the same name
a weight to convert -> NVFP4 tensors in the shard where its weight lies (its scales may have lain in another)
every other tensor  -> the same bytes, in the shard where it lies
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .._version import __version__
from ..errors import InputError
from ..formats.nvfp4 import RECIPES
from .dialects import NVFP4_LAYOUTS, OUTPUT_DIALECTS, Projection, output_specs
from .errors import NothingToConvertError
from .input_scales import Expert, InputScales, check_experts, check_input_scales
from .reader import SINGLE_FILE, Checkpoint, ExpertEntry
from .safetensors_file import TensorInfo, TensorSpec

EXPERTS = ("shared", "routed", "all")
SHARED = ("nvfp4", "keep")


def check_shared(shared: str) -> None:
    """Raise InputError for what is no way to treat shared experts."""
    if shared not in SHARED:
        raise InputError("shared", f"must be one of {', '.join(SHARED)}", repr(shared), "pick one of them")


@dataclass(frozen=True)
class Options:
    """What the caller of `convert` chose."""

    dialect: str
    experts: str
    recipe: str
    separate_scales: bool
    input_scales: InputScales
    shared: str = "nvfp4"

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of experts that are converted."""
        kinds = ("shared", "routed") if self.experts == "all" else (self.experts,)
        return tuple(kind for kind in kinds if kind != "shared" or self.shared != "keep")

    def __post_init__(self) -> None:
        check_shared(self.shared)
        for name, allowed in (("dialect", OUTPUT_DIALECTS), ("experts", EXPERTS), ("recipe", RECIPES)):
            if getattr(self, name) not in allowed:
                rule, got = f"must be one of {', '.join(allowed)}", repr(getattr(self, name))
                raise InputError(name, rule, got, "pick one of them")
        if not self.kinds:
            what, rule = "experts='shared' and shared='keep'", "must leave something to convert"
            raise InputError(what, rule, "nothing", "choose experts='all' or 'routed'")
        object.__setattr__(self, "input_scales", check_input_scales("input_scales", self.input_scales))


@dataclass(frozen=True)
class WeightPlan:
    """One weight to be written as NVFP4: where it comes from, what it replaces and what it becomes.

    outputs: by role. A weight that is NVFP4 in this dialect already is given an input scale and nothing else.
    partner: up for gate and gate for up, where the two are to share one global scale; None otherwise.
    input_scale: a given static scale (decode direction); None keeps the source's, if `outputs` has the role.
    """

    source: Projection
    partner: Projection | None
    outputs: dict[str, TensorSpec]
    input_scale: float | None

    @property
    def replaced(self) -> list[str]:
        """The names of the source tensors that are not copied."""
        roles = self.source.names.keys() if "codes" in self.outputs else self.outputs.keys()
        return [self.source.names[role] for role in roles if role in self.source.names]


@dataclass(frozen=True)
class ShardPlan:
    """One output file: tensors copied, weights converted, metadata kept."""

    name: str
    copies: list[TensorInfo]
    weights: list[WeightPlan]
    metadata: dict[str, str]

    @property
    def specs(self) -> list[TensorSpec]:
        """Everything the file will hold."""
        made = [spec for weight in self.weights for spec in weight.outputs.values()]
        return [TensorSpec(info.name, info.dtype, info.shape) for info in self.copies] + made


@dataclass(frozen=True)
class Plan:
    """A whole conversion. `fingerprint` changes with the source, the options and the version of this package."""

    checkpoint: Checkpoint
    options: Options
    shards: list[ShardPlan]
    fingerprint: str

    @property
    def weights(self) -> Iterator[WeightPlan]:
        """Every weight that is converted."""
        return (weight for shard in self.shards for weight in shard.weights)

    @property
    def tensors(self) -> dict[str, TensorSpec]:
        """Every tensor of the output, by name."""
        return {spec.name: spec for shard in self.shards for spec in shard.specs}


def make_plan(checkpoint: Checkpoint, options: Options, other_files: Sequence[str] = ()) -> Plan:
    """The plan of a conversion; `other_files` of the source are those that will be copied as they are.

    Raises:
        InputScalesError: scales for an expert that is not there, or not converted.
        NothingToConvertError: no expert of the kind asked for, or each is already what was asked for.
        WrongShapeError: a K that is not a multiple of 16.
        Any problem of a selected expert, as `ExpertEntry.check` raises it.
    """
    scales = options.input_scales
    check_experts(scales, {_expert(entry): entry.kind in options.kinds for entry in checkpoint.experts})
    entries = [e.check() for e in checkpoint.experts if e.kind in options.kinds]
    weights = [weight for entry in entries for weight in _plan_expert(entry, options, scales)]
    if not weights:
        rule = f"{' and '.join(options.kinds)} experts that are not yet NVFP4 in the {options.dialect} dialect"
        raise NothingToConvertError(
            str(checkpoint.path), rule, f"none of {len(entries)}", "choose other experts or dialect"
        )

    taken = {name for weight in weights for name in weight.replaced}
    copies: dict[str, list[TensorInfo]] = {shard: [] for shard in checkpoint.shards}
    for info in checkpoint.tensors.values():
        if info.name not in taken:
            copies[info.shard].append(info)
    made: dict[str, list[WeightPlan]] = {shard: [] for shard in checkpoint.shards}
    for weight in weights:
        made[checkpoint.tensors[_weight_name(weight.source)].shard].append(weight)
    single = not checkpoint.path.is_dir()
    shards = [
        ShardPlan(SINGLE_FILE if single else shard, copies[shard], made[shard], checkpoint.metadata[shard])
        for shard in checkpoint.shards
        if copies[shard] or made[shard]  # a shard that held only scales of converted weights disappears
    ]
    return Plan(checkpoint, options, shards, _fingerprint(checkpoint, options, other_files))


def _weight_name(projection: Projection) -> str:
    return projection.names[next(iter(projection.layout.roles))]


def _expert(entry: ExpertEntry) -> Expert:
    return entry.layer if entry.index is None else (entry.layer, entry.index)


def _plan_expert(entry: ExpertEntry, options: Options, scales: InputScales) -> Iterator[WeightPlan]:
    given = scales.get(_expert(entry))
    for name, source in entry.projections.items():
        input_scale = None if given is None else given[name == "down"]
        has_input_scale = input_scale is not None or "input_scale" in source.names
        outputs = output_specs(options.dialect, source.prefix, source.shape, has_input_scale)
        if source.layout is NVFP4_LAYOUTS[options.dialect]:
            if input_scale is None:
                continue
            outputs = {"input_scale": outputs["input_scale"]}
        other = entry.projections.get({"gate": "up", "up": "gate"}.get(name, ""))
        shares = other is not None and not options.separate_scales and _family(source) == _family(other) != "nvfp4"
        yield WeightPlan(source, other if shares else None, outputs, input_scale)


def _family(projection: Projection) -> str:
    """Formats that can share a global scale: anything that is quantised, or anything that is cast exactly."""
    return projection.format if projection.format in ("mxfp4", "nvfp4") else "floating"


def _fingerprint(checkpoint: Checkpoint, options: Options, other_files: Sequence[str]) -> str:
    files = []
    for name in (*checkpoint.shards, *other_files):
        stat = (checkpoint.directory / name).stat()
        files.append((name, stat.st_size, stat.st_mtime_ns))
    tensors = [(i.name, i.dtype, i.shape, i.shard, i.start, i.stop) for i in checkpoint.tensors.values()]
    chosen = {**vars(options), "input_scales": list(options.input_scales.items())}
    described = [
        __version__,
        chosen,
        files,
        tensors,
        checkpoint.metadata,
        checkpoint.config,
        checkpoint.modelopt_config,
    ]
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
