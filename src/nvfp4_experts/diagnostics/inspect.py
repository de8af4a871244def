# SPDX-License-Identifier: Apache-2.0
"""What is in a checkpoint, and everything about it that is not as it should be.

A path goes in; modules with their formats, sizes and scale ranges, and anomalies by name, come out. Nothing in the
checkpoint raises: a file that cannot be opened gives a report whose only content is that anomaly. Only a path that is
no checkpoint at all (or a hub id that cannot be fetched) raises.

What a file cannot show is not seen: gate and up stored under each other's names, a permutation of codes or of scales
that keeps the shape (swizzled scales too, where N is a multiple of 128 and K of 64), a scale that is merely wrong.
`verify` sees those, given the original.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

from ..checkpoints.errors import HubError, NotACheckpointError
from ..checkpoints.reader import Checkpoint, ExpertEntry, open_checkpoint
from ..errors import CheckpointError, InputError
from .anomalies import CHECKPOINT_RULES, EXPERT_RULES, MODULE_RULES, SEVERITIES, Anomaly, from_error
from .blocks import BlockFormats, block_formats
from .facts import ModuleFacts, gather

ProgressCallback = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Group:
    """The well-formed projections of one format among the experts of one kind in one layer."""

    layer: int
    kind: str
    format: str
    dialect: str
    experts: int
    projections: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    nbytes: int
    bits_per_weight: float
    scale_min: float | None
    scale_max: float | None
    global_scale_min: float | None
    global_scale_max: float | None
    input_scales: int

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


@dataclass(frozen=True)
class InspectionReport:
    """The contents of a checkpoint; see `inspect_checkpoint`."""

    path: str
    dialect: str | None = None
    swiglu_limit: float | None = None
    shards: int = 0
    tensors: int = 0
    nbytes: int = 0
    expert_bytes: int = 0
    dtypes: dict[str, int] = field(default_factory=dict)
    blocks: list[BlockFormats] = field(default_factory=list)
    modules: list[ModuleFacts] = field(default_factory=list)
    anomalies: list[Anomaly] = field(default_factory=list)

    @property
    def groups(self) -> list[Group]:
        """Modules of one layer, kind and format together, so that 384 routed experts are one group."""
        together: dict[tuple[int, bool, str, str], list[ModuleFacts]] = {}
        for module in self.modules:
            key = (module.layer, module.kind == "routed", module.format, module.dialect)
            together.setdefault(key, []).append(module)
        return [_group(together[key]) for key in sorted(together)]

    def count(self, severity: str) -> int:
        """How many anomalies have this severity."""
        return sum(anomaly.severity == severity for anomaly in self.anomalies)

    def to_dict(self) -> dict[str, object]:
        return {
            "path": self.path, "dialect": self.dialect, "swiglu_limit": self.swiglu_limit, "shards": self.shards,
            "tensors": self.tensors, "nbytes": self.nbytes, "expert_bytes": self.expert_bytes, "dtypes": self.dtypes,
            "blocks": [block.to_dict() for block in self.blocks],
            "groups": [group.to_dict() for group in self.groups],
            "modules": [module.to_dict() for module in self.modules],
            "anomalies": [anomaly.to_dict() for anomaly in self.anomalies],
            "counts": {severity: self.count(severity) for severity in SEVERITIES},
        }  # fmt: skip


def inspect_checkpoint(
    path: str, *, layers: list[int] | None = None, progress: ProgressCallback | None = None
) -> InspectionReport:
    """Look into a checkpoint.

    Args:
        path: a directory, a .safetensors file or a hub id.
        layers: look into the experts of these alone; None is all.
        progress: called with (experts done, experts in all, prefix).

    Raises:
        NotACheckpointError, HubError: there is nothing to inspect.
        InputError: a layer that has no expert.

    Cost: reads headers, every scale of the chosen experts, and a row block of each one's codes.
    """
    try:
        checkpoint = open_checkpoint(path)
        experts = [entry for entry in checkpoint.experts if layers is None or entry.layer in layers]
        limit = checkpoint.swiglu_limit
    except (NotACheckpointError, HubError):
        raise
    except CheckpointError as error:
        return InspectionReport(str(path), anomalies=[from_error(error)])
    known = sorted({entry.layer for entry in checkpoint.experts})
    if absent := sorted(set(layers or ()) - set(known)):
        raise InputError("layers", f"must have experts, as {known} do", absent, "choose from these")
    modules: list[ModuleFacts] = []
    anomalies = [anomaly for rule in CHECKPOINT_RULES for anomaly in rule.check(checkpoint)]
    for done, entry in enumerate(experts):
        if progress:
            progress(done, len(experts), entry.prefix)
        facts, found = _look_at(checkpoint, entry)
        modules += facts
        anomalies += found
    return InspectionReport(
        str(path),
        dialect=checkpoint.dialect,
        swiglu_limit=limit,
        shards=len(checkpoint.shards),
        tensors=len(checkpoint.tensors),
        nbytes=sum(info.nbytes for info in checkpoint.tensors.values()),
        expert_bytes=sum(module.nbytes for module in modules),
        dtypes=_bytes_by_dtype(checkpoint),
        blocks=block_formats(checkpoint, layers),
        modules=modules,
        anomalies=sorted(anomalies, key=lambda anomaly: SEVERITIES.index(anomaly.severity)),
    )


def _look_at(checkpoint: Checkpoint, entry: ExpertEntry) -> tuple[list[ModuleFacts], list[Anomaly]]:
    anomalies = [from_error(problem, checkpoint) for problem in entry.problems]
    try:
        facts = {name: gather(checkpoint, entry, name) for name in entry.projections}
    except CheckpointError as error:  # the file changed, or shrank, since it was opened
        return [], [*anomalies, from_error(error)]
    anomalies += [found for rule in MODULE_RULES for module in facts.values() for found in rule.check(module)]
    anomalies += [found for rule in EXPERT_RULES for found in rule.check(facts)]
    return list(facts.values()), anomalies


def _bytes_by_dtype(checkpoint: Checkpoint) -> dict[str, int]:
    total: Counter[str] = Counter()
    for info in checkpoint.tensors.values():
        total[info.dtype] += info.nbytes
    return dict(total.most_common())


def _group(modules: list[ModuleFacts]) -> Group:
    first = modules[0]
    weights = sum(module.shape[0] * module.shape[1] for module in modules)
    nbytes = sum(module.nbytes for module in modules)
    scales = [value for m in modules for value in (m.scale_min, m.scale_max) if value is not None]
    global_scales = [m.global_scale for m in modules if m.global_scale is not None]
    return Group(
        layer=first.layer,
        kind=first.kind,
        format=first.format,
        dialect=first.dialect,
        experts=len({module.index for module in modules}),
        projections=tuple(dict.fromkeys(module.projection for module in modules)),
        shapes=tuple(dict.fromkeys(module.shape for module in modules)),
        nbytes=nbytes,
        bits_per_weight=8 * nbytes / max(weights, 1),
        scale_min=min(scales, default=None),
        scale_max=max(scales, default=None),
        global_scale_min=min(global_scales, default=None),
        global_scale_max=max(global_scales, default=None),
        input_scales=sum(module.input_scale is not None for module in modules),
    )
