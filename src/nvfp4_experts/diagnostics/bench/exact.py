# SPDX-License-Identifier: Apache-2.0
"""What `bench --report` writes: one file that says where it ran, what can run there, how right and how fast it is.

    machine       device, driver, versions, operating system
    capabilities  every backend and tier, and why not
    exact         whether this device's exact sums are those of its CPU, and what computes them
    exactness     each backend that takes nvfp4, against backend "exact", bit for bit, on a few shapes
    bench         the benchmark's own report: checks and times of every candidate

The shapes are few and the rows few, so that it costs seconds; random weights and hidden states are those of `work`.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from ...formats.activations import quantize_activation
from ...formats.codes import BLOCK_SIZE
from ...kernels.dispatch import ACTIVATION_SCALES
from ...kernels.exact import rule
from ..bits import BitComparison, compare_bits
from ..capabilities import describe_capabilities
from ..exactness import Exactness, compare_with_exact
from .candidates import Candidate, Ours
from .measure import brief
from .report import BenchReport
from .work import HIDDEN_SCALE, INPUT_SCALE, SWIGLU_LIMIT, Weights, Work, find_work

FORMAT = 1
CASES: dict[str, tuple[int, ...]] = {"272x144": (1, 7, 64), "1024x512": (1, 16, 64), "V4-Flash": (16,)}
"""Shapes and their numbers of tokens: odd multiples of 16, a small layer, one of a real size."""


@dataclass(frozen=True)
class Case:
    """One comparison, or the reason why there is none; `backend` is as asked for, "auto" included."""

    backend: str
    shape: str
    tokens: int
    activation_scale: str
    found: Exactness | None
    reason: str | None

    def to_dict(self) -> dict[str, object]:
        return {**asdict(self), "found": None if self.found is None else self.found.to_dict()}


@dataclass(frozen=True)
class ExactSection:
    """`form`: what computes the exact sums on this device; `against_cpu`: their bits against those of its CPU."""

    form: str
    against_cpu: BitComparison
    cases: tuple[Case, ...]


def measure_exactness(candidates: Sequence[Candidate], device: torch.device) -> ExactSection:
    """Compare every backend among candidates that takes nvfp4 with "exact", in every activation scale mode.

    Cost: CASES say how much; on two CPU cores with the native library some 20 seconds a backend.
    """
    backends = dict.fromkeys(c.backend for c in candidates if isinstance(c, Ours) and c.activations == "nvfp4")
    cases = []
    for shape, counts in CASES.items():
        work = find_work(shape)
        weights = work.weights(device)
        cases += [
            _case(backend, work, weights, tokens, mode)
            for tokens in counts
            for mode in ACTIVATION_SCALES
            for backend in backends
        ]
    return ExactSection(rule.form(device), _against_cpu(device), tuple(cases))


def report_to_dict(report: BenchReport, section: ExactSection) -> dict[str, object]:
    """The whole file."""
    return {
        "format": FORMAT,
        "machine": {**report.machine.to_dict(), "system": platform.platform(), "nvfp4-experts": report.version},
        "capabilities": describe_capabilities().to_dict(),
        "exact": {"form": section.form, "against_cpu": section.against_cpu.to_dict()},
        "exactness": [case.to_dict() for case in section.cases],
        "bench": report.to_dict(),
    }


def _case(backend: str, work: Work, w: Weights, tokens: int, mode: str) -> Case:
    x = work.check_states(tokens, w.gate.device)
    try:
        found = compare_with_exact(w.gate, w.up, w.down, x, mode, backend, SWIGLU_LIMIT, INPUT_SCALE, HIDDEN_SCALE)
    except Exception as error:  # the file is for learning what goes wrong elsewhere
        return Case(backend, work.shape, tokens, mode, None, brief(error))
    return Case(backend, work.shape, tokens, mode, found, None)


def _against_cpu(device: torch.device) -> BitComparison:
    """Sums over K = 1040 of 33 tokens and 129 rows, whose block scales span all that e4m3 has."""
    g = torch.Generator().manual_seed(0)
    columns = 65 * BLOCK_SIZE
    sides = []
    for rows in (33, 129):
        values = torch.randn(rows, columns // BLOCK_SIZE, BLOCK_SIZE, generator=g)
        sizes = torch.randn(rows, columns // BLOCK_SIZE, 1, generator=g).mul(4).exp2()
        q = quantize_activation((values * sizes).view(rows, columns), "per_token")
        sides += [q.codes, q.block_scales]
    got = rule.exact_matmul(*(side.to(device) for side in sides))
    return compare_bits(got.cpu(), rule.exact_matmul(*sides))
