# SPDX-License-Identifier: Apache-2.0
"""Two tensors that should be the same, bit for bit: how many values are, and how far apart the others are.

    ulp = how many values of the dtype lie from one to the other, in their order; -0 stands before +0

so 0 is bit-equal and 1 is a neighbour. NaN is equal to NaN, whatever its bits, and on no scale with anything else.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from ..errors import FormatError

_INTEGER = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
_LARGEST_BUCKET = 10
"""Distances above 2^10 are counted together."""


@dataclass(frozen=True)
class Mismatch:
    """The first value that differs, in row-major order; `ulp` is None where one of the two is NaN."""

    token: int
    channel: int
    got: float
    expected: float
    ulp: int | None


@dataclass(frozen=True)
class BitComparison:
    """What `compare_bits` found.

    Args:
        dtype: of both tensors.
        values: how many there are.
        equal: how many are bit-equal.
        histogram: distance in ulp, as "0", "1", "2", "3–4", … -> how many values; NaN against a number is "NaN".
        first: the first that differs; None if none does.
    """

    dtype: str
    values: int
    equal: int
    histogram: dict[str, int] = field(default_factory=dict)
    first: Mismatch | None = None

    @property
    def share(self) -> float:
        """Share of bit-equal values; 1.0 of none."""
        return self.equal / self.values if self.values else 1.0

    def to_dict(self) -> dict[str, object]:
        return {**asdict(self), "share": self.share}


def compare_bits(got: Tensor, expected: Tensor) -> BitComparison:
    """Compare (T, C) tensors of one dtype (bf16, fp16 or fp32), value by value.

    Raises:
        FormatError: shapes or dtypes that differ, or another dtype.

    Cost: a few int64 temporaries on the device of `got`, and syncs.
    """
    if got.shape != expected.shape or got.dtype != expected.dtype or got.ndim != 2 or got.dtype not in _INTEGER:
        texts = [f"{tuple(t.shape)} {t.dtype}" for t in (got, expected)]
        raise FormatError(
            "tensors", "must be (T, C), of one dtype that is bf16, fp16 or fp32", texts, "cast one of them"
        )
    ulp, apart = _ulp(got, expected), got.isnan() != expected.isnan()
    ulp = torch.where(got.isnan() | expected.isnan(), 0, ulp)
    different = (ulp != 0) | apart
    histogram = {}
    for name, low, high in _buckets():
        if count := int(((ulp >= low) & (ulp <= high) & ~apart).sum()):
            histogram[name] = count
    if count := int(apart.sum()):
        histogram["NaN"] = count
    equal = got.numel() - int(different.sum())
    first = None if equal == got.numel() else _first(got, expected, ulp, apart, different)
    return BitComparison(str(got.dtype).removeprefix("torch."), got.numel(), equal, histogram, first)


def _ulp(a: Tensor, b: Tensor) -> Tensor:
    return (_rank(a) - _rank(b)).abs()


def _rank(values: Tensor) -> Tensor:
    """Numbers in the order of the values: negative ones count down from -1, which is -0."""
    bits = values.contiguous().view(_INTEGER[values.dtype])
    rank = bits.long()
    return torch.where(rank < 0, -1 - (rank - torch.iinfo(bits.dtype).min), rank)


def _buckets() -> list[tuple[str, int, int]]:
    """(name, least, largest) of each bucket of distances."""
    powers = [("0", 0, 0), ("1", 1, 1), ("2", 2, 2)]
    powers += [(f"{2 ** (k - 1) + 1}–{2**k}", 2 ** (k - 1) + 1, 2**k) for k in range(2, _LARGEST_BUCKET + 1)]
    return [*powers, (f">{2**_LARGEST_BUCKET}", 2**_LARGEST_BUCKET + 1, 2**62)]


def _first(got: Tensor, expected: Tensor, ulp: Tensor, apart: Tensor, different: Tensor) -> Mismatch:
    index = int(different.flatten().int().argmax())
    token, channel = divmod(index, got.shape[1])
    distance = None if bool(apart[token, channel]) else int(ulp[token, channel])
    return Mismatch(token, channel, float(got[token, channel]), float(expected[token, channel]), distance)
