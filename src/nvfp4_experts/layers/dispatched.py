# SPDX-License-Identifier: Apache-2.0
"""Expert parallel where every rank has tokens of its own: rows go to the ranks of their experts, results come back.

    count     for each rank: how many of its experts' rows and slots are here; all counts to all ranks    a host wait
    dispatch  a row of x once to each rank that has an expert of its token, with its indices and weights
    compute   the rank's routed experts on all rows that came
    combine   fp32 rows back, added in fp32 by the token's own rank, rounded once

Bytes that a rank sends, T tokens, k slots each of which g are on g' other ranks (on the mean; g' <= g <= k):

    dispatch  T g' (H x.itemsize + 8 k)
    combine   4 T g H for "slots", 4 T g' H for "ranks"
"""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from ..errors import InputError, LayoutError
from .checks import DTYPES, check_hidden_states, check_out, check_routing, checked_choice
from .collectives import agree, checked_group, device_of, exchange, gather
from .packed import NoBackward
from .routed_experts import Nvfp4RoutedExperts
from .shards import check_modes, facts_of, modes_of

COMBINES = ("slots", "ranks")


class DispatchedOverRanks(nn.Module):
    """Routed experts of which each rank has a share, for tokens of which each rank has its own.

    Called as `Nvfp4RoutedExperts` is, with indices of the whole: rank 0 has the first experts, rank 1 the next, and so
    on. Building it is a collective, and so is a call: every rank makes it, with any number of tokens, none included.

    Args:
        local: this rank's share, of any size, or None if it has no expert. Its max_tokens is the largest T of a call on
            one rank.
        group: a process group, a mesh of one dimension, or None for the default group.
        combine: what an expert's rank returns: "slots", a row for each slot; or "ranks", one row for each token, in
            which the rank's slots are added already: fewer bytes, in another order.
        first_expert: which of the whole is the first of the share, to be checked; None: whichever it is.

    Raises:
        InputError: no group, no experts on any rank, or an option outside its range.
        LayoutError: shares that differ in more than their experts, or do not follow each other as their first_expert
            says; on every rank.

    Numerics: with "slots" the result is that of the whole layer on the tokens of all ranks together, in every mode,
        "dynamic" included, as far as the backend's rows do not depend on how many there are. With "ranks" the order of
        the last sum differs: slots by rank, then ranks in order.

    Cost: see the module docstring. One wait by the host, for the counts: no CUDA graph can capture a call. Scratch for
        ranks * max_tokens * top_k rows, since all tokens may go to one rank. Inference only.
    """

    _bounds: Tensor

    def __init__(
        self,
        local: Nvfp4RoutedExperts | None,
        group: ProcessGroup | DeviceMesh | None = None,
        *,
        combine: str = "slots",
        first_expert: int | None = None,
    ) -> None:
        super().__init__()
        self.group, self.rank, self.ranks = checked_group(group)
        self.combine = checked_choice("combine", combine, COMBINES)
        mine = {"combine": combine, "share": facts_of(local), "experts": 0 if local is None else local.num_experts}
        said = agree(self.group, mine | {"first": first_expert}, own=["experts", "first"])
        share = next((rank["share"] for rank in said if rank["share"] is not None), None)
        if share is None:
            raise InputError("local", "must have experts on some rank", "none", "give each rank its share")
        self.hidden_size, self.top_k, self.max_tokens = share["hidden_size"], share["top_k"], share["max_tokens"]
        self._dynamic = (share["activations"], share["activation_scale"]) == ("nvfp4", "dynamic")
        bounds = list(accumulate((rank["experts"] for rank in said), initial=0))
        firsts = [rank["first"] if rank["experts"] else None for rank in said]
        if any(first not in (None, bound) for first, bound in zip(firsts, bounds, strict=False)):
            rule = f"must follow each other by rank, from experts {bounds[:-1]}"
            raise LayoutError("shares", rule, f"from {firsts}", "give each rank experts_of(rank, ranks, E)")
        self.num_experts = bounds[-1]
        # Where each rank's experts begin, and behind the last; copied here, since in a call a copy would be a wait.
        self.register_buffer("_bounds", torch.tensor(bounds, device=device_of(local)), persistent=False)
        rows = self.ranks * self.max_tokens
        slots = (rows * self.top_k, 1) if combine == "slots" else (rows, self.top_k)
        # A layer of shared weights, made for all that can come to one rank; with "dynamic" one row more.
        self.local = None if local is None else local.with_capacity(slots[0] + self._dynamic, slots[1])
        self._modes = modes_of(self.local)

    def forward(self, x: Tensor, topk_indices: Tensor, topk_weights: Tensor, out: Tensor | None = None) -> Tensor:
        """Run the experts of this rank's tokens, wherever they are.

        Args:
            x: (..., H) bf16, fp16 or fp32, at most max_tokens rows, the same dtype on every rank.
            topk_indices: (..., k) int32 or int64, k the same on every rank; one outside [0, E) adds nothing.
            topk_weights: (..., k), as for `Nvfp4RoutedExperts`.
            out: as for `Nvfp4RoutedExperts`.

        Returns:
            (..., H) in the dtype of x, or `out`.

        Raises:
            InputError: an argument does not fit, or the share's activations have changed, on this rank while the others
                wait for it; or ranks differ in k or dtype, on all of them. Nothing has been computed.
            CalibrationError: static scales asked for and there are none.
        """
        check_hidden_states(x, self.hidden_size, self.max_tokens, x.device)
        check_routing(x, topk_indices, topk_weights, self.top_k, x.device)
        check_modes(self._modes, self.local)
        if out is not None:
            check_out(x, out)
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
        self._run(x, topk_indices, topk_weights, y)
        wants_grad = out is None and torch.is_grad_enabled() and (x.requires_grad or topk_weights.requires_grad)
        return NoBackward.apply(y, "routed experts over ranks", x, topk_weights) if wants_grad else y

    @torch.no_grad()
    def _run(self, x: Tensor, indices: Tensor, weights: Tensor, y: Tensor) -> None:
        rows = x.reshape(-1, self.hidden_size)
        (tokens, top_k), device = (len(rows), indices.shape[-1]), x.device
        indices, weights = indices.reshape(-1, top_k).long(), weights.reshape(-1, top_k).float()
        bounds = self._bounds.to(device)
        firsts, ends = bounds[:-1], bounds[1:]
        # (T, k, R): the slot's expert is on the rank
        here = (indices[..., None] >= firsts) & (indices[..., None] < ends)
        wanted = here.any(1)  # (T, R): the rank gets the token's row

        row_counts, slot_counts = self._counts(wanted.sum(0), here.sum((0, 1)), top_k, x.dtype)
        send, receive = row_counts[self.rank], [row[self.rank] for row in row_counts]
        rank, token = wanted.T.nonzero(as_tuple=True)  # rank by rank, tokens ascending
        local_indices = torch.where(here[token, :, rank], indices[token] - firsts[rank, None], -1).int()
        routing = torch.cat((local_indices, weights[token].view(torch.int32)), dim=1)
        routing = exchange(routing, send, receive, self.group)
        came = exchange(rows[token], send, receive, self.group)
        amax = self._amax(rows) if self._dynamic else None
        results = self._compute(came, routing[:, :top_k], routing[:, top_k:].view(torch.float32), amax)

        column = rank
        if self.combine == "slots":  # in the order in which _compute takes them apart
            rank, token, column = here.permute(2, 0, 1).nonzero(as_tuple=True)
            send, receive = slot_counts[self.rank], [row[self.rank] for row in slot_counts]
        back = torch.empty(len(token) + 1, self.hidden_size, device=device)
        exchange(results, receive, send, self.group, into=back[:-1])
        back[-1] = 0  # the row of whatever is on no rank
        place = token.new_full((tokens, top_k if self.combine == "slots" else self.ranks), len(token))
        place[token, column] = torch.arange(len(token), device=device)
        total = torch.zeros(rows.shape, device=device)
        for of_column in place.unbind(1):
            total += back[of_column]
        y.copy_(total.view(y.shape))

    def _counts(
        self, rows: Tensor, slots: Tensor, top_k: int, dtype: torch.dtype
    ) -> tuple[list[list[int]], list[list[int]]]:
        """How many rows and slots each rank has for each rank, on the host: [from][to]."""
        kind = rows.new_full((1,), top_k), rows.new_full((1,), DTYPES.index(dtype))
        said = gather(torch.cat((rows, slots, *kind)), self.group).tolist()
        kinds = [(one[-2], str(DTYPES[one[-1]])) for one in said]
        if len(set(kinds)) > 1:
            raise InputError(
                "topk_indices and x", "must have one k and one dtype on all ranks", kinds, "make them alike"
            )
        return [one[: self.ranks] for one in said], [one[self.ranks : 2 * self.ranks] for one in said]

    def _amax(self, rows: Tensor) -> Tensor:
        """() in the dtype of x: the amax of the tokens of all ranks, which "dynamic" scales by; NaN if there is one."""
        mine = rows.abs().amax().reshape(1) if len(rows) else rows.new_zeros(1)
        return gather(mine, self.group).amax()

    def _compute(self, x: Tensor, indices: Tensor, weights: Tensor, amax: Tensor | None) -> Tensor:
        """What this rank's experts give for the rows that came: fp32, a row for each of them or for each slot here."""
        if self.combine == "slots":
            row, slot = (indices >= 0).nonzero(as_tuple=True)
            x, indices, weights = x[row], indices[row, slot, None], weights[row, slot, None]
        count = len(x)
        if self.local is None or not count:
            return torch.empty(count, self.hidden_size, device=x.device)
        if amax is not None:  # one more row, of no expert: it adds nothing, and the batch has the amax of all ranks'
            x = torch.cat((x, x.new_zeros(1, self.hidden_size)))
            x[-1, 0] = amax
            indices = torch.cat((indices, indices.new_full((1, indices.shape[1]), -1)))
            weights = torch.cat((weights, weights.new_zeros(1, weights.shape[1])))
        results = torch.empty(x.shape, device=x.device)
        self.local(x, indices, weights, results)
        return results[:count]

    def extra_repr(self) -> str:
        return f"rank={self.rank} of {self.ranks}, num_experts={self.num_experts}, combine={self.combine!r}"
