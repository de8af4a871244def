# SPDX-License-Identifier: Apache-2.0
"""Routed experts on Hopper: which kernels run them.

    bf16, up to 8 tokens and 64 slots    routed_decode.py, one launch
    else                                 grouped.py

Kernels keep rows apart, so a token's result does not depend on the others (but for "dynamic").
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..cuda.workspace import bytes_of, exclusive, reserve
from ..dispatch import Call, Problem, Routing
from ..one_by_one import StackedExperts
from . import grouped, routed_decode
from .backend import BACKEND

_MAX_EXPERTS = 8192  # each with a count in the shared memory of one block


class Sm90RoutedExperts(StackedExperts):
    """See the module docstring."""

    def refusal(self, problem: Problem) -> str | None:
        if (reason := super().refusal(problem)) is not None:
            return reason
        if problem.activations == "fp8":
            return "has no kernel for routed experts with fp8 activations"
        if problem.experts > _MAX_EXPERTS:
            return f"takes at most {_MAX_EXPERTS} experts"
        return None

    def prepare(self, problem: Problem, device: torch.device, max_tokens: int) -> None:
        """Compile and load what a call with bf16 hidden states runs, and reserve its scratch."""
        modes = ("static", "dynamic", "per_token") if problem.activations == "nvfp4" else ("bf16",)
        experts, top_k = problem.experts, problem.top_k
        with torch.cuda.device(device):
            grouped.prepare(experts, modes, max_tokens * top_k, device)
            if problem.activations == "bf16":
                routed_decode.prepare(problem.hidden, problem.intermediate, device)
            sizes = problem.hidden, problem.intermediate, experts, max_tokens, top_k
            reserve(device, max(bytes_of(list(grouped.scratch(mode, *sizes).values())) for mode in modes))
        torch.cuda.synchronize(device)

    def routed_experts(self, x: Tensor, weights: list[Tensor], routing: Routing, call: Call, out: Tensor) -> None:
        if x.data_ptr() % 16:
            x = x.clone()
        with torch.cuda.device(x.device), exclusive(x.device):
            few = call.activations == "bf16" and routed_decode.takes(*routing.indices.shape)
            run = routed_decode.routed_experts if few else grouped.routed_experts
            run(x, weights, routing, call, out)


ROUTED = Sm90RoutedExperts(BACKEND)
