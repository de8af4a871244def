# SPDX-License-Identifier: Apache-2.0
"""Sums through memory that all ranks reach, on a CPU; run by test_parallel.py.

gpu_ranks_cases.py has what needs GPUs.
"""

from __future__ import annotations

import tempfile
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from nvfp4_experts.errors import UnsupportedError
from nvfp4_experts.layers import parallel
from nvfp4_experts.layers import peers as peers_module
from nvfp4_experts.layers.parallel import SummedOverRanks
from nvfp4_experts.layers.peers import Peers
from nvfp4_experts.layers.shards import experts_of, shard_of, share_of
from tests.layers.parallel_cases import MODES, E, draw, in_rank_order, routed_experts, routing, same, shared_expert
from tests.layers.ranks import World


class FilePeers(Peers):
    """Ranks that reach each other's memory on a CPU: memory is files, and waiting is a barrier."""

    def shared(self, values: int) -> list[Tensor]:
        folder = [tempfile.mkdtemp() if self.rank == 0 else ""]
        dist.broadcast_object_list(folder, group_src=0, group=self._group())
        paths = [f"{folder[0]}/{rank}" for rank in range(self.ranks)]
        views = [torch.from_file(path, shared=True, size=values) for path in paths]
        views[self.rank].fill_(torch.nan)
        dist.barrier(self._group())
        return views

    def wait(self, channel: int = 0) -> None:
        dist.barrier(self._group())


class FailingPeers(FilePeers):
    """GPUs that should reach each other, and do not."""

    def shared(self, values: int) -> list[Tensor]:
        raise UnsupportedError(f"{values} values", "must be mapped", "no rights", "direct=False")


def memory_that_all_ranks_reach_gives_the_same_sums(world: World) -> None:
    for ranks, group in world.each_group(2, 3, 4):
        peers = FilePeers(group, torch.device("cpu"))
        peers.reserve(5)
        peers.reserve(1000)
        peers.reserve(7)
        for n in (1, 5, 48, 1000):
            parts = [draw(rank, n) * 10.0 ** (3 * (rank % 2)) for rank in range(ranks)]
            for few in (0, peers_module.FEW_BYTES):
                for dtype in (torch.float32, torch.bfloat16):
                    y = torch.empty(n, dtype=dtype)
                    with pytest.MonkeyPatch.context() as patch:
                        patch.setattr(peers_module, "FEW_BYTES", few)
                        peers.part(n).copy_(parts[world.rank])
                        peers.sum(y)
                    same(world, y, in_rank_order(parts).to(dtype), (ranks, n, few, dtype))
        x, indices, weights = routing(19)
        whole, lone = routed_experts(MODES[0]), shared_expert(MODES[0], 272)
        first = experts_of(world.rank, ranks, E).start
        routed: dict[str, Any] = {"routed": share_of(whole, world.rank, ranks), "first_expert": first}
        shared: dict[str, Any] = {"shared": shard_of(lone, world.rank, ranks)}
        for parts_of, inputs in ((routed, (indices, weights)), (shared, ()), (routed | shared, (indices, weights))):
            wants = SummedOverRanks(group, **parts_of)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(parallel, "peers_of", FilePeers)
                layer = SummedOverRanks(group, **parts_of)
                not_direct = (
                    SummedOverRanks(group, **parts_of, direct=False),
                    SummedOverRanks(group, **parts_of, chunk_tokens=4),
                )
            world.check(isinstance(layer._peers, FilePeers), "peers")
            world.check(not any(other._peers for other in (wants, *not_direct)), "peers of those that have none")
            for few in (0, peers_module.FEW_BYTES):
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(peers_module, "FEW_BYTES", few)
                    for rows in (x, x[:3].bfloat16(), x[:0]):
                        given = [t[: len(rows)] for t in inputs]
                        same(world, layer(rows, *given), wants(rows, *given), (ranks, few, rows.dtype, list(parts_of)))


def who_reaches_whom_is_agreed_on(world: World) -> None:
    """Memory is used where every rank can map all others'; one that cannot, or fails, leaves none of them with it."""
    cpu = torch.device("cpu")
    for ranks, group in world.each_group(2, 3):
        world.check(peers_module.peers_of(group, cpu) is None, "nobody reaches a CPU")
        everyone = {f"gpu {rank}" for rank in range(ranks)}
        for odd, happens in ((None, "reaches"), (ranks - 1, "reaches not"), (0, "fails")):
            is_odd = world.rank == odd

            with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as warned:
                patch.setattr(peers_module, "_known", {})
                patch.setattr(peers_module, "Peers", FailingPeers if happens == "fails" else FilePeers)
                patch.setattr(peers_module, "identity_of", lambda _: f"gpu {world.rank}")
                reached = everyone - {"gpu 0"} if is_odd and happens == "reaches not" else everyone
                patch.setattr(peers_module, "identities_in_reach", lambda _, reached=reached: reached)
                found = peers_module.peers_of(group, cpu)
                world.check((found is not None) == (happens == "reaches"), (ranks, happens))
                world.check(peers_module.peers_of(group, cpu) is found, "asked again")
            world.check(bool(warned) == (happens == "fails"), (happens, [str(w.message) for w in warned]))


CASES = {
    case.__name__: case for case in (memory_that_all_ranks_reach_gives_the_same_sums, who_reaches_whom_is_agreed_on)
}
