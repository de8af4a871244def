# SPDX-License-Identifier: Apache-2.0
"""Memory of GPUs that reach each other (NVLink), which every rank reads in place; and sums through it.

    part     this rank's part, fp32              the layer computes straight into it
    share    this rank's R-th of the sum         for the others to fetch

A sum waits twice for the other ranks, on the device: until all parts are there, and until nobody reads them any more.
What is added, and in which order, is as with `collectives.sum_in_rank_order`, so are the bits; but numbers move as an
addition reads them, and no communication kernel waits for room beside one that fills the GPU.

torch's symmetric memory (torch.distributed._symmetric_memory) is used from here alone.
"""

from __future__ import annotations

import socket
import warnings
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import UnsupportedError
from ..kernels.target import identities_in_reach, identity_of
from .collectives import FEW_BYTES, add_in_order, padded

_known: WeakKeyDictionary[dist.ProcessGroup, dict[torch.device, Peers | None]] = WeakKeyDictionary()


class Peers:
    """What one rank sees of all ranks' memory. Get it from `peers_of`; every rank makes the same calls, in one order.

    Sums of one group are for one stream at a time: they share `part` and `share`.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self._group, self._device = ref(group), device  # who keeps this by its group must not keep the group by this
        self._parts: list[Tensor] = []
        self._shares: list[Tensor] = []
        self._kept: list[
            tuple[Any, Tensor]
        ] = []  # handles, and what they share: graphs have addresses of outgrown memory

    def reserve(self, values: int) -> None:
        """Have room for sums of so many values. A collective, on the host.

        Cost: 4 bytes a value, and 4 / R for this rank's share.
        """
        if self._parts and len(self._parts[0]) >= values:
            return
        values = padded(values, self.ranks)
        views = self.shared(values + values // self.ranks)
        self._parts, self._shares = [view[:values] for view in views], [view[values:] for view in views]

    def shared(self, values: int) -> list[Tensor]:
        """(values,) fp32 of new memory on every rank, in rank order, as this rank sees it. A collective.

        Raises:
            UnsupportedError: GPUs that should reach each other do not, as in a container that shares no handles.
        """
        import torch.distributed._symmetric_memory as symmetric

        group = self._group()
        assert group is not None, "layers that ask hold it"
        try:
            mine = symmetric.empty(values, dtype=torch.float32, device=self._device)
            handle = symmetric.rendezvous(mine, group)
        except RuntimeError as refusal:
            got = str(refusal).partition("\n")[0]
            rule, way_out = "must be shared with the other ranks", "build layers over ranks with direct=False"
            raise UnsupportedError("memory of this rank's GPU", rule, got, way_out) from refusal
        self._kept.append((handle, mine))
        return [handle.get_buffer(rank, mine.shape, mine.dtype) for rank in range(self.ranks)]

    def part(self, values: int) -> Tensor:
        """(values,) fp32: where this rank's part of the next sum goes."""
        return self._parts[self.rank][:values]

    def rows(self, rank: int, count: int, like: Tensor) -> Tensor:
        """(count, H) of the dtype of `like`, (.., H): where `share` is, for rows that a rank has in whole."""
        columns = like.shape[-1]
        return self._shares[rank].view(like.dtype)[: count * columns].view(count, columns)

    def wait(self, channel: int = 0) -> None:
        """Until every rank's stream is here; waits of one channel must come one after the other."""
        self._kept[-1][0].barrier(channel=channel)

    def sum(self, y: Tensor) -> None:
        """y = ((part of rank 0 + part of rank 1) + ...), on every rank.

        Args:
            y: n values in any shape, contiguous; the sum is rounded once, to its dtype.

        Cost: where the parts of the others are FEW_BYTES or less, every rank reads all of them, 4 (R-1) n bytes. Else
            its R-th of each, and then the others' shares of the sum, (4 + y.itemsize) n (R-1) / R bytes. No wait by
            the host: a CUDA graph can capture it.
        """
        flat = y.view(-1)
        n = flat.numel()
        self.wait()
        if 4 * (self.ranks - 1) * n <= FEW_BYTES:
            add_in_order([part[:n] for part in self._parts], flat)
            self.wait()
            return
        step = padded(n, self.ranks) // self.ranks
        ends = [(min(n, rank * step), min(n, (rank + 1) * step)) for rank in range(self.ranks)]
        shares = [share.view(y.dtype)[: end - begin] for share, (begin, end) in zip(self._shares, ends, strict=True)]
        begin, end = ends[self.rank]
        add_in_order([part[begin:end] for part in self._parts], shares[self.rank])
        self.wait()
        for share, (begin, end) in zip(shares, ends, strict=True):
            flat[begin:end].copy_(share)


def peers_of(group: dist.ProcessGroup | None, device: torch.device) -> Peers | None:
    """The group's `Peers`, one for all its layers on a device; None, on every rank, where they do not reach each other.

    A collective, on the host. group: None is the default group.
    """
    group = dist.group.WORLD if group is None else group
    assert group is not None, "checked_group has seen it"
    known = _known.setdefault(group, {})
    if device not in known:
        facts = _gathered((socket.gethostname(), identity_of(device)), group)
        hosts, gpus = {host for host, _ in facts}, {gpu for _, gpu in facts}
        reaches = all(_gathered(len(hosts) == 1 and gpus <= identities_in_reach(device), group))
        known[device] = _that_work(Peers(group, device), group) if reaches and len(facts) > 1 else None
    return known[device]


def _that_work(peers: Peers, group: dist.ProcessGroup) -> Peers | None:
    """The same, or None with a warning on every rank where some rank cannot share memory."""
    problem = ""
    try:
        peers.shared(1)
    except (ImportError, UnsupportedError) as refusal:
        problem = str(refusal)
    problems = [said for said in _gathered(problem, group) if said]
    if problems:
        warnings.warn(f"sums over these GPUs go through torch.distributed: {problems[0]}", stacklevel=4)
    return None if problems else peers


def _gathered(mine: Any, group: dist.ProcessGroup) -> list[Any]:
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group)
    return everyone
