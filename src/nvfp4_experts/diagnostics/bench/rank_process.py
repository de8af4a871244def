# SPDX-License-Identifier: Apache-2.0
"""One process of the benchmark over ranks: builds its parts, checks them with the others, times them with the others.

Every rank runs the same methods in the same order; what decides (an error past its bound, how many samples) is decided
from numbers that all have exchanged.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...errors import UnsupportedError
from ...formats.nvfp4 import Nvfp4Tensor
from ...formats.stack import Nvfp4Stack
from ...kernels import reference
from ...layers.collectives import agree, checked_group, gather
from ...layers.dispatched import COMBINES, DispatchedOverRanks
from ...layers.parallel import SummedOverRanks
from ...layers.routed_experts import Nvfp4RoutedExperts
from ...layers.shards import channels_of, cut_channels, even_part, experts_of, shard_of
from ...layers.shared_expert import Nvfp4SharedExpert
from ..metrics import rel_l2
from .candidates import OUR_BOUNDS
from .measure import brief
from .timing import WARM_UP_CALLS, chain, seconds_per_call
from .work import HIDDEN_SCALE, INPUT_SCALE, SWIGLU_LIMIT, Weights, Work

MIN_SAMPLE_SECONDS, MIN_SAMPLES, MAX_SAMPLES = 5e-3, 5, 51
MAX_COPIES = 64  # of a shared expert
NO_MULTICAST = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}  # it needs rights that few have

Call = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class RankRow:
    """One plan at one number of tokens; times in microseconds per call, of the slowest rank.

    Args:
        layer: "shared" or "routed".
        plan: see the module docstring.
        activations: the activation format, with its scale if it is nvfp4.
        backend: what runs a part.
        tokens: T, of all ranks together.
        status, reason: "timed"; "failed" (wrong outputs) or "unavailable" (it cannot run here), and why.
        launched: "replayed" as a graph, or "called".
        one_us, plan_us, speedup: medians, and their ratio.
        samples: of each.
        rel_l2, bound: the largest distance from the reference on any rank, and the largest allowed.
        equal_bits: share of values in which the plan and one rank alone have the same bits.
    """

    layer: str
    plan: str
    activations: str
    backend: str
    tokens: int
    status: str
    reason: str | None = None
    launched: str | None = None
    one_us: float | None = None
    plan_us: float | None = None
    speedup: float | None = None
    samples: int = 0
    rel_l2: float | None = None
    bound: float | None = None
    equal_bits: float | None = None


@dataclass(frozen=True)
class Settings:
    """What every rank is told."""

    work: Work
    ranks: int
    device_type: str
    tokens: tuple[int, ...]
    modes: tuple[tuple[str, str], ...]
    backend: str
    experts: int
    top_k: int
    seconds: float
    rotate: int


def transport(device_type: str) -> str:
    """The backend of torch.distributed for a kind of device."""
    return "nccl" if device_type == "cuda" else "gloo"


def run_rank(rank: int, settings: Settings, folder: Path) -> None:
    """One process: everything but the report."""
    device = torch.device(f"cuda:{rank}" if settings.device_type == "cuda" else settings.device_type)
    if device.type == "cuda":
        for name, value in NO_MULTICAST.items():
            os.environ.setdefault(name, value)
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, torch.get_num_threads() // settings.ranks))
    dist.init_process_group(
        transport(device.type),
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=settings.ranks,
        device_id=device if device.type == "cuda" else None,
    )
    try:
        with torch.no_grad():
            here = _Rank(rank, settings, device)
            rows = [row for mode in settings.modes for layer in (here.shared, here.routed) for row in layer(mode)]
    finally:
        dist.destroy_process_group()
    if rank == 0:
        (folder / "rows.json").write_text(json.dumps([asdict(row) for row in rows]), encoding="utf-8")


@dataclass(frozen=True)
class _Plan:
    """A plan at one number of tokens.

    Args:
        calls: x -> y of this rank, one for each copy of the weights; more than one are chained.
        one: the same of the whole layer; on rank 0 alone.
        whole_x: all tokens.
        mine: this rank's rows of `whole_x`.
        truth, one_truth: what is right for all tokens, of the plan and of one; called on rank 0.
        replayed: whether a graph may capture the calls.
    """

    calls: list[Call]
    one: list[Call]
    whole_x: Tensor
    mine: slice
    truth: Callable[[], Tensor]
    one_truth: Callable[[], Tensor]
    replayed: bool


class _Rank:
    """One process of the benchmark; every rank runs the same methods in the same order."""

    def __init__(self, rank: int, settings: Settings, device: torch.device) -> None:
        self.rank, self.settings, self.device = rank, settings, device
        self.group, _, _ = checked_group(None)
        self.weights = settings.work.weights(device)
        count = len(settings.modes) * len(settings.tokens) * (2 + len(COMBINES))
        self.seconds = settings.seconds / count

    # -- the layers ----------------------------------------------------------------------------------------------

    def shared(self, mode: tuple[str, str]) -> Iterator[RankRow]:
        """tp, at each number of tokens."""
        s, w = self.settings, self.weights
        try:
            whole = self._shared_expert(w, mode)
            shard_bytes = max(1, whole.resident_bytes // s.ranks)
            copies = [self._copies(shard_bytes, tokens) for tokens in s.tokens]
            shards = [shard_of(self._shared_expert(w.clone(), mode), self.rank, s.ranks) for _ in range(max(copies))]
            layers = [SummedOverRanks(self.group, shared=shard) for shard in shards]
            ones = [self._shared_expert(w.clone(), mode) for _ in range(max(copies) if self.rank == 0 else 0)]
        except UnsupportedError as refusal:
            yield from self._unavailable("shared", "tp", mode, refusal)
            return
        for tokens, count in zip(s.tokens, copies, strict=True):
            x = s.work.check_states(tokens, self.device)
            plan = _Plan(
                calls=list(layers[:count]),
                one=list(ones[:count]),
                whole_x=x,
                mine=slice(0, tokens),
                truth=lambda x=x: self._shared_truth(x, mode, s.ranks),  # type: ignore[misc]
                one_truth=lambda x=x: self._shared_truth(x, mode, 1),  # type: ignore[misc]
                replayed=self.device.type == "cuda" and whole.backend != "torch",
            )
            yield self._row("shared", "tp", mode, whole.backend, tokens, plan)

    def routed(self, mode: tuple[str, str]) -> Iterator[RankRow]:
        """ep and dispatch, at each number of tokens."""
        s = self.settings
        names = ("ep", *(f"dispatch {combine}" for combine in COMBINES))
        mine = experts_of(self.rank, s.ranks, s.experts)
        try:
            share = self._routed_experts(mine, mode) if mine else None
            whole = self._routed_experts(range(s.experts), mode) if self.rank == 0 else None
        except UnsupportedError as refusal:
            for name in names:
                yield from self._unavailable("routed", name, mode, refusal)
            return
        layer_here = whole or share
        said = agree(self.group, {"backend": None if layer_here is None else layer_here.backend})
        backend = said[0]["backend"]
        summed = SummedOverRanks(self.group, routed=share, first_expert=mine.start)
        per_rank = None if share is None else share.with_capacity(-(-max(s.tokens) // s.ranks), s.top_k)
        dispatched = [DispatchedOverRanks(per_rank, self.group, combine=combine) for combine in COMBINES]
        for tokens in s.tokens:
            x, (indices, weights) = s.work.check_states(tokens, self.device), self._routing(tokens)
            for name, layer in zip(names, (summed, *dispatched), strict=True):
                part = even_part(tokens, self.rank, s.ranks)
                rows = slice(0, tokens) if name == "ep" else slice(part.start, part.stop)
                own = indices[rows], weights[rows]

                def truth(x: Tensor = x, indices: Tensor = indices, weights: Tensor = weights) -> Tensor:
                    assert whole is not None, "asked on rank 0 alone"
                    return self._routed_truth(whole, x, indices, weights, mode)

                plan = _Plan(
                    calls=[lambda rows, layer=layer, own=own: layer(rows, *own)],  # type: ignore[misc]
                    one=[] if whole is None else [lambda x, i=indices, w=weights: whole(x, i, w)],  # type: ignore[misc]
                    whole_x=x,
                    mine=rows,
                    truth=truth,
                    one_truth=truth,
                    replayed=self.device.type == "cuda" and backend != "torch" and name == "ep",
                )
                yield self._row("routed", name, mode, backend, tokens, plan)

    def _shared_expert(self, w: Weights, mode: tuple[str, str]) -> Nvfp4SharedExpert:
        options = self._options(mode)
        return Nvfp4SharedExpert(w.gate, w.up, w.down, **options, hidden_scale=HIDDEN_SCALE)

    def _routed_experts(self, run: range, mode: tuple[str, str]) -> Nvfp4RoutedExperts:
        """Experts that are the shared one with its rows turned by their number: distinct, and made in no time."""

        def turned(w: Nvfp4Tensor) -> Nvfp4Stack:
            scale_bytes = w.block_scales.view(torch.uint8)
            codes = torch.stack([w.codes.roll(expert, 0) for expert in run])
            scales = torch.stack([scale_bytes.roll(expert, 0) for expert in run]).view(torch.float8_e4m3fn)
            return Nvfp4Stack(codes, scales, w.global_scale.expand(len(run)).contiguous())

        stacks = [turned(w) for w in (self.weights.gate, self.weights.up, self.weights.down)]
        return Nvfp4RoutedExperts(*stacks, **self._options(mode), hidden_scale=HIDDEN_SCALE, top_k=self.settings.top_k)

    def _options(self, mode: tuple[str, str]) -> dict[str, Any]:
        return {
            "swiglu_limit": SWIGLU_LIMIT,
            "activations": mode[0],
            "activation_scale": mode[1],
            "input_scale": INPUT_SCALE,
            "max_tokens": max(self.settings.tokens),
            "backend": self.settings.backend,
        }

    def _copies(self, shard_bytes: int, tokens: int) -> int:
        """So many that `rotate` bytes of weights, x and sums lie between two uses of one; from 2 to MAX_COPIES."""
        touched = shard_bytes + tokens * self.settings.work.hidden * (2 + 4)
        return min(MAX_COPIES, max(2, -(-self.settings.rotate // touched)))

    def _routing(self, tokens: int) -> tuple[Tensor, Tensor]:
        """k experts of each token, uniformly, and weights that add up to 1; the same on every rank."""
        g = torch.Generator().manual_seed(tokens)
        indices = torch.rand(tokens, self.settings.experts, generator=g).topk(self.settings.top_k).indices
        weights = torch.rand(indices.shape, generator=g) + 0.5
        return indices.to(self.device), (weights / weights.sum(-1, keepdim=True)).to(self.device)

    # -- what is right -------------------------------------------------------------------------------------------

    def _scales(self, mode: tuple[str, str]) -> dict[str, Any]:
        return {"swiglu_limit": SWIGLU_LIMIT, "activations": mode[0], "activation_scale": mode[1]}

    def _shared_truth(self, x: Tensor, mode: tuple[str, str], ranks: int) -> Tensor:
        w, size = self.weights, self.weights.gate.shape[0]
        static: dict[str, Any] = {
            name: torch.tensor(value, device=self.device)
            for name, value in (("input_scale", INPUT_SCALE), ("hidden_scale", HIDDEN_SCALE))
        }
        total = torch.zeros(x.shape, device=self.device)
        for rank in range(ranks):
            if channels := channels_of(rank, ranks, size):
                gate, up, down = cut_channels(w.gate, w.up, w.down, channels)
                total = total + reference.shared_expert(x.float(), gate, up, down, **self._scales(mode), **static)
        return total.to(x.dtype)

    def _routed_truth(
        self, whole: Nvfp4RoutedExperts, x: Tensor, indices: Tensor, weights: Tensor, mode: tuple[str, str]
    ) -> Tensor:
        static: dict[str, Any] = {"input_scale": whole.input_scale, "hidden_scale": whole.hidden_scale}
        gate, up, down = whole._projections()
        return reference.routed_experts(x, gate, up, down, indices, weights, **self._scales(mode), **static)

    # -- checking and timing -------------------------------------------------------------------------------------

    def _row(self, layer: str, name: str, mode: tuple[str, str], backend: str, tokens: int, plan: _Plan) -> RankRow:
        bound = OUR_BOUNDS[mode[0]]
        error, equal, reason = self._check(plan, bound, everywhere=name in ("tp", "ep"))
        facts: dict[str, Any] = {
            "layer": layer,
            "plan": name,
            "activations": mode_name(mode),
            "backend": backend,
            "tokens": tokens,
            "rel_l2": error,
            "bound": bound,
            "equal_bits": equal,
        }
        if reason is not None:
            return RankRow(**facts, status="failed", reason=reason)
        own = _Launch(plan.calls, plan.whole_x[plan.mine], plan.replayed)
        one = _Launch(plan.one, plan.whole_x, plan.replayed) if plan.one else None
        one_us, plan_us, samples = self._times(one, own)
        if self._worst(own.error(), 0.0 if one is None else one.error()) > bound:
            return RankRow(**facts, status="failed", reason="replayed as a graph, the calls gave other values")
        facts |= {"launched": "replayed" if plan.replayed else "called", "samples": samples}
        return RankRow(**facts, status="timed", one_us=one_us, plan_us=plan_us, speedup=one_us / plan_us)

    def _check(self, plan: _Plan, bound: float, everywhere: bool) -> tuple[float, float, str | None]:
        """(largest rel-L2, share of bits as of one rank, what is wrong), the same on every rank."""
        y = plan.calls[0](plan.whole_x[plan.mine])
        truth, one = (torch.empty_like(plan.whole_x) for _ in range(2))
        one_error = 0.0
        if self.rank == 0:
            one.copy_(plan.one[0](plan.whole_x))
            one_error = rel_l2(one, plan.one_truth())
            truth.copy_(plan.truth())
        for tensor in (truth, one):
            dist.broadcast(tensor.view(torch.uint8), 0)
        error = rel_l2(y, truth[plan.mine]) if y.numel() else 0.0
        equal = float((y == one[plan.mine]).sum())
        alike = True
        if everywhere:
            first = y.clone()
            dist.broadcast(first.view(torch.uint8), 0)
            alike = torch.equal(first.view(torch.uint8), y.view(torch.uint8))
        said = self._everyones(error, one_error, float(not alike), equal, float(y.numel()))
        error, one_error, unlike = said.nan_to_num(math.inf).amax(0)[:3].tolist()
        equal = float(said[:, 3].sum() / said[:, 4].sum())
        if max(error, one_error) > bound:
            who = "one rank alone" if one_error > bound else "the plan"
            return error, equal, f"rel-L2 {max(error, one_error):.3g} of {who} is past the bound of {bound:.3g}"
        return error, equal, "ranks have results in different bits" if unlike else None

    def _times(self, one: _Launch | None, own: _Launch) -> tuple[float, float, int]:
        """Medians in microseconds per call, of one and of the plan, and how many samples of each."""

        def sample(launch: _Launch | None, repeats: int) -> float:
            dist.barrier()
            return self._worst(0.0 if launch is None else launch.seconds(repeats, self.device))

        first = sample(one, 1), sample(own, 1)
        repeats = [max(1, math.ceil(MIN_SAMPLE_SECONDS / seconds)) for seconds in first]
        cost = sum(seconds * count for seconds, count in zip(first, repeats, strict=True))
        count = min(MAX_SAMPLES, max(MIN_SAMPLES, int(self.seconds / cost)))
        samples = [(sample(one, repeats[0]), sample(own, repeats[1])) for _ in range(count)]
        one_us, plan_us = (1e6 * median(times) for times in zip(*samples, strict=True))
        return one_us / self._worst(0.0 if one is None else one.calls), plan_us / own.calls, count

    def _everyones(self, *numbers: float) -> Tensor:
        """(R, n) fp64: these numbers of every rank."""
        return gather(torch.tensor(numbers, dtype=torch.float64, device=self.device), self.group).cpu()

    def _worst(self, *numbers: float) -> float:
        """The largest of these numbers on any rank; NaN is infinite."""
        return float(self._everyones(*numbers).nan_to_num(math.inf).max())

    def _unavailable(self, layer: str, name: str, mode: tuple[str, str], why: Exception) -> Iterator[RankRow]:
        for tokens in self.settings.tokens:
            backend = self.settings.backend
            yield RankRow(layer, name, mode_name(mode), backend, tokens, status="unavailable", reason=brief(why))


class _Launch:
    """Calls, chained, as something to start again and again: a graph of them all, or the calls themselves."""

    def __init__(self, calls: Sequence[Call], x: Tensor, replayed: bool) -> None:
        self.calls = len(calls)
        self._eager: Callable[[], Tensor] = lambda: chain(calls, x)[-1]
        self._run: Callable[[], object] = self._eager
        self._y: Tensor | None = None
        if not replayed:
            return
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_CALLS):
                self._eager()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # NCCL's watchdog asks for events in a thread of its own, which another mode forbids.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._y = self._eager()
        self._run = graph.replay

    def seconds(self, repeats: int, device: torch.device) -> float:
        """Seconds of all the calls, once, on the mean of so many times."""
        return seconds_per_call(self._run, repeats, device)

    def error(self) -> float:
        """How far from the calls themselves what was replayed last is; 0 without a graph."""
        return 0.0 if self._y is None else rel_l2(self._y, self._eager())


def mode_name(mode: tuple[str, str]) -> str:
    """An activation format, with its scale where it has a choice of them."""
    return " ".join(mode) if mode[0] == "nvfp4" else mode[0]
