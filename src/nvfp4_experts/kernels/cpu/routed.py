# SPDX-License-Identifier: Apache-2.0
"""Routed experts on a CPU: one native call per hit expert, on its tokens' rows, gathered.

    scratch    that of a shared expert, x in fp32 of one expert's tokens at a time, and a row (H,) in fp32 per slot

For nvfp4 every tier and any number of threads give the same bits. Weights of an expert that no token goes to are not
read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import Call, Routing
from ..one_by_one import StackedExperts, add_slots, hit_experts, of_expert
from .backend import BACKEND, run_expert


class CpuRoutedExperts(StackedExperts):
    """See the module docstring."""

    def routed_experts(self, x: Tensor, weights: list[Tensor], routing: Routing, call: Call, out: Tensor) -> None:
        (tokens, hidden), top_k = x.shape, routing.indices.shape[1]
        factors = routing.weights.view(-1)
        dynamic = call.activations == "nvfp4" and call.activation_scale == "dynamic"
        input_amax = x.abs().amax().float() if dynamic else None
        rows = torch.zeros(tokens * top_k, hidden)
        for expert, slots in hit_experts(routing, len(weights[0])):
            # In fp32 x is the same values, and rows come out unrounded.
            gathered, own = x[slots // top_k].float(), of_expert(call, expert)
            before = factors[slots] if routing.weighting == "before_down" else None
            result = torch.empty_like(gathered)
            run_expert(gathered, [w[expert] for w in weights], own, result, input_amax, before)
            rows[slots] = result if before is not None else result * factors[slots, None]
        add_slots(rows.view(tokens, top_k, hidden), out)


ROUTED = CpuRoutedExperts(BACKEND)
