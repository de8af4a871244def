# SPDX-License-Identifier: Apache-2.0
"""What a benchmark found: where, against which ceilings, and one row per candidate and number of tokens.

A row has a time only if the candidate passed its check; otherwise `status` says what became of it:

    timed         checked, then timed
    failed        its outputs are wrong (or, for one of ours, it crashed); no number of tokens of it is timed
    unavailable   it cannot run here, or not this number of tokens; `reason` says why
"""

from __future__ import annotations

import csv
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from .ceilings import Ceilings
from .machine import Machine
from .work import MoeWork, Work


@dataclass(frozen=True)
class Row:
    """One candidate at one number of tokens; times in microseconds per call.

    Args:
        candidate, ours, detail: who, whether it is this library's, and what ran.
        tokens: T.
        status, reason: see the module docstring; reason is None for "timed".
        median_us, low_us, high_us: median and quartiles over `samples` samples.
        samples: how many samples.
        floor_us: max(bytes / read ceiling, operations / matmul ceiling).
        times_floor: median_us / floor_us.
        rel_l2, bound: distance from `kernels/reference.py` on fresh input, and the largest allowed.
        resident_bytes: bytes of one copy of the weights.
        copies: how many copies the calls cycle through.
        hits: of a mixture of experts: distinct routed experts that a call reads, mean over the chain.
    """

    candidate: str
    ours: bool
    detail: str
    tokens: int
    status: str
    reason: str | None
    floor_us: float
    median_us: float | None = None
    low_us: float | None = None
    high_us: float | None = None
    samples: int = 0
    times_floor: float | None = None
    rel_l2: float | None = None
    bound: float | None = None
    resident_bytes: int | None = None
    copies: int = 0
    hits: float | None = None


@dataclass(frozen=True)
class BenchReport:
    """One run of the benchmark, with all it takes to read it a year later."""

    version: str
    date: str
    command: str
    machine: Machine
    work: Work | MoeWork
    swiglu_limit: float
    rotation_bytes: int
    ceilings: Ceilings
    rows: tuple[Row, ...]

    @property
    def passed(self) -> bool:
        """Whether none of this library's candidates failed."""
        return not any(row.ours and row.status == "failed" for row in self.rows)

    @property
    def candidates(self) -> tuple[str, ...]:
        """Names, in order."""
        return tuple(dict.fromkeys(row.candidate for row in self.rows))

    @property
    def tokens(self) -> tuple[int, ...]:
        """Numbers of tokens, in order."""
        return tuple(dict.fromkeys(row.tokens for row in self.rows))

    def of(self, candidate: str) -> tuple[Row, ...]:
        """The rows of one candidate."""
        return tuple(row for row in self.rows if row.candidate == candidate)

    def to_dict(self) -> dict[str, object]:
        rest = asdict(self)
        del rest["work"]
        return {**self.work.to_dict(), **rest, "passed": self.passed}

    def write_csv(self, path: str | Path) -> None:
        """Write the rows as CSV, one header line, columns named as in `Row`; what is not there is empty."""
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(Row)])
            writer.writeheader()
            writer.writerows(asdict(row) for row in self.rows)
