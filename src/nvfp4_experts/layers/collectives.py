# SPDX-License-Identifier: Apache-2.0
"""What several ranks do together, on any backend of torch.distributed: agree, sum in rank order, exchange rows.

Numbers travel as bytes; every addition is made here, in fp32 and in the order of ranks, so a sum is the same bits on
every rank, with NCCL or Gloo, and whoever comes first. (An all_reduce of theirs adds in an order of its own.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ..errors import InputError, LayoutError
from ..kernels.target import current_device

# A link of 300 GB/s carries this in the 14 µs that one more collective takes to start.
FEW_BYTES = 4 << 20


def checked_group(group: dist.ProcessGroup | DeviceMesh | None) -> tuple[dist.ProcessGroup | None, int, int]:
    """A group (of a mesh with one dimension), this process's rank in it, and its size.

    None is the default group, and stays None: who keeps that group itself past `destroy_process_group` may see torch
    abort the process as it ends.

    Raises:
        InputError: there is none, or this process is not in it.
    """
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise InputError("group", "must have one dimension", f"a mesh of {group.ndim}", 'name one: mesh["tp"]')
        group = group.get_group()
    if group is None and not dist.is_initialized():
        way_out = "start with torchrun and call torch.distributed.init_process_group()"
        raise InputError("group", "must be a process group", "none, and there is no default", way_out)
    if group is dist.group.WORLD:
        group = None
    if not isinstance(group, dist.ProcessGroup | None) or dist.get_rank(group) < 0:
        got = f"{type(group).__name__}, without this process"
        raise InputError("group", "must be a process group that this process is in", got, "call it on its ranks alone")
    return group, dist.get_rank(group), dist.get_world_size(group)


def agree(group: dist.ProcessGroup | None, mine: dict[str, Any], own: Sequence[str] = ()) -> list[dict[str, Any]]:
    """What every rank says of its part, in rank order; a collective, on the host.

    Args:
        mine: facts by name, the same names everywhere; None where this rank has no say.
        own: names of facts that may differ between ranks.

    Raises:
        LayoutError: others do; on every rank.
    """
    facts: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(facts, mine, group)
    for name in mine.keys() - set(own):
        said = [fact[name] for fact in facts if fact[name] is not None]
        if any(fact != said[0] for fact in said):
            raise LayoutError(name, "must be the same on every rank", said, "build all ranks' layers alike")
    return facts


def device_of(module: nn.Module | None) -> torch.device:
    """Where a module's buffers are; of none, where torch launches."""
    buffers = iter(()) if module is None else module.buffers()
    return next((tensor.device for tensor in buffers), current_device())


def gather(mine: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """(R, ...): `mine`, of one shape everywhere, of every rank. No wait by the host (with NCCL)."""
    everyone = mine.new_empty(dist.get_world_size(group), *mine.shape)
    _gather_bytes(everyone, mine, group).wait()
    return everyone


def exchange(
    rows: Tensor,
    send: Sequence[int],
    receive: Sequence[int],
    group: dist.ProcessGroup | None,
    into: Tensor | None = None,
) -> Tensor:
    """Rows (n, K) dealt out to ranks in order, `send[r]` to rank r; returns what came, `receive[r]` from rank r."""
    came = rows.new_empty(sum(receive), rows.shape[1]) if into is None else into
    dist.all_to_all_single(came.view(torch.uint8), rows.view(torch.uint8), list(receive), list(send), group)
    return came


def padded(values: int, ranks: int) -> int:
    """The least multiple of `ranks` that holds so many values."""
    return -(-values // ranks) * ranks


def sum_in_rank_order(part: Tensor, y: Tensor, group: dist.ProcessGroup | None) -> Iterator[None]:
    """y = ((part of rank 0 + part of rank 1) + ...), on every rank, in steps between which other work may be issued.

    Args:
        part: (padded(n, R),) fp32, contiguous; what stands behind the first n values is ignored.
        y: n values in any shape, contiguous; the sum is rounded once, to its dtype.

    Cost: where the parts of the others are FEW_BYTES or less, one collective that brings them all, 4 (R-1) n bytes to
        each rank. Else two: each rank gets its R-th of every part and adds, and the sums are gathered, together
        (4 + y.itemsize) n (R-1) / R bytes. The same bits either way. No wait by the host (with NCCL): a CUDA graph can
        capture it.
    """
    ranks, n, flat = dist.get_world_size(group), y.numel(), y.view(-1)
    if 4 * (ranks - 1) * n <= FEW_BYTES:
        parts = part.new_empty(ranks, part.numel())
        work = _gather_bytes(parts, part, group)
        yield
        work.wait()
        add_in_order(list(parts[:, :n]), flat)
        return
    parts = torch.empty_like(part)
    work = dist.all_to_all_single(parts.view(torch.uint8), part.view(torch.uint8), group=group, async_op=True)
    yield
    work.wait()
    sums = y.new_empty(part.numel() // ranks)
    add_in_order(list(parts.view(ranks, -1)), sums)
    whole = flat if n == part.numel() else y.new_empty(part.numel())
    work = _gather_bytes(whole, sums, group)
    yield
    work.wait()
    if whole is not flat:
        flat.copy_(whole[:n])


def add_in_order(parts: Sequence[Tensor], out: Tensor) -> None:
    """R > 1 parts, (n,) fp32, to (n,): added in fp32 in their order, rounded once."""
    total = parts[0]
    for part in parts[1:-1]:
        total = total + part
    torch.add(total, parts[-1], out=out)


def _gather_bytes(everyone: Tensor, mine: Tensor, group: dist.ProcessGroup | None) -> Any:
    # The second name is what torch before 2.13 calls it.
    collect = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return collect(everyone.view(-1).view(torch.uint8), mine.view(-1).view(torch.uint8), group, async_op=True)
