# SPDX-License-Identifier: Apache-2.0
"""What one projection of a checkpoint holds, in numbers that need no decoding of its codes.

Scales are read whole; codes or values only as far as the first row block with anything but zero in it, which in a
sound checkpoint is the first. Scalars are given in decode direction whatever the dialect stores, and as they are:
zero, negative or not finite where that is what the file says.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from ..checkpoints.dialects import Projection
from ..checkpoints.reader import Checkpoint, ExpertEntry
from ..formats.codes import decode_e8m0

_ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class ModuleFacts:
    """One projection: what it is, what it weighs, and its scales (None where the format has none)."""

    prefix: str
    layer: int
    kind: str
    index: int | None
    projection: str
    format: str
    dialect: str
    shape: tuple[int, int]
    nbytes: int
    all_zero: bool
    scale_count: int
    scale_min: float | None
    scale_max: float | None
    nan_scales: int
    negative_scales: int
    global_scale: float | None
    input_scale: float | None

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / max(self.shape[0] * self.shape[1], 1)

    def to_dict(self) -> dict[str, object]:
        return {**asdict(self), "bits_per_weight": self.bits_per_weight}


def gather(checkpoint: Checkpoint, entry: ExpertEntry, name: str) -> ModuleFacts:
    """The facts of one well-formed projection, `entry.projections[name]`.

    Cost: reads its scales (an eighth of the bytes of its codes in NVFP4) and one row block of its codes.
    """
    projection = entry.projections[name]
    scales = _scales(checkpoint, projection)
    usable = scales[~scales.isnan()]
    return ModuleFacts(
        prefix=projection.prefix,
        layer=entry.layer,
        kind=entry.kind,
        index=entry.index,
        projection=name,
        format=projection.format,
        dialect=projection.dialect,
        shape=projection.shape,
        nbytes=_stored_bytes(checkpoint, projection),
        all_zero=_all_zero(checkpoint, projection),
        scale_count=scales.numel(),
        scale_min=float(usable.amin()) if usable.numel() else None,
        scale_max=float(usable.amax()) if usable.numel() else None,
        nan_scales=scales.numel() - usable.numel(),
        negative_scales=int(torch.signbit(usable).sum()),
        global_scale=_scalar(checkpoint, projection, "global_scale"),
        input_scale=_scalar(checkpoint, projection, "input_scale"),
    )


@dataclass(frozen=True)
class FormatTotals:
    """What all projections of one format take together."""

    format: str
    modules: int
    weights: int
    nbytes: int

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / max(self.weights, 1)

    def to_dict(self) -> dict[str, object]:
        return {**asdict(self), "bits_per_weight": self.bits_per_weight}


def totals(checkpoint: Checkpoint) -> list[FormatTotals]:
    """The experts of a checkpoint by format, from headers alone."""
    found: dict[str, FormatTotals] = {}
    for entry in checkpoint.experts:
        for projection in entry.projections.values():
            seen = found.get(projection.format, FormatTotals(projection.format, 0, 0, 0))
            found[projection.format] = FormatTotals(
                projection.format,
                seen.modules + 1,
                seen.weights + projection.shape[0] * projection.shape[1],
                seen.nbytes + _stored_bytes(checkpoint, projection),
            )
    return list(found.values())


def _stored_bytes(checkpoint: Checkpoint, projection: Projection) -> int:
    return sum(checkpoint.tensors[name].nbytes for name in projection.names.values())


def _scales(checkpoint: Checkpoint, projection: Projection) -> Tensor:
    """The block scales as fp32, flat; empty for a format without any."""
    name = projection.names.get("block_scales") or projection.names.get("scales")
    if name is None:
        return torch.empty(0)
    stored = checkpoint.read(name).flatten()
    return decode_e8m0(stored) if stored.dtype in (torch.float8_e8m0fnu, torch.uint8) else stored.float()


def _scalar(checkpoint: Checkpoint, projection: Projection, role: str) -> float | None:
    if role not in projection.names:
        return None
    stored = checkpoint.read(projection.names[role]).reshape(())
    return float(stored.reciprocal() if projection.layout.reciprocal else stored)


def _all_zero(checkpoint: Checkpoint, projection: Projection) -> bool:
    """Whether every code (or value) is zero; reads rows until one is not."""
    name = projection.names.get("codes") or projection.names["values"]
    rows = projection.shape[0]
    for start in range(0, rows, _ROWS_AT_ONCE):
        block = checkpoint.read_rows(name, start, min(start + _ROWS_AT_ONCE, rows))
        magnitudes = block.view(torch.uint8) & 0x77 if "codes" in projection.names else block.float()
        if magnitudes.any():
            return False
    return True
