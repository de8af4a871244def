# SPDX-License-Identifier: Apache-2.0
"""Expert layers over the ranks of a process group, one process and one device each, and whole models so.

    plan        tokens                    what travels
    "tp"        the same on every rank    sums
    "ep"        the same on every rank    sums
    "dispatch"  each rank's own           rows to their experts, and back

What a rank holds: part.py. Sums: `SummedOverRanks`, here. Rows: dispatched.py. docs/parallel.md has what the plans cost
and what is bit for bit equal to what.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from ..errors import InputError, LayoutError
from .checks import check_hidden_states, check_out, check_routing, checked_choice, checked_count
from .collectives import agree, checked_group, device_of, padded, sum_in_rank_order
from .dispatched import DispatchedOverRanks
from .kept_expert import KeptSharedExpert
from .moe import Nvfp4MoE
from .packed import NoBackward
from .part import PLANS, LayerPart, part_of
from .peers import Peers, peers_of
from .routed_experts import Nvfp4RoutedExperts
from .shards import check_modes, facts_of, modes_of
from .shared_expert import Nvfp4SharedExpert
from .spread import Spread, spread_of

_INPUTS = ("topk_indices", "topk_weights", "token_ids")
_LAYERS = (Nvfp4SharedExpert, Nvfp4RoutedExperts, Nvfp4MoE, LayerPart)


class SummedOverRanks(nn.Module):
    """Parts of a layer, one a rank, on the same tokens; every rank gets the whole result, in the same bits.

        part = routed(x, topk_indices - first_expert, topk_weights) + shared(x)    fp32; what a rank has not gives 0
        y    = ((part of rank 0 + part of rank 1) + ...)                           fp32, rounded once to the dtype of x

    Building it is a collective, and so is a call: every rank of the group makes it, with the same arguments.

    Args:
        group: a process group, a mesh of one dimension, or None for the default group.
        shared: this rank's shard of a shared expert, or None. A kept one has no shards: one rank has it, whole.
        routed: this rank's shard or share of routed experts, or None.
        router: as of `Nvfp4MoE`; or None, and the caller gives indices and weights. The same on every rank.
        first_expert: what the first expert of `routed` is called in the indices.
        chunk_tokens: of twice as many tokens or more, so many are computed at a time, while the parts of those before
            them travel; None: all at once. Not with activation_scale="dynamic", whose scale is the batch's. It can
            pay where computing leaves room on the device for what travels; routed experts' weights are read again for
            every chunk (docs/parallel.md).
        direct: let GPUs that reach each other's memory read parts there (peers.py), where parts are not chunked, and
            spread many tokens of a lone shared expert (spread.py); False: torch.distributed's collectives.

    Raises:
        InputError: no group, no part on any rank, or chunk_tokens below 1.
        LayoutError: ranks whose layers differ in more than their part, or that have some experts in common, or (with a
            router) leave some out.
        UnsupportedError: GPUs that should reach each other's memory do not; direct=False does without.

    Numerics: the same bits on every rank, and sums have the same with every backend of torch.distributed and with
        `direct`; spread tokens have those of the whole layer. Else, against the layer in one piece:
        with bf16 activations and static scales the same operands enter every GEMM, and the order of fp32 sums differs.
        Where a scale is measured on h (dynamic, per_token, fp8) a shard measures its own channels: the layer is then
        the sum of the shards, each an expert in its own right. Shares measure what the whole does.

    Cost: that of the part, and what `sum_in_rank_order` or `Peers.sum` says of (T, H) values; a lone shared expert of
        many tokens: see spread.py. With `direct` calls are for one stream at a time, and 4 (1 + 1 / R) H max_tokens
        bytes are kept, once for a group and device. Inference only.
    """

    def __init__(
        self,
        group: ProcessGroup | DeviceMesh | None = None,
        *,
        shared: Nvfp4SharedExpert | KeptSharedExpert | None = None,
        routed: Nvfp4RoutedExperts | None = None,
        router: nn.Module | None = None,
        first_expert: int = 0,
        chunk_tokens: int | None = None,
        direct: bool = True,
    ) -> None:
        super().__init__()
        self.group, self.rank, self.ranks = checked_group(group)
        self.shared, self.routed, self.router, self.first_expert = shared, routed, router, first_expert
        self.chunk_tokens = chunk_tokens
        if chunk_tokens is not None:
            checked_count("chunk_tokens", chunk_tokens, "give the tokens of a chunk, or None")
        options = {"chunk_tokens": chunk_tokens or 0, "direct": direct}  # ranks that differ would wait for each other
        run = None if routed is None else (first_expert, first_expert + routed.num_experts)
        mine = {"shared": facts_of(shared), "routed": facts_of(routed), "experts": run} | options
        said = agree(self.group, mine, own=["experts"])
        facts = [fact for rank in said for fact in (rank["shared"], rank["routed"]) if fact is not None]
        if not facts:
            raise InputError("shared and routed", "must be there on some rank", "none", "give each rank its part")
        self._modes = modes_of(shared, routed)
        check_cover([rank["experts"] for rank in said if rank["experts"]], getattr(router, "num_experts", None))
        sizes = {fact["hidden_size"] for fact in facts}
        if len(sizes) > 1:
            raise LayoutError("parts", "must have one hidden size", sizes, "build them from one layer's weights")
        self.hidden_size, self.max_tokens = sizes.pop(), min(fact["max_tokens"] for fact in facts)
        routed_facts = next((rank["routed"] for rank in said if rank["routed"] is not None), None)
        self._top_k = 0 if routed_facts is None else routed_facts["top_k"]  # 0: no rank has routed experts
        self._whole_batch = any(
            (fact["activations"], fact["activation_scale"]) == ("nvfp4", "dynamic") for fact in facts
        )
        self._peers: Peers | None = None
        if direct and chunk_tokens is None and self.ranks > 1:
            self._peers = peers_of(self.group, device_of(self))
        self._spread: Spread | None = None
        if self._peers is not None:
            self._peers.reserve(padded(self.max_tokens, self.ranks) * self.hidden_size)
            if not self._top_k:
                self._spread = spread_of(self.group, self._peers, shared)

    def forward(self, x: Tensor, *inputs: Tensor | None, out: Tensor | None = None, **named: Tensor | None) -> Tensor:
        """Run this rank's part and add up all ranks'.

        Args:
            x: (..., H) bf16, fp16 or fp32, at most max_tokens rows.
            inputs, named: what the layer in whose place this stands takes behind x, by place or by name: nothing;
                topk_indices and topk_weights; or with a router token_ids, if it wants them.
            out: as for `Nvfp4SharedExpert`.

        Returns:
            (..., H) in the dtype of x, or `out`.

        Raises:
            InputError, CalibrationError: as the layer, or a part's activations have changed; on this rank, while the
                others wait for it.
        """
        check_hidden_states(x, self.hidden_size, self.max_tokens, x.device)
        check_modes(self._modes, self.shared, self.routed)
        if out is not None:
            check_out(x, out)
        inputs += tuple(named.pop(name) for name in _INPUTS if name in named)
        if named or self.router is None:
            self._check_routing(x, inputs, list(named))
        y = self._run(x, inputs, torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out)
        sources = [t for t in (x, *inputs) if t is not None and t.requires_grad]
        wants_grad = out is None and sources and torch.is_grad_enabled()
        return NoBackward.apply(y, "layer over ranks", *sources) if wants_grad else y

    def _check_routing(self, x: Tensor, inputs: tuple[Tensor | None, ...], unknown: list[str]) -> None:
        names = _INPUTS[:2] if self._top_k else ()
        given = [t for t in inputs if t is not None]
        if unknown or len(given) != len(names):
            got = f"{len(given)} of them{''.join(f', {name}' for name in unknown)}"
            raise InputError("arguments behind x", f"must be {names}", got, "call it as the layer that it replaces")
        if given:
            check_routing(x, given[0], given[1], self._top_k, x.device)

    @torch.no_grad()
    def _run(self, x: Tensor, inputs: tuple[Tensor | None, ...], y: Tensor) -> Tensor:
        if x.numel() == 0:
            return y
        if self.router is not None:  # of the whole batch: which experts are chosen must not hang on chunks
            inputs = self.router(x, *inputs)
        rows, sums = x.reshape(-1, self.hidden_size), y.view(-1, self.hidden_size)
        if self._spread is not None and self._spread.takes(rows):
            self._spread.run(rows.contiguous(), sums)
            return y
        others = [t.reshape(-1, t.shape[-1]) for t in inputs if t is not None]
        under_way: deque[Iterator[None]] = deque()
        for chunk in self._chunks(len(rows)):
            under_way.append(self._start(rows[chunk], [t[chunk] for t in others], sums[chunk]))
            under_way = _advance(under_way)
        while under_way:
            under_way = _advance(under_way)
        return y

    def _chunks(self, tokens: int) -> list[slice]:
        step = self.chunk_tokens
        if step is None or self._whole_batch or tokens < 2 * step:
            step = tokens
        return [slice(first, min(first + step, tokens)) for first in range(0, tokens, step)]

    def _start(self, x: Tensor, inputs: list[Tensor], y: Tensor) -> Iterator[None]:
        """This rank's part of a chunk, computed when the first step is taken; then the steps of its sum."""
        if self.ranks == 1:
            part = torch.empty(x.shape, device=x.device)
            y.copy_(self._part(x, inputs, part))
            return
        if self._peers is not None:
            self._part(x, inputs, self._peers.part(x.numel()).view(x.shape))
            self._peers.sum(y)
            return
        flat = torch.empty(padded(x.numel(), self.ranks), device=x.device)
        self._part(x, inputs, flat[: x.numel()].view(x.shape))
        yield from sum_in_rank_order(flat, y, self.group)

    def _part(self, x: Tensor, inputs: list[Tensor], out: Tensor) -> Tensor:
        if self.routed is not None:
            indices, weights = inputs
            routing = indices - self.first_expert, weights
            if isinstance(self.shared, Nvfp4SharedExpert):
                return self.routed.with_shared(x, *routing, self.shared, out)
            self.routed(x, *routing, out)
            if self.shared is not None:
                out += self.shared(x, torch.empty_like(out))
            return out
        return out.zero_() if self.shared is None else self.shared(x, out)

    def extra_repr(self) -> str:
        first = f", first_expert={self.first_expert}" if self.routed is not None else ""
        return f"rank={self.rank} of {self.ranks}{first}, chunk_tokens={self.chunk_tokens}"


def _advance(under_way: deque[Iterator[None]]) -> deque[Iterator[None]]:
    """Take the next step of each, the newest first, so that its part travels early; those that are left."""
    steps = [(running, next(running, _DONE)) for running in reversed(under_way)]
    return deque(running for running, step in reversed(steps) if step is not _DONE)


_DONE: Any = object()


def check_cover(runs: list[tuple[int, int]], num_experts: int | None) -> None:
    """Raise LayoutError unless ranks hold [first, end) of the experts each: all the same ones, or no two one.

    Args:
        runs: of the ranks that have routed experts.
        num_experts: how many there are, 0 to the last of which must be held; None if that is not known.
    """
    runs = sorted(set(runs))
    rule, way_out = "must be shards of the same experts, or shares that have none in common", "see experts_of()"
    if any(first < end for (_, end), (first, _) in pairwise(runs)):
        raise LayoutError("experts of the ranks", rule, runs, way_out)
    ends = [0, *(end for _, end in runs)]
    if runs and num_experts is not None and ([first for first, _ in runs] != ends[:-1] or ends[-1] != num_experts):
        raise LayoutError("experts of the ranks", f"must be the router's 0 to {num_experts - 1}", runs, way_out)


def parallelize(
    model: nn.Module,
    group: ProcessGroup | DeviceMesh | None = None,
    plan: str = "tp",
    *,
    combine: str = "slots",
    chunk_tokens: int | None = None,
    direct: bool = True,
) -> nn.Module:
    """Exchange every NVFP4 expert layer of a model for this rank's part of it.

    What is looked for: `Nvfp4MoE`, and outside of it `Nvfp4SharedExpert` and `Nvfp4RoutedExperts`, any model that holds
    such modules; or the `LayerPart`s of a model that was loaded in parts. A collective: every rank of the group calls
    it on the same model.

    Args:
        model: the same weights on every rank, or each rank's part of them, on the device where they will run; changed
            in place. It may itself be such a layer.
        group: as for `SummedOverRanks`.
        plan: one of PLANS; HELD of part.py says what a rank holds. "dispatch" leaves shared experts whole.
        combine: of "dispatch"; see `DispatchedOverRanks`.
        chunk_tokens, direct: of the others; see `SummedOverRanks`.

    Returns:
        The model, or what stands in its place if it is such a layer itself.

    Raises:
        InputError: an option outside its range, no group, nothing to exchange, or parts of another plan or rank.
        LayoutError: ranks whose layers differ.

    Cost: one layer at a time is unpacked and its part packed; then the layer is let go.
    """
    checked_choice("plan", plan, PLANS)
    group, rank, ranks = checked_group(group)
    names = _names(model, plan)
    if not names:
        way_out = "swap or build the model's experts first"
        raise InputError("model", f"must have NVFP4 experts that plan {plan!r} is for", "none", way_out)
    for name in names:
        layer: Any = model.get_submodule(name)
        part = layer if isinstance(layer, LayerPart) else part_of(layer, plan, rank, ranks)
        if (part.plan, part.rank, part.ranks) != (plan, rank, ranks):
            rule, got = f"must be for plan {plan!r}, rank {rank} of {ranks}", part.extra_repr()
            raise InputError(f"part {name}", rule, got, "load it for the group and the plan that it will run in")
        made = _dispatched(part, group, combine) if plan == "dispatch" else _summed(part, group, chunk_tokens, direct)
        if not name:
            return made
        model.set_submodule(name, made)
        del layer, part, made  # the layer's memory goes before the next one's part is made
    return model


def _names(model: nn.Module, plan: str) -> list[str]:
    """Of the layers that a plan is for, those inside another left out."""
    found: list[str] = []
    for name, module in model.named_modules():
        inside = any(not outer or name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, _LAYERS) and not inside:
            found.append(name)
    if plan == "dispatch":
        return [name for name in found if not isinstance(model.get_submodule(name), Nvfp4SharedExpert)]
    return found


def _summed(part: LayerPart, group: ProcessGroup | None, chunk_tokens: int | None, direct: bool) -> nn.Module:
    return SummedOverRanks(
        group,
        shared=part.shared,
        routed=part.routed,
        router=part.router,
        first_expert=part.first_expert,
        chunk_tokens=chunk_tokens,
        direct=direct,
    )


def _dispatched(part: LayerPart, group: ProcessGroup | None, combine: str) -> nn.Module:
    routed = DispatchedOverRanks(part.routed, group, combine=combine, first_expert=part.first_expert)
    if part.router is None:
        return routed
    return Nvfp4MoE(part.router, routed, part.shared)  # type: ignore[arg-type]
