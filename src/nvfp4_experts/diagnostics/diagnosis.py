# SPDX-License-Identifier: Apache-2.0
"""A guess at what is wrong with an expert whose weights are far from the original's: undo a known mistake, look again.

Each known mistake has a way to undo it. A hint is given where the weight error (rel-L2) is beyond SUSPICIOUS as the
weights stand and falls below it when the mistake is undone; a constant factor, which may be as small as 3 %, is
looked for by least squares.

    factor = <original, actual> / <actual, actual>        1 for faithful weights, within about 1 %
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..formats.nvfp4 import Nvfp4Tensor
from ..layouts.scales import swizzled_shape, unswizzle_scales
from .metrics import rel_l2
from .weights import Weight, values

# NVFP4 of a Gaussian is 0.095 from it; unrelated weights of one size are 1.41 apart.
SUSPICIOUS = 0.3
# Quantisation alone moves the least-squares factor by its squared error, 0.009.
_FACTOR_TOLERANCE = 0.03


def diagnose(actual: dict[str, Weight], truth: dict[str, Tensor]) -> list[str]:
    """Hints about one expert, as sentences; none for weights that are what they should be.

    Args:
        actual: gate, up and down by name, as they are stored.
        truth: the original's fp32 values, the same names and shapes.

    Cost: two decodes of each projection, one at a time; a few more of a suspicious one.
    """
    errors = {name: rel_l2(values(weight), truth[name]) for name, weight in actual.items()}
    exchanged = _exchanged(actual, truth, errors)
    if exchanged:
        return exchanged
    return [hint for name, weight in actual.items() for hint in _hints(name, weight, truth[name], errors[name])]


def _exchanged(actual: dict[str, Weight], truth: dict[str, Tensor], errors: dict[str, float]) -> list[str]:
    before = max(errors["gate"], errors["up"])
    if not before > SUSPICIOUS:
        return []
    after = max(rel_l2(values(actual["gate"]), truth["up"]), rel_l2(values(actual["up"]), truth["gate"]))
    return [_sentence("gate and up look exchanged", before, after, "when exchanged")] if after < SUSPICIOUS else []


def _hints(name: str, weight: Weight, truth: Tensor, error: float) -> list[str]:
    if isinstance(weight, Nvfp4Tensor) and error > SUSPICIOUS:
        for mistake, undone, undo in _MISTAKES:
            corrected = undo(weight)
            if corrected is not None and (after := rel_l2(values(corrected), truth)) < SUSPICIOUS:
                return [_sentence(f"{name}: {mistake}", error, after, undone)]
    stored = values(weight)
    energy = float(stored.square().sum(dtype=torch.float64))
    factor = float((stored * truth).sum(dtype=torch.float64)) / energy if energy else 0.0
    after = rel_l2(stored * factor, truth)
    if abs(factor - 1) > _FACTOR_TOLERANCE and after < min(error, SUSPICIOUS):
        return [_sentence(f"{name}: off by a constant factor", error, after, f"when multiplied by {factor:.4g}")]
    return []


def _sentence(mistake: str, before: float, after: float, undone: str) -> str:
    return f"{mistake}: error drops from {before:.3g} to {after:.2g} {undone}"


def _swap_nibbles(weight: Nvfp4Tensor) -> Nvfp4Tensor:
    return replace(weight, codes=(weight.codes << 4) | (weight.codes >> 4))


def _unswizzle(weight: Nvfp4Tensor) -> Nvfp4Tensor | None:
    rows, columns = weight.block_scales.shape
    if tuple(swizzled_shape(rows, columns)) != (rows, columns):
        return None
    linear = unswizzle_scales(weight.block_scales.view(torch.uint8), rows, columns)
    return replace(weight, block_scales=linear.view(torch.float8_e4m3fn))


_Undo = Callable[[Nvfp4Tensor], Nvfp4Tensor | None]

_MISTAKES: tuple[tuple[str, str, _Undo], ...] = (
    ("codes look packed with the odd k in the low nibble", "when nibbles are exchanged", _swap_nibbles),
    ("block scales look swizzled", "when unswizzled", _unswizzle),
)
