# SPDX-License-Identifier: Apache-2.0
"""A shared expert on Hopper out of the packed shards of several ranks, for many tokens.

    gate, up    shards one after the other are the whole layer's; each alone writes its own channels of h
    down        shards side by side along K are the whole layer's

Operands and sums are those of gemm.py for the whole layer, and so are the bits. Shards are runs of channels in order,
whole chunks of 64 but for the last.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...layouts.fragments import COLUMNS, ROWS, fragment_bytes
from ..cuda.workspace import Part
from ..dispatch import Call, Problem
from ..target import target_of
from . import gemm
from .choice import choose
from .config import GemmConfig


@dataclass(frozen=True)
class OverShards:
    """A layer in shards.

    Args:
        hidden: H.
        sizes: channels of each shard, in order.
    """

    SEEN = (0, 3)  # what ranks need of each other, of what `Sm90Backend.pack` makes: gate and up, down

    hidden: int
    sizes: tuple[int, ...]

    @property
    def size(self) -> int:
        """I."""
        return sum(self.sizes)

    def refusal(self, problem: Problem) -> str | None:
        """Why these shards cannot be run so, as a clause; None if they can."""
        if problem.activations != "bf16" and (problem.activations, problem.activation_scale) != ("nvfp4", "static"):
            return "something is measured on h, of which a rank has a part"
        if any(size % COLUMNS for size in self.sizes[:-1]):
            return f"shards of {self.sizes} channels are not whole chunks of {COLUMNS}"
        return None

    def bytes_of(self, rank: int) -> tuple[int, int]:
        """Of what is SEEN of a shard."""
        return fragment_bytes(2 * self.sizes[rank], self.hidden), fragment_bytes(self.hidden, self.sizes[rank])

    def parts(self, tokens: int, is_entered: bool) -> dict[str, Part]:
        """What a call needs besides its result: the whole layer's packed weights, h, and x as it enters."""
        parts: dict[str, Part] = {
            "gate_up": ((fragment_bytes(2 * self.size, self.hidden),), torch.uint8),
            "down": ((self.hidden // ROWS, fragment_bytes(ROWS, self.size)), torch.uint8),
            "h": ((tokens, self.size), torch.bfloat16),
        }
        if is_entered:
            parts["values"] = (tokens, self.hidden), torch.bfloat16
        return parts

    def gate_up_of(self, rank: int, gate_up: Tensor) -> Tensor:
        """A shard's place in the whole packed gate and up."""
        begin = sum(self.bytes_of(before)[0] for before in range(rank))
        return gate_up[begin : begin + self.bytes_of(rank)[0]]

    def down_of(self, rank: int, down: Tensor) -> Tensor:
        """A shard's place in the whole packed down, (tiles, bytes)."""
        begin = sum(fragment_bytes(ROWS, size) for size in self.sizes[:rank])
        return down[:, begin : begin + fragment_bytes(ROWS, self.sizes[rank])]

    def prepare(self, problem: Problem, max_tokens: int, device: torch.device) -> None:
        """Compile and load what calls run for bf16 hidden states, up to a number of tokens."""
        gemm.prepare(replace(problem, intermediate=self.size), device, max_tokens)

    def enter(self, x: Tensor, call: Call, values: Tensor | None) -> Tensor:
        """x as it enters the first GEMM, in `values` where it is not x itself."""
        if values is None:
            return x
        if call.activations == "bf16":
            return values.copy_(x)
        gemm.enter(x, "static", call.input_scale, values, None)
        return values

    def first(
        self,
        values: Tensor,
        gate_up: Tensor,
        rank: int | None,
        own: list[Tensor],
        call: Call,
        configs: tuple[GemmConfig, GemmConfig],
        h: Tensor,
    ) -> None:
        """h (T, I), or a rank's channels of it, by packed gate and up; own: this rank's packed weights."""
        begin = sum(self.sizes[:rank]) if rank is not None else 0
        size = self.sizes[rank] if rank is not None else self.size
        static = call.activations == "nvfp4"
        gemm.run_half(
            values,
            gate_up,
            2 * size,
            own[1],
            h[:, begin : begin + size],
            configs[0],
            gate_up=True,
            limit=call.clamp,
            token_scales=call.input_scale if static else None,
            hidden_scale=call.hidden_scale if static else None,
        )

    def second(
        self,
        h: Tensor,
        down: Tensor,
        own: list[Tensor],
        call: Call,
        configs: tuple[GemmConfig, GemmConfig],
        out: Tensor,
    ) -> None:
        """h (T, I) to out (T, H)."""
        scale = call.hidden_scale if call.activations == "nvfp4" else None
        gemm.run_half(h, down, self.hidden, own[4], out, configs[1], gate_up=False, token_scales=scale)

    def configs_of(self, run: int, tokens: int, device: torch.device) -> tuple[GemmConfig, GemmConfig]:
        """Of both halves, for a run of this rank's tokens: the run's, where it adds up sums as all tokens' would."""
        of_run, of_all = (choose(self.hidden, self.size, count, target_of(device)) for count in (run, tokens))
        first, second = (a if a.parts == b.parts else b for a, b in zip(of_run, of_all, strict=True))
        return first, second
