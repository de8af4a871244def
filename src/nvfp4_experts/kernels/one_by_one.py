# SPDX-License-Identifier: Apache-2.0
"""Routed experts by way of shared ones: what backends have in common.

packed form   that of a shared expert, E times, stacked (`StackedExperts`)
a call        one hit expert after the other (`OneByOne`): slots grouped by expert (the counts are read on the host: a
              GPU waits here); rows (T * k, H) fp32, one a slot, each expert writing its own; a token's are added in
              slot order
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..formats.stack import Nvfp4Stack, StackLike
from .dispatch import Backend, Beside, Call, Problem, Routing


class StackedExperts:
    """Everything of a `RoutedBackend` but the computation, from the backend of one expert."""

    def __init__(self, one: Backend) -> None:
        self.one, self.name = one, one.name

    def refusal(self, problem: Problem) -> str | None:
        return self.one.refusal(problem)

    def pack(self, gate: StackLike, up: StackLike, down: StackLike) -> dict[str, Tensor]:
        stacks: dict[str, Tensor] = {}
        for expert in range(len(gate)):
            self._put(stacks, expert, len(gate), self.one.pack(gate[expert], up[expert], down[expert]))
        return stacks

    def _put(self, stacks: dict[str, Tensor], expert: int, experts: int, packed: dict[str, Tensor]) -> None:
        """Into its place; apart from the loop, so that nothing of one expert lives on while the next is packed."""
        for name, tensor in packed.items():
            if name not in stacks:
                stacks[name] = self.room(tensor, experts)
            stacks[name][expert] = tensor

    def room(self, tensor: Tensor, experts: int) -> Tensor:
        """Memory for so many of that tensor, stacked."""
        return tensor.new_empty((experts, *tensor.shape))

    def unpack(self, weights: Mapping[Any, Tensor], hidden: int, intermediate: int) -> tuple[Nvfp4Stack, ...]:
        experts = len(next(iter(weights.values())))
        unpacked = [
            self.one.unpack({name: stack[expert] for name, stack in weights.items()}, hidden, intermediate)
            for expert in range(experts)
        ]
        return tuple(Nvfp4Stack.of(projection) for projection in zip(*unpacked, strict=True))

    def prepare(self, problem: Problem, device: torch.device, max_tokens: int) -> None:
        self.one.prepare(problem, device, max_tokens)

    def scratch_bytes(self, device: torch.device) -> int:
        return self.one.scratch_bytes(device)

    def routed_experts(self, x: Tensor, weights: list[Tensor], routing: Routing, call: Call, out: Tensor) -> None:
        raise NotImplementedError

    def prepare_moe(self, shared: Problem, device: torch.device, max_tokens: int) -> None:
        pass

    def moe(self, x: Tensor, weights: list[Tensor], routing: Routing, call: Call, beside: Beside, out: Tensor) -> None:
        """One after the other."""
        total, more = (torch.empty(x.shape, device=x.device) for _ in range(2))
        self.routed_experts(x, weights, routing, call, total)
        beside.backend.shared_expert(x, beside.weights, beside.call, more)
        out.copy_(total.add_(more))


def hit_experts(routing: Routing, experts: int) -> Iterator[tuple[int, Tensor]]:
    """(expert, its slots t * k + s in ascending order) for each expert that has any."""
    indices = routing.indices.flatten().long()
    here = (indices >= 0) & (indices < experts)
    grouped, slots = torch.where(here, indices, experts).sort(stable=True)
    counts = torch.bincount(grouped, minlength=experts + 1)[:experts].tolist()
    start = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, slots[start : start + count]
        start += count


def of_expert(call: Call, expert: int) -> Call:
    """The call with that expert's static scales in place of all."""
    input_scale, hidden_scale = (None if s is None else s[expert] for s in (call.input_scale, call.hidden_scale))
    return dataclasses.replace(call, input_scale=input_scale, hidden_scale=hidden_scale)


class OneByOne(StackedExperts):
    """Routed experts, one hit expert after the other, from how x enters and what one expert computes."""

    def enter(self, x: Tensor, call: Call, static_scale: Tensor | None) -> Any:
        """x (T, H) in its activation format."""
        raise NotImplementedError

    def take(self, entered: Any, token: Tensor) -> Any:
        """Rows of what `enter` gave, in the order of `token`."""
        raise NotImplementedError

    def expert(self, entered: Any, weights: dict[int, Tensor], call: Call, factors: Tensor | None) -> Tensor:
        """Rows (T, H) fp32 of one expert; h is multiplied by `factors` (T, 1) before it enters, if there are any."""
        raise NotImplementedError

    @torch.no_grad()
    def routed_experts(self, x: Tensor, weights: list[Tensor], routing: Routing, call: Call, out: Tensor) -> None:
        (tokens, hidden), top_k = x.shape, routing.indices.shape[1]
        factors = routing.weights.view(-1, 1)
        # Static scales of x are an expert's own; by any other rule x enters once, whole, for all experts.
        static = call.activations == "nvfp4" and call.activation_scale == "static"
        entered = None if static else self.enter(x, call, None)
        rows = torch.zeros(tokens * top_k, hidden, device=x.device)
        for expert, slots in hit_experts(routing, len(weights[0])):
            own, token, weight = of_expert(call, expert), slots // top_k, factors[slots]
            here = self.enter(x[token], own, own.input_scale) if entered is None else self.take(entered, token)
            before = routing.weighting == "before_down"
            result = self.expert(here, {i: w[expert] for i, w in enumerate(weights)}, own, weight if before else None)
            rows[slots] = result if before else result * weight
        add_slots(rows.view(tokens, top_k, hidden), out)


def add_slots(rows: Tensor, out: Tensor) -> None:
    """rows (T, k, H) fp32 to out (T, H): ((0 + row_0) + row_1) + ..., rounded once to its dtype."""
    total = torch.zeros(out.shape, device=out.device)
    for of_slot in rows.unbind(1):
        total += of_slot
    out.copy_(total)
