# SPDX-License-Identifier: Apache-2.0
"""Loads a projection, whole or by rows, as the format class of `nvfp4_experts.formats` that it is stored in.

    bf16, fp16, fp32 -> Tensor    fp8_block -> Fp8BlockTensor    mxfp4 -> Mxfp4Tensor    nvfp4 -> Nvfp4Tensor

Reading NVFP4 refuses a global scale that cannot be meant. 6 * max(block_scales) * global_scale bounds the largest
decoded weight. In decode direction it is the tensor's amax to within a rounding, and trained weights rarely reach
100; stored the wrong way round the scale is 2688 / amax, and with block scales that reach 448 (as in every recipe
whose amax is the tensor's own) the bound is 2688^2 / amax, above 2^15 for every amax below 220. `MAX_SANE_WEIGHT`
= 2^15 lies between: no sane checkpoint is refused, and no reciprocal one of sane weights is let through.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..formats.codes import E2M1_MAX
from ..formats.fp8_block import Fp8BlockTensor
from ..formats.mxfp4 import Mxfp4Tensor
from ..formats.nvfp4 import Nvfp4Tensor
from .dialects import Projection
from .errors import InvalidScaleError, SuspiciousScaleError
from .reader import Checkpoint

MAX_SANE_WEIGHT = 2.0**15

Loaded = Tensor | Fp8BlockTensor | Mxfp4Tensor | Nvfp4Tensor


def load_projection(checkpoint: Checkpoint, projection: Projection, start: int = 0, stop: int | None = None) -> Loaded:
    """A projection, or its rows [start, stop), as it is stored; nothing is converted.

    Args:
        start: first row; for FP8 a multiple of the block's height.
        stop: row after the last; default all.

    Raises:
        InvalidScaleError: an NVFP4 global scale that is not positive and finite.
        SuspiciousScaleError: one under which weights would exceed `MAX_SANE_WEIGHT`.

    Numerics: a reciprocal global scale (compressed-tensors) becomes 1 / g, rounded once to fp32.

    Cost: reads those rows only.
    """
    stop = projection.shape[0] if stop is None else stop

    def rows(role: str, height: int = 1) -> Tensor:
        return checkpoint.read_rows(projection.names[role], start // height, -(-stop // height))

    if projection.format == "fp8_block":
        assert projection.block is not None and start % projection.block[0] == 0
        scales = rows("scales", projection.block[0])
        scales = scales.view(torch.uint8) if scales.dtype == torch.float8_e8m0fnu else scales
        return Fp8BlockTensor(rows("values"), scales, projection.block)
    if projection.format == "mxfp4":
        return Mxfp4Tensor(rows("codes").view(torch.uint8), rows("scales").view(torch.uint8))
    if projection.format == "nvfp4":
        loaded = Nvfp4Tensor(rows("codes"), rows("block_scales"), load_global_scale(checkpoint, projection))
        check_global_scale(projection, loaded)
        return loaded
    return rows("values")


def load_global_scale(checkpoint: Checkpoint, projection: Projection) -> Tensor:
    """The fp32 () global scale of an NVFP4 projection, in decode direction."""
    return torch.tensor(_read_scale(checkpoint, projection, "global_scale"), dtype=torch.float32)


def projection_input_scale(checkpoint: Checkpoint, projection: Projection) -> float | None:
    """The static scale of what enters this projection (amax / 2688, decode direction), None if there is none."""
    return _read_scale(checkpoint, projection, "input_scale") if "input_scale" in projection.names else None


def _read_scale(checkpoint: Checkpoint, projection: Projection, role: str) -> float:
    name = projection.names[role]
    stored = checkpoint.read(name).reshape(())
    value = (stored.reciprocal() if projection.layout.reciprocal else stored).item()
    if not (math.isfinite(value) and value > 0):
        rule = "a scale must be positive and finite, and so must its reciprocal"
        raise InvalidScaleError(name, rule, stored.item(), "calibrate or export the checkpoint again")
    return value


def check_global_scale(projection: Projection, weight: Nvfp4Tensor) -> None:
    """Raise `SuspiciousScaleError` if the largest value `weight` could hold is absurd for a weight."""
    largest = weight.block_scales.float().abs().nan_to_num(0.0).max() * E2M1_MAX * weight.global_scale
    if largest > MAX_SANE_WEIGHT:
        rule = f"decoded weights must lie below {MAX_SANE_WEIGHT:.0f}"
        got = f"up to {largest.item():.3g}, which looks like a global scale stored as its reciprocal"
        stored = "2688 / amax" if projection.layout.reciprocal else "amax / 2688"
        way_out = f"{projection.dialect} stores {stored}; export the checkpoint again"
        raise SuspiciousScaleError(projection.names["global_scale"], rule, got, way_out)
