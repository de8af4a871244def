# SPDX-License-Identifier: Apache-2.0
"""A mixture of experts on a device: random weights, random routings, and what is right.

    y = sum over slots of expert(x, weighted) + shared(x)       the router is not part of it: its answers are given

Weights are drawn in NVFP4, in blocks of 16: each is one of 65,536 (codes and scale) that quantising N(0, 1) gave, so
they are distributed as quantised Gaussian weights are, and no gigabytes of floats are quantised. Each expert's global
scales are its own. Values stay near N(0, 1) along a chain of calls as `work` says, with down's standard deviation over
the square root of what the outputs' variances add up to, 1 of the shared expert and sum(w^2) of the routed:

    w = u / sum(u) * factor, u ~ U(0.5, 1.5)        sum(w^2) = factor^2 * 13/12 / k

**Routings.** Each token takes k of E experts, uniformly, without replacement. A chain has as many calls, each with a
routing and a shared expert of its own, as it takes to read `rotate` bytes of weights, and two at least. Which experts
stand for those that a routing hits is dealt from a shuffled deck, so that no expert comes again in the chain; when the
deck is too small, from that of another layer (more weights). A call that reads enough by itself may be followed by one
that hits the same experts: between two reads of a weight lies a whole call, on the mean. So at any T loads are those of
uniform routing, and no weight is in a cache because of the call before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ...formats.codes import BLOCK_SIZE
from ...formats.nvfp4 import Nvfp4Tensor, quantize
from ...formats.stack import Nvfp4Stack
from ...kernels import reference
from ...layers.routing import weights_of
from .candidates import Prepared
from .task import KnownOutputs, shared_expert_output
from .timing import Call
from .work import DOWN_STD, GATE_UP_STD, HIDDEN_SCALE, INPUT_SCALE, SWIGLU_LIMIT, MoeWork, Weights

WEIGHTING = "before_down"
_POOL_SHAPE = (512, 2048)  # 65,536 blocks
_MEAN_SQUARE = 13 / 12  # of u
_SCALE_SPREAD = 0.2  # experts' global scales are within 20 % of the mean


class Experts(NamedTuple):
    """E experts: gate (E, I, H), up (E, I, H) and down (E, H, I); gate and up of one share a global scale."""

    gate: Nvfp4Stack
    up: Nvfp4Stack
    down: Nvfp4Stack

    def one_by_one(self) -> list[Weights]:
        """Each expert's own, over the same memory."""
        return [Weights(self.gate[i], self.up[i], self.down[i]) for i in range(len(self.gate))]


@dataclass(frozen=True)
class MoeWeights:
    """What candidates are built from.

    Args:
        layers: routed experts, as many times as the chains need.
        shared: shared experts, one for each call of the longest chain, stacked likewise; None if there is none.
        top_k: k.
        hidden_scale: static scale of weighted h, for all experts.
    """

    layers: tuple[Experts, ...]
    shared: Experts | None
    top_k: int
    hidden_scale: float


@dataclass(frozen=True)
class Step:
    """One call of a chain.

    Args:
        layer, place: which of `MoeWeights.layers`, and which of `shared`.
        indices: (T, k) int64.
        weights: (T, k) fp32.
        hits: distinct experts among the indices.
    """

    layer: int
    place: int
    indices: Tensor
    weights: Tensor
    hits: int


def draw_steps(work: MoeWork, tokens: int, rotate: int, device: torch.device) -> tuple[Step, ...]:
    """The routings of a chain of calls with so many tokens, the same on every machine."""
    g = torch.Generator().manual_seed(tokens)
    steps: list[Step] = []
    read, layer, deck = 0.0, 0, torch.randperm(work.experts, generator=g)
    while len(steps) < 2 or read < rotate:
        drawn = torch.rand(tokens, work.experts, generator=g).topk(work.top_k).indices
        distinct, place_in = drawn.unique(return_inverse=True)
        if len(deck) < len(distinct):
            layer += read < rotate
            deck = torch.randperm(work.experts, generator=g)
        dealt, deck = deck[: len(distinct)], deck[len(distinct) :]
        u = torch.rand(tokens, work.experts, generator=g) + 0.5
        weights = weights_of(u, drawn, normalise=True, scaling_factor=work.scaling_factor)
        steps.append(Step(layer, len(steps), dealt[place_in].to(device), weights.to(device), len(distinct)))
        read += work.bytes_read(len(distinct), 0)
    return tuple(steps)


def draw_weights(work: MoeWork, layers: int, shared: int, device: torch.device) -> MoeWeights:
    """Random weights; see the module docstring.

    Cost: one index and one gather a block of 16, expert after expert; V4-Flash's 256 experts are 3.6 GB.
    """
    blocks = _Blocks(device)
    variance = work.shared + work.scaling_factor**2 * _MEAN_SQUARE / work.top_k
    down_std = DOWN_STD / variance**0.5

    def draw(experts: int) -> Experts:
        of = work.expert
        gate_up_scales, down_scales = blocks.scales(experts), blocks.scales(experts)
        gate, up = (blocks.draw(of.intermediate, of.hidden, GATE_UP_STD, gate_up_scales) for _ in range(2))
        return Experts(gate, up, blocks.draw(of.hidden, of.intermediate, down_std, down_scales))

    return MoeWeights(
        tuple(draw(work.experts) for _ in range(layers)),
        draw(shared) if work.shared else None,
        work.top_k,
        HIDDEN_SCALE * work.scaling_factor,
    )


class MoeTask(KnownOutputs):
    """See `task.Task`; one copy of the weights serves all calls."""

    def __init__(self, work: MoeWork, device: torch.device, counts: Sequence[int], rotate: int) -> None:
        super().__init__()
        self._work, self._device = work, device
        self.steps = {count: draw_steps(work, count, rotate, device) for count in counts}
        chains = self.steps.values()
        layers = 1 + max(step.layer for steps in chains for step in steps)
        self.weights = draw_weights(work, layers, max(map(len, chains)), device)

    def copies(self, nbytes: int) -> int:
        return 1

    def calls(self, copies: Sequence[Prepared], tokens: int) -> list[Call]:
        return [partial(copies[0].run, step=step) for step in self.steps[tokens]]

    def start(self, tokens: int) -> Tensor:
        return self._work.expert.hidden_states(tokens, self._device)

    def input(self, tokens: int) -> Tensor:
        return self._work.expert.check_states(tokens, self._device)

    def hits(self, tokens: int) -> float | None:
        return sum(step.hits for step in self.steps[tokens]) / len(self.steps[tokens])

    def floor_seconds(self, tokens: int, read_rate: float, matmul_rate: float) -> float:
        return self._work.floor_seconds(tokens, read_rate, matmul_rate, self.hits(tokens))

    def _output(self, tokens: int, activations: str, activation_scale: str) -> Tensor:
        x, step, weights = self.input(tokens).float(), self.steps[tokens][0], self.weights
        per_expert = torch.ones(self._work.experts, device=self._device)
        y = reference.routed_experts(
            x,
            *weights.layers[step.layer],
            step.indices,
            step.weights,
            swiglu_limit=SWIGLU_LIMIT,
            activations=activations,
            activation_scale=activation_scale,
            input_scale=INPUT_SCALE * per_expert,
            hidden_scale=weights.hidden_scale * per_expert,
            weighting=WEIGHTING,
        )
        if weights.shared is not None:
            w = weights.shared.one_by_one()[step.place]
            y += shared_expert_output(x, w, activations, activation_scale)
        return y.bfloat16()


class _Blocks:
    """Quantised blocks of N(0, 1) to draw weights from."""

    def __init__(self, device: torch.device) -> None:
        self._generator = torch.Generator(device).manual_seed(0)
        q: Nvfp4Tensor = quantize(torch.randn(_POOL_SHAPE, generator=self._generator, device=device))
        self._codes, self._scales = q.codes.view(torch.int64).flatten(), q.block_scales.view(torch.uint8).flatten()
        self._global_scale = q.global_scale

    def scales(self, experts: int) -> Tensor:
        """(E,) factors near 1."""
        spread = torch.rand(experts, generator=self._generator, device=self._codes.device)
        return 1 + _SCALE_SPREAD * (2 * spread - 1)

    def draw(self, rows: int, columns: int, std: float, factors: Tensor) -> Nvfp4Stack:
        """(E, rows, columns) of N(0, std^2 / columns), times each expert's factor; expert after expert."""
        device, count = self._codes.device, rows * columns // BLOCK_SIZE
        codes = torch.empty(len(factors), rows, columns // 2, dtype=torch.uint8, device=device)
        scales = torch.empty(len(factors), rows, columns // BLOCK_SIZE, dtype=torch.uint8, device=device)
        for expert_codes, expert_scales in zip(codes, scales, strict=True):
            i = torch.randint(len(self._codes), (count,), generator=self._generator, device=device)
            torch.index_select(self._codes, 0, i, out=expert_codes.view(torch.int64).flatten())
            torch.index_select(self._scales, 0, i, out=expert_scales.flatten())
        global_scale = self._global_scale * (std / columns**0.5) * factors
        return Nvfp4Stack(codes, scales.view(torch.float8_e4m3fn), global_scale)
