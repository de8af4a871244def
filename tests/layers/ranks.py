# SPDX-License-Identifier: Apache-2.0
"""Cases that several processes run together, as ranks of torch.distributed, and what became of each.

They run on a CPU, with Gloo, or on GPUs, one each, with NCCL.

A case is a function of a `World`. All ranks run all cases in turn; a case that works with fewer ranks asks for a group
of them, and the others go on to the next. What a case finds wrong it notes (`World.check`) and goes on: a rank that
stops leaves the others waiting.
"""

from __future__ import annotations

import datetime
import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

RANKS = 4
_PATIENCE = datetime.timedelta(seconds=30)  # for a rank that never comes


@dataclass(frozen=True)
class World:
    """This process among RANKS.

    Args:
        rank: its number.
        device: its own.
        groups: ranks -> the group of the first so many, for those that are in it.
        wrong: what the case at hand has found.
    """

    rank: int
    device: torch.device
    groups: dict[int, dist.ProcessGroup]
    wrong: list[str] = field(default_factory=list)

    def check(self, right: bool, what: object) -> None:
        """Note that something is not right."""
        if not right:
            self.wrong.append(f"rank {self.rank}: {what}")

    def each_group(self, *sizes: int) -> Iterable[tuple[int, dist.ProcessGroup]]:
        """(R, group) of each of these numbers of ranks, where this rank takes part."""
        return ((size, self.groups[size]) for size in sizes if self.rank < size)


Case = Callable[[World], None]


def run_cases(module: str, scratch: Path, ranks: int = RANKS, device: str = "cpu") -> dict[str, list[str]]:
    """Name of each case in the module's CASES -> what went wrong, a line or more from each rank with which it did.

    Processes find the package where this one does: if it has no finder of an editable install, as in
    tests/mutants/runner.py, nor do they.
    """
    editable = any(map(_is_editable, sys.meta_path))
    torch.multiprocessing.spawn(_rank, (ranks, device, module, scratch, editable), nprocs=ranks)
    cases = importlib.import_module(module).CASES
    outcomes = [json.loads((scratch / f"{rank}.json").read_text()) for rank in range(ranks)]
    return {name: [one.get(name, "not run") for one in outcomes if one.get(name, "not run")] for name in cases}


def _is_editable(finder: object) -> bool:
    return "editable" in type(finder).__module__


def _rank(rank: int, ranks: int, device_type: str, module: str, scratch: Path, editable: bool) -> None:
    if not editable:
        sys.meta_path[:] = [finder for finder in sys.meta_path if not _is_editable(finder)]
    from nvfp4_experts.diagnostics.bench.rank_process import NO_MULTICAST, transport  # found as said above

    cases: dict[str, Case] = importlib.import_module(module).CASES
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # what nobody wrote is NaN: see tests/conftest.py
    store = f"file://{scratch / 'store'}"
    device = torch.device("cpu")
    if device_type == "cuda":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
        for name, value in NO_MULTICAST.items():
            os.environ.setdefault(name, value)
    dist.init_process_group(transport(device_type), init_method=store, rank=rank, world_size=ranks, timeout=_PATIENCE)
    made = {size: dist.new_group(range(size), timeout=_PATIENCE) for size in range(1, ranks + 1)}
    world = World(rank, device, {size: group for size, group in made.items() if rank < size})
    outcomes: dict[str, str] = {}
    for name, case in cases.items():
        world.wrong.clear()
        try:
            case(world)
        except Exception:
            outcomes[name] = f"rank {rank}: {traceback.format_exc()}"
            break  # the others may wait for this rank: whatever came now would be out of step
        outcomes[name] = "\n".join(world.wrong)
    (scratch / f"{rank}.json").write_text(json.dumps(outcomes))
    dist.destroy_process_group()
