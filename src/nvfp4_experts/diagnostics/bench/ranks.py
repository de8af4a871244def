# SPDX-License-Identifier: Apache-2.0
"""Layers over several ranks next to the same layers on one: each plan checked on every rank, then timed.

    one               the whole layer on rank 0, while the others wait
    tp                a shard of the shared expert on each rank, all T tokens on each
    ep                a share of the routed experts on each rank, all T tokens on each
    dispatch slots    a share of the routed experts on each rank, T / R tokens on each; a row back for each slot
    dispatch ranks    the same, a row back for each token and rank

Truth is kernels/reference.py; for tp, of the shards, added in rank order. What is wrong anywhere is timed nowhere. A
time is the slowest rank's, between a barrier in front of the sample and an event (or the clock) behind it; one and
plan are sampled in turn, and medians are compared.

On CUDA calls are replayed as graphs, but for dispatch, whose host waits for counts, and for routed experts of backend
"torch", whose host does as well: these, and what they are compared with, are launched call by call. Copies of a shared
expert are cycled through until `rotate` bytes lie between two uses of one.
"""

from __future__ import annotations

import datetime
import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ..._version import __version__
from ...errors import InputError
from .machine import Machine, describe_machine, rotation_bytes
from .measure import checked_device, our_candidates
from .rank_process import RankRow, Settings, run_rank, transport
from .work import ROUTED, TOP_K, Work

OTHER_EXPERTS = 16  # where the shape has no number of its own
TOKENS = (1, 64, 4096, 8192)


@dataclass(frozen=True)
class RanksReport:
    """One run, with what it takes to read it a year later."""

    version: str
    date: str
    command: str
    machine: Machine
    ranks: int
    transport: str
    shape: str
    hidden_size: int
    intermediate_size: int
    experts: int
    top_k: int
    rows: tuple[RankRow, ...]

    @property
    def passed(self) -> bool:
        """Whether no plan failed."""
        return not any(row.status == "failed" for row in self.rows)

    def to_dict(self) -> dict[str, object]:
        return {**asdict(self), "passed": self.passed}


def bench_ranks(
    work: Work,
    ranks: int,
    *,
    activations: Sequence[str] = ("bf16",),
    activation_scale: str = "per_token",
    backend: str = "auto",
    tokens: Sequence[int] | None = None,
    device: str | None = None,
    experts: int | None = None,
    top_k: int | None = None,
    seconds: float = 30.0,
    rotate: int | None = None,
    command: str = "",
) -> RanksReport:
    """Start so many processes on this machine, with NCCL on its first CUDA devices or with Gloo on its CPU.

    Args:
        work: the shape of the shared expert and of each routed one.
        ranks: at least 2.
        activations, activation_scale, backend: as for the layers.
        tokens: each at least 1; None is TOKENS.
        device: "cuda" or "cpu"; None is cuda where there is one.
        experts: None is what ROUTED says of the shape, else OTHER_EXPERTS.
        top_k: k, at most `experts`; None is TOP_K.
        seconds: for samples, all together; building and checking come on top.
        rotate: see the module docstring; None is more than the caches of the device hold.
        command: how this was started, for the report.

    Raises:
        InputError: a name that is none, or a number out of range.
        UnsupportedError: fewer devices than ranks.
    """
    our_candidates(activations, activation_scale)  # raises for a name that is none
    where = checked_device(device)
    counts = tuple(dict.fromkeys(tokens or TOKENS))
    top_k = TOP_K if top_k is None else top_k
    number = ROUTED.get(work.shape, (OTHER_EXPERTS, 0.0))[0] if experts is None else experts
    for name, value, least in (("ranks", ranks, 2), ("tokens", min(counts), 1), ("top_k", top_k, 1)):
        if value < least:
            raise InputError(name, f"must be at least {least}", value, "give more")
    if top_k > number:
        raise InputError("top_k", f"must be at most E={number}", top_k, "choose fewer")
    if not (math.isfinite(seconds) and seconds > 0):
        raise InputError("seconds", "must be finite and above 0", seconds, "give the seconds to spend on samples")
    if where.type == "cuda":
        checked_device(f"cuda:{ranks - 1}")
    settings = Settings(
        work=work,
        ranks=ranks,
        device_type=where.type,
        tokens=counts,
        modes=tuple((name, activation_scale) for name in activations),
        backend=backend,
        experts=number,
        top_k=top_k,
        seconds=seconds,
        rotate=rotation_bytes(where) if rotate is None else rotate,
    )
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(run_rank, (settings, Path(folder)), nprocs=ranks)
        rows = json.loads((Path(folder) / "rows.json").read_text(encoding="utf-8"))
    return RanksReport(
        version=__version__,
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        command=command,
        machine=describe_machine(where),
        ranks=ranks,
        transport=transport(where.type),
        shape=work.shape,
        hidden_size=work.hidden,
        intermediate_size=work.intermediate,
        experts=number,
        top_k=top_k,
        rows=tuple(RankRow(**row) for row in rows),
    )
