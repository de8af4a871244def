# SPDX-License-Identifier: Apache-2.0
"""Static activation scales from observed activations.

    amax  = max |v|                          or, with a percentile p, the p-th percentile of |v| in this call
    scale = running max over calls of amax / 2688          (decode direction; 2688 = 6 * 448)

A percentile below 100 lets rare outliers saturate in exchange for finer steps everywhere else.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import CalibrationError, InputError
from ..formats.nvfp4 import global_scale_from_amax


def check_percentile(percentile: float | None) -> None:
    """In (0, 100], or None for the maximum; InputError if not."""
    if percentile is not None and not 0 < percentile <= 100:
        raise InputError("percentile", "must be in (0, 100]", percentile, "use 99.9, or None for the maximum")


def observed_scale(name: str, values: Tensor, percentile: float | None, previous: Tensor | None) -> Tensor:
    """The running static scale after seeing `values`.

    Args:
        name: what the values are, for messages.
        values: any shape, floating.
        percentile: of |values|, in (0, 100]; None is the maximum.
        previous: () fp32 scale from earlier calls, or None.

    Returns:
        () fp32 decode-direction scale.

    Raises:
        CalibrationError: there are no values, all are zero, or one is NaN or infinite; nothing has changed then.
        InputError: percentile outside (0, 100].

    Cost: one pass and one host read (two of each with a percentile).
    """
    check_percentile(percentile)
    magnitudes = values.detach().float().abs().flatten()
    if magnitudes.numel() == 0:
        raise CalibrationError(name, "needs at least one token", "none", "calibrate on text that reaches this layer")
    peak = float(magnitudes.amax())
    if not math.isfinite(peak) or peak == 0:
        raise CalibrationError(name, "must be finite and not all zero", f"amax {peak}", "look at the layer's input")
    amax = magnitudes.amax()
    if percentile is not None and percentile < 100:
        rank = math.ceil(percentile / 100 * magnitudes.numel())
        amax = magnitudes.kthvalue(max(rank, 1)).values
        if amax == 0:
            raise CalibrationError(name, f"percentile {percentile} must not be zero", 0.0, "use a higher percentile")
    scale = global_scale_from_amax(amax)
    return scale if previous is None else torch.maximum(scale, previous)
