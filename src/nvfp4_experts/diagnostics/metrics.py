# SPDX-License-Identifier: Apache-2.0
"""How far two tensors are apart, and what one tensor looks like, in a handful of numbers.

    rel_l2    = ||actual - expected|| / ||expected||        0 = equal, 1 = nothing right, 1.41 = unrelated
    max_error = max |actual - expected|                     in the unit of the tensors
    sqnr_db   = -20 log10(rel_l2)                           decibels, +inf = equal

Norms are summed in fp64. NaN anywhere gives NaN everywhere: it never passes a bound, because every
comparison with NaN is false.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from ..errors import FormatError


@dataclass(frozen=True)
class ErrorFigures:
    """The three distances between a tensor and what it should be."""

    rel_l2: float
    max_error: float
    sqnr_db: float

    def within(self, bound: float) -> bool:
        """Whether rel_l2 is at most `bound`; false when it is NaN."""
        return self.rel_l2 <= bound

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True)
class TensorStatistics:
    """What one tensor looks like: its size, its spread, and what is not a number in it."""

    shape: tuple[int, ...]
    rms: float
    amax: float
    nan_count: int
    inf_count: int

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def rel_l2(actual: Tensor, expected: Tensor) -> float:
    """Relative L2 error, ||actual - expected|| / ||expected||.

    Args:
        actual, expected: same shape, any floating dtype; compared in fp32, summed in fp64.

    Returns:
        0.0 for equal tensors (also two zero or empty ones), inf when only `expected` is zero, NaN for NaN.
    """
    return _ratio(_norm(_difference(actual, expected)), _norm(expected.float()))


def max_error(actual: Tensor, expected: Tensor) -> float:
    """Largest |actual - expected|; 0.0 for empty tensors, NaN for NaN."""
    return _amax(_difference(actual, expected))


def sqnr_db(actual: Tensor, expected: Tensor) -> float:
    """Signal to quantisation noise ratio in decibels, -20 log10(rel_l2); +inf for equal tensors."""
    return _decibels(rel_l2(actual, expected))


def compare(actual: Tensor, expected: Tensor) -> ErrorFigures:
    """All three distances in one pass over the difference.

    Raises:
        FormatError: the shapes differ.

    Cost: one fp32 tensor of the size of the input, one device sync per figure.
    """
    difference = _difference(actual, expected)
    relative = _ratio(_norm(difference), _norm(expected.float()))
    return ErrorFigures(relative, _amax(difference), _decibels(relative))


def statistics(x: Tensor) -> TensorStatistics:
    """Shape, root mean square, largest magnitude (both of the finite values), and the count of NaN and inf."""
    x = x.detach().float()
    finite = x[torch.isfinite(x)]
    return TensorStatistics(
        shape=tuple(x.shape),
        rms=_norm(finite) / math.sqrt(max(finite.numel(), 1)),
        amax=_amax(finite),
        nan_count=int(x.isnan().sum()),
        inf_count=int(x.isinf().sum()),
    )


def _difference(actual: Tensor, expected: Tensor) -> Tensor:
    if actual.shape != expected.shape:
        raise FormatError(
            "actual",
            f"must have the shape of expected {tuple(expected.shape)}",
            tuple(actual.shape),
            "compare like with like",
        )
    return actual.float() - expected.float()


def _norm(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64))


def _amax(x: Tensor) -> float:
    return float(x.abs().amax()) if x.numel() else 0.0


def _ratio(error: float, signal: float) -> float:
    if error == 0.0:
        return 0.0
    return error / signal if signal else math.inf * error


def _decibels(relative: float) -> float:
    if relative == 0.0:
        return math.inf
    return -20 * math.log10(relative)
