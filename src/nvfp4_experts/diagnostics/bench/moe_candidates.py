# SPDX-License-Identifier: Apache-2.0
"""Who takes part where a mixture of experts is timed: this library's block, and the same as people write it in torch.

As candidates.py says, but `prepare` takes `moe.MoeWeights`, and what it gives runs (x, step): one copy of the weights,
another routing each call. Bounds are those of one expert: the rows of a token err independently of each other, so their
sum is as far off as each of them.

Peers on CUDA sort the slots by expert, multiply by grouped GEMMs, and add what the slots of a token gave:

    rows    = x[slot // k], slots sorted by expert           (T k, H)
    h       = swiglu(gemm(rows, gate and up)) * weight       (T k, I), bf16
    y       = sum of gemm(h, down) over a token's slots + shared(x)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ...layers.moe import Nvfp4MoE
from ...layers.routed_experts import Nvfp4RoutedExperts
from ...layers.shared_expert import Nvfp4SharedExpert
from .candidates import OurMode, Prepared, TorchBf16Mode, fused, swiglu
from .moe import WEIGHTING, Experts, MoeWeights, Step
from .work import HIDDEN_SCALE, INPUT_SCALE, SWIGLU_LIMIT

GroupedGemm = Callable[[Tensor, Tensor], Tensor]
"""rows (M, K) grouped by expert, offsets (E + 1,) int32 of the groups -> (M, N)"""


class PresetRouter(nn.Module):
    """A router whose answer is known, whatever x is: the indices and weights of `step`."""

    step: Step

    def forward(self, x: Tensor, token_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.step.indices, self.step.weights


@dataclass(frozen=True)
class OursMoe(OurMode):
    """`Nvfp4MoE` behind a router whose answers are given."""

    def prepare(self, weights: MoeWeights, max_tokens: int) -> Prepared:
        options: dict[str, Any] = {
            "swiglu_limit": SWIGLU_LIMIT,
            "activations": self.activations,
            "activation_scale": self.activation_scale,
            "input_scale": INPUT_SCALE,
            "max_tokens": max_tokens,
            "backend": self.backend,
        }
        of_routed: dict[str, Any] = {
            "hidden_scale": weights.hidden_scale,
            "weighting": WEIGHTING,
            "top_k": weights.top_k,
        }
        routed = [Nvfp4RoutedExperts(e.gate, e.up, e.down, **of_routed, **options) for e in weights.layers]
        shared = [
            Nvfp4SharedExpert(w.gate, w.up, w.down, hidden_scale=HIDDEN_SCALE, **options)
            for w in (weights.shared.one_by_one() if weights.shared else ())
        ]
        router = PresetRouter()
        blocks: dict[tuple[int, int], Nvfp4MoE] = {}

        def run(x: Tensor, step: Step) -> Tensor:
            place = step.layer, step.place
            if place not in blocks:
                blocks[place] = Nvfp4MoE(router, routed[step.layer], shared[step.place] if shared else None)
            router.step = step
            y: Tensor = blocks[place](x)
            return y

        parts = (*routed, *shared)
        tensors = tuple(t for part in parts for t in part.buffers())
        backends = " and ".join(dict.fromkeys(part.backend for part in parts))
        return Prepared(run, tensors, sum(part.resident_bytes for part in parts), f"backend {backends}")


@dataclass(frozen=True)
class TorchBf16Moe(TorchBf16Mode):
    """The block without quantisation: torch's grouped GEMM on CUDA, elsewhere linears for each hit expert."""

    def prepare(self, weights: MoeWeights, max_tokens: int) -> Prepared:
        layers = [_decoded(experts) for experts in weights.layers]
        shared = _decoded(weights.shared) if weights.shared else ()
        experts, device = len(layers[0][0]), layers[0][0].device
        routed = loop_over_experts if device.type == "cpu" else partial(_grouped, Grouped(experts, device))
        activate = fused(swiglu, device.type)

        def run(x: Tensor, step: Step) -> Tensor:
            y = routed(x, step, *layers[step.layer])
            if shared:
                gate_up, down = (w[step.place] for w in shared)
                y += linear(activate(linear(x, gate_up)), down)
            return y.bfloat16()

        tensors = tuple(t for pair in (*layers, shared) for t in pair)
        detail = "F.linear for each hit expert" if device.type == "cpu" else "torch._grouped_mm"
        return Prepared(run, tensors, sum(t.nbytes for t in tensors), detail)


def loop_over_experts(x: Tensor, step: Step, gate_up: Tensor, down: Tensor) -> Tensor:
    """The routed experts' sum in fp32, (T, H), one hit expert after the other: gate_up (E, 2I, H), down (E, H, I)."""
    y = torch.zeros(x.shape, device=x.device)
    for expert in step.indices.unique().tolist():
        token, slot = (step.indices == expert).nonzero(as_tuple=True)
        h = swiglu(linear(x[token], gate_up[expert]), step.weights[token, slot, None])
        y.index_add_(0, token, linear(h, down[expert]).float())
    return y


class Grouped:
    """Routed experts by grouped GEMMs, as the module docstring says; nothing in it waits for the device."""

    def __init__(self, experts: int, device: torch.device) -> None:
        self._experts = torch.arange(experts + 1, device=device)
        self._activate, self._add = fused(swiglu, device.type), fused(add_slots, device.type)

    def __call__(self, x: Tensor, step: Step, gate_up: GroupedGemm, down: GroupedGemm) -> Tensor:
        """The routed experts' sum in fp32, (T, H)."""
        by_expert, slots = step.indices.flatten().sort(stable=True)
        offsets = torch.searchsorted(by_expert, self._experts, out_int32=True)
        rows = x[slots // step.indices.shape[1]]
        h = self._activate(gate_up(rows, offsets), step.weights.flatten()[slots, None])
        y: Tensor = self._add(down(h, offsets), slots, step.indices)
        return y


def add_slots(rows: Tensor, slots: Tensor, indices: Tensor) -> Tensor:
    """rows (T k, H) in the order of `slots` to the sum over each token's k, (T, H) fp32."""
    place = torch.empty_like(slots).scatter_(0, slots, torch.arange(len(slots), device=slots.device))
    return rows[place].view(*indices.shape, -1).float().sum(1)


def _grouped(run: Grouped, x: Tensor, step: Step, gate_up: Tensor, down: Tensor) -> Tensor:
    return run(x, step, partial(_grouped_mm, gate_up), partial(_grouped_mm, down))


def _grouped_mm(weight: Tensor, rows: Tensor, offsets: Tensor) -> Tensor:
    """rows (M, K) by expert times weight (E, N, K)."""
    y: Tensor = torch._grouped_mm(rows, weight.mT, offs=offsets[1:])
    return y


def _decoded(experts: Experts) -> tuple[Tensor, Tensor]:
    """gate and up as one (E, 2I, H), and down (E, H, I), in bf16; no expert is in memory twice."""
    count, rows, columns = experts.gate.shape
    gate_up = torch.empty(count, 2 * rows, columns, dtype=torch.bfloat16, device=experts.gate.device)
    down = torch.empty(count, columns, rows, dtype=torch.bfloat16, device=experts.gate.device)
    for i, w in enumerate(experts.one_by_one()):
        gate_up[i, :rows], gate_up[i, rows:] = w.gate.dequantize(torch.bfloat16), w.up.dequantize(torch.bfloat16)
        down[i] = w.down.dequantize(torch.bfloat16)
    return gate_up, down
