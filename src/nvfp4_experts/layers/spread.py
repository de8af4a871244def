# SPDX-License-Identifier: Apache-2.0
"""Many tokens of a sharded shared expert on GPUs that reach each other: weights travel, and tokens are spread.

    fetch     packed gate, up and down of the other shards, into scratch       0.5625 bytes a weight
    compute   this rank's T / R tokens by all channels, in runs of tokens
    fetch     the other ranks' rows of y, a run while the next is computed     y.itemsize T H (R - 1) / R bytes

Against parts of sums that is 4 T H (R - 1) / R bytes less and 0.5625 * 3 H I (R - 1) / R more, which begins to pay at
T = I / 2 and is done from T = I on. A row's bits are those of the whole layer for T / R tokens.

Copies between GPUs are the copy engines', but for those of the last run, which no GEMM is beside; what waits for other
ranks is a small kernel on a stream of its own.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ..kernels.cuda.alignment import run_aligned
from ..kernels.cuda.copies import copy_rows
from ..kernels.cuda.workspace import bytes_of, carve, exclusive, reserve
from ..kernels.dispatch import Call, get_backend
from .collectives import agree
from .peers import Peers
from .shards import even_part
from .shared_expert import Nvfp4SharedExpert

_STEP = 256  # gemm.cu's largest tile
_FEW = 16 * _STEP  # tokens of a rank that are not cut


def runs_of(tokens: int) -> list[slice]:
    """How a rank's tokens are cut: 1/2, 1/4, 1/8, 1/8 of them, so that little is left to fetch at the end."""
    parts = (2, 4, 8) if tokens >= _FEW else ()
    ends = accumulate((tokens // (part * _STEP) * _STEP for part in parts), initial=0)
    return [slice(begin, end) for begin, end in pairwise((*ends, tokens))]


class Spread:
    """A sharded expert whose packed weights all ranks can read; build it with `spread_of`."""

    def __init__(self, peers: Peers, shard: Nvfp4SharedExpert, shards: Any) -> None:
        self._peers, self._shard, self._shards = peers, shard, shards
        every = [shards.bytes_of(rank) for rank in range(peers.ranks)]
        self._seen: list[tuple[Tensor, ...]] = [() for _ in every]
        for part, index in enumerate(shards.SEEN):
            views = peers.shared(max(sizes[part] for sizes in every) // 4)
            for rank, view in enumerate(views):
                self._seen[rank] += (view.view(torch.uint8)[: every[rank][part]],)
            mine = self._seen[peers.rank][part]
            mine.copy_(shard._weights()[index].view(-1))
            shard._buffers[shard._packed_names[index]] = mine
        device = views[0].device
        self._waiting, self._fetching, self._keeping = (torch.cuda.Stream(device, priority=p) for p in (-1, -1, 0))
        most = -(-shard.max_tokens // peers.ranks)
        shards.prepare(shard.problem, most, device)
        reserve(device, bytes_of(list(shards.parts(most, shard.activations != "bf16").values())))
        torch.cuda.synchronize(device)  # launches read weights early

    def takes(self, x: Tensor) -> bool:
        """Whether x (T, H) has so many tokens that it pays, and weights are still where the others look for them."""
        own, seen = self._shard._weights(), self._seen[self._peers.rank]
        still = all(own[index].data_ptr() == at.data_ptr() for index, at in zip(self._shards.SEEN, seen, strict=True))
        return len(x) >= self._shards.size and still

    def run(self, x: Tensor, y: Tensor) -> None:
        """y (T, H) = the layer of x (T, H), the same on every rank; both contiguous, y a dtype of results."""
        self._shard.check_call(x, None)
        run_aligned(self._run, x, out=y)

    def _run(self, x: Tensor, y: Tensor) -> None:
        peers, shards, own = self._peers, self._shards, self._shard._weights()
        rank, main = peers.rank, torch.cuda.current_stream(x.device)
        _, input_scale, hidden_scale, limit, activations, activation_scale, _ = self._shard.arguments
        call = Call(limit, activations, activation_scale, input_scale, hidden_scale)
        spans = [even_part(len(x), r, peers.ranks) for r in range(peers.ranks)]
        rows = [peers.rows(r, len(span), y) for r, span in enumerate(spans)]
        x = x[spans[rank].start : spans[rank].stop]
        layout = shards.parts(len(x), activations != "bf16" or x.dtype != torch.bfloat16)
        with torch.cuda.device(x.device), exclusive(x.device):
            made = dict(zip(layout, carve(x.device, *layout.values()), strict=True))
            self._waiting.wait_stream(main)
            with torch.cuda.stream(self._waiting):
                peers.wait()  # nobody reads rows of an earlier call any more
            arrived = self._fetch_weights(made)
            values = shards.enter(x, call, made.get("values"))
            runs = runs_of(len(spans[0]))
            for number, run in enumerate(runs):
                h, out = made["h"][run], rows[rank][run]
                configs = shards.configs_of(len(out), len(x), x.device)
                if number == 0:  # what is here already, first
                    shards.first(values[run], own[shards.SEEN[0]], rank, own, call, configs, h)
                    for other in (r for r in arrived if r != rank):
                        main.wait_event(arrived[other])
                        gate_up = shards.gate_up_of(other, made["gate_up"])
                        shards.first(values[run], gate_up, other, own, call, configs, h)
                else:
                    if number == 1:
                        main.wait_event(arrived[rank])
                    shards.first(values[run], made["gate_up"], None, own, call, configs, h)
                shards.second(h, made["down"], own, call, configs, out)
                self._fetch_rows(y, rows, spans, run, main, is_last=run is runs[-1])
            for stream in (self._fetching, self._keeping):
                main.wait_stream(stream)

    def _fetch_rows(
        self, y: Tensor, rows: list[Tensor], spans: list[range], run: slice, main: torch.cuda.Stream, is_last: bool
    ) -> None:
        """Starts the copies of a run of every rank's rows to y.

        Those of the last run are a kernel's: no GEMM is in its way, and a copy engine takes longer to begin.
        """
        waiting, fetching = (main, main) if is_last else (self._waiting, self._fetching)
        for stream in {waiting, self._keeping} - {main}:
            stream.wait_stream(main)
        with torch.cuda.stream(waiting):
            self._peers.wait(channel=int(is_last))
        if not is_last:
            fetching.wait_stream(waiting)
        for rank, span in enumerate(spans):
            is_own = rank == self._peers.rank
            source = rows[rank][run].view(-1)
            to = y[span.start + run.start : span.start + run.stop].view(-1)[: len(source)]
            with torch.cuda.stream(self._keeping if is_own else fetching):
                if is_last and not is_own:
                    torch.bitwise_or(source.view(torch.int32), 0, out=to.view(torch.int32))
                else:
                    to.copy_(source)

    def _fetch_weights(self, made: dict[str, Tensor]) -> dict[int, torch.cuda.Event]:
        """Starts the copies; rank -> when its gate and up are here, and with the last other one's all of down.

        This rank's own are a kernel's, not the copy engine's, and the slower for it. They begin when the first GEMM has
        its multiprocessors.
        """
        own, shards, down_placed = self._peers.rank, self._shards, torch.cuda.Event()
        arrived = {rank: torch.cuda.Event() for rank in range(self._peers.ranks)}
        others = [rank for rank in arrived if rank != own]
        for stream in (self._fetching, self._keeping):
            stream.wait_stream(self._waiting)
        with torch.cuda.stream(self._keeping):
            self._place_down(made, own)
            down_placed.record()
            shards.gate_up_of(own, made["gate_up"]).copy_(self._seen[own][0])
            arrived[own].record()
        with torch.cuda.stream(self._fetching):
            for rank in others:
                shards.gate_up_of(rank, made["gate_up"]).copy_(self._seen[rank][0])
                arrived[rank].record()
            for rank in others:
                self._place_down(made, rank)
            self._fetching.wait_event(down_placed)
            arrived[others[-1]].record()
        return arrived

    def _place_down(self, made: dict[str, Tensor], rank: int) -> None:
        place = self._shards.down_of(rank, made["down"])
        copy_rows(place, self._seen[rank][1].view(place.shape))


def spread_of(group: ProcessGroup | None, peers: Peers, shard: nn.Module | None) -> Spread | None:
    """A lone sharded expert as a `Spread`, or None, on every rank, where it cannot be. A collective, on the host."""
    mine, kind = {"size": 0, "backend": ""}, None
    if isinstance(shard, Nvfp4SharedExpert):
        mine = {"size": shard.intermediate_size, "backend": shard.backend}
        kind = getattr(get_backend(shard.backend), "over_shards", None)
    said = agree(group, mine, own=("size", "backend"))
    if not isinstance(shard, Nvfp4SharedExpert) or kind is None or any(r["backend"] != shard.backend for r in said):
        return None
    shards = kind(shard.hidden_size, tuple(rank["size"] for rank in said))
    return None if shards.refusal(shard.problem) else Spread(peers, shard, shards)
