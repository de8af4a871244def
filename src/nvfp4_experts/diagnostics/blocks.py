# SPDX-License-Identifier: Apache-2.0
"""What each layer's experts are stored as, and what loading makes of the shared one; from headers alone.

layer | routed            | shared                       | shared="nvfp4"       | shared="keep"
3     | 256 nvfp4         | fp8_block 128x128, e8m0      | quantised to nvfp4   | kept: 1.00 bytes a weight, ...
mtp 0 | 256 mxfp4         | fp8_block 128x128, e8m0      | not loaded           | not loaded
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass

from ..checkpoints.dialects import Projection
from ..checkpoints.load import is_fp4
from ..checkpoints.reader import Checkpoint, ExpertEntry

NOT_LOADED = "not loaded"


@dataclass(frozen=True)
class BlockFormats:
    """The experts of one layer, and what becomes of the shared one; None where there is none.

    layer: number as in the names; of an MTP layer, as in `mtp.N` or in the layers' own.
    routed: formats, each with its number of experts: "256 nvfp4".
    """

    layer: int
    is_mtp: bool
    routed: str | None
    shared: str | None
    under_nvfp4: str | None
    under_keep: str | None

    @property
    def formats(self) -> tuple[str | None, ...]:
        """Everything but the layer: what layers in a row may have in common."""
        return self.routed, self.shared, self.under_nvfp4, self.under_keep

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def block_formats(checkpoint: Checkpoint, layers: list[int] | None = None) -> list[BlockFormats]:
    """Every layer that has experts, and then every MTP layer; or of `layers` alone, without MTP."""
    own = [entry for entry in checkpoint.experts if layers is None or entry.layer in layers]
    mtp = checkpoint.mtp_experts if layers is None else []
    return [
        _block(checkpoint, [entry for entry in entries if entry.layer == layer], layer, is_mtp)
        for is_mtp, entries in ((False, own), (True, mtp))
        for layer in sorted({entry.layer for entry in entries})
    ]


def _block(checkpoint: Checkpoint, entries: list[ExpertEntry], layer: int, is_mtp: bool) -> BlockFormats:
    by_kind = {
        kind: [_format(checkpoint, entry) for entry in entries if entry.kind == kind] for kind in ("routed", "shared")
    }
    routed = ", ".join(f"{count} {name}" for name, count in Counter(by_kind["routed"]).items()) or None
    shared = " and ".join(by_kind["shared"]) or None
    outcomes: tuple[str | None, str | None] = (None, None)
    if shared is not None:
        outcomes = (
            (NOT_LOADED, NOT_LOADED)
            if is_mtp
            else _outcomes(checkpoint, next(e for e in entries if e.kind == "shared"))
        )
    return BlockFormats(layer, is_mtp, routed, shared, *outcomes)


def _outcomes(checkpoint: Checkpoint, entry: ExpertEntry) -> tuple[str, str]:
    """What `load_moe` does with a shared expert under "nvfp4" and under "keep"."""
    if entry.problems:
        return "refused", "refused"
    if is_fp4(entry):
        how = "nvfp4 as stored" if _format(checkpoint, entry) == "nvfp4" else "cast exactly to nvfp4"
        return how, how
    formats = {_projection_format(checkpoint, p) for p in entry.projections.values()}
    weights = sum(p.shape[0] * p.shape[1] for p in entry.projections.values())
    stored = sum(checkpoint.info(name).nbytes for p in entry.projections.values() for name in p.names.values())
    kept = f"kept, {stored / weights:.3g} bytes a weight, bf16 activations"
    return "quantised to nvfp4", kept if len(formats) == 1 else "refused: projections of several formats"


def _format(checkpoint: Checkpoint, entry: ExpertEntry) -> str:
    formats = dict.fromkeys(_projection_format(checkpoint, p) for p in entry.projections.values())
    return " + ".join(formats) if formats and not entry.problems else "malformed"


def _projection_format(checkpoint: Checkpoint, projection: Projection) -> str:
    if projection.block is None:
        return projection.format
    scales = {"F8_E8M0": "e8m0"}.get(checkpoint.info(projection.names["scales"]).dtype, "fp32")
    return f"{projection.format} {projection.block[0]}x{projection.block[1]}, {scales} scales"
