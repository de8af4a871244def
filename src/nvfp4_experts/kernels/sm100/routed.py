# SPDX-License-Identifier: Apache-2.0
"""Routed experts on Blackwell: all hit experts in one launch for each half of the layer.

    packed form   that of a shared expert, E times, stacked
    scratch       for max_tokens * top_k slots: x and h as they enter, h in fp32 (not for "static"), and a row (H,) of
                  results in fp32 for each slot, most of it: 4 H bytes

Nothing on the host reads which experts are hit, so a captured call may be replayed with another routing. How a call is
cut up depends on the number of slots alone (config.choose_routed).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..cuda.alignment import run_aligned
from ..dispatch import Call, Problem, Routing
from ..one_by_one import StackedExperts
from ..target import target_of
from .backend import BACKEND, Sm100Backend
from .config import routed_ranges


class Sm100RoutedExperts(StackedExperts):
    """See the module docstring."""

    one: Sm100Backend

    def prepare(self, problem: Problem, device: torch.device, max_tokens: int) -> None:
        """Reserve scratch; compile and load what calls run, whatever the dtype of x, of the result and of indices."""
        from .warm import make_ready

        layer = problem.target, problem.activation_scale, problem.hidden, problem.intermediate
        plans = [
            self.one.plan(*layer, min(slots, max_tokens), problem.experts, slots)
            for slots in routed_ranges(max_tokens * problem.top_k, problem.experts)
        ]
        if device.type != "cpu":
            make_ready(device, plans, (torch.bfloat16, torch.float16, torch.float32))

    def prepare_moe(self, shared: Problem, device: torch.device, max_tokens: int) -> None:
        """Compile and load what the shared expert launches for its result in fp32."""
        if self.one.refusal(shared) is None:
            self.one.prepare_for(torch.float32, shared, device, max_tokens)

    def routed_experts(self, x: Tensor, weights: list[Tensor], routing: Routing, call: Call, out: Tensor) -> None:
        experts, rows = weights[0].shape[:2]
        layer = target_of(x.device), call.activation_scale, x.shape[1], rows // 2
        plan = self.one.plan(*layer, x.shape[0], experts, routing.indices.numel())
        run_aligned(self.one.launch, x, weights, call, plan, routing, out=out)


ROUTED = Sm100RoutedExperts(BACKEND)
