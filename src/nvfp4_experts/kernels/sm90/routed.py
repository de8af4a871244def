# SPDX-License-Identifier: Apache-2.0
"""Routed experts on Hopper, and a shared expert beside them: which kernels run them.

    bf16, up to 8 tokens and 64 slots    routed_decode.py, one launch, a shared expert of the same size a group of it;
                                         not where I is below 100 or so (`routed_decode.fits`)
    else                                 grouped.py; the shared expert first, its fp32 result added with the rows

Kernels keep rows apart, so a token's result does not depend on the others (but for "dynamic").
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..cuda.alignment import run_aligned
from ..cuda.workspace import bytes_of, carve, exclusive, reserve
from ..dispatch import Beside, Call, Problem, Routing
from ..one_by_one import StackedExperts
from . import gemm, grouped, routed_decode
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
        sizes = problem.hidden, problem.intermediate
        with torch.cuda.device(device):
            grouped.prepare(problem.experts, modes, max_tokens * problem.top_k, device)
            if problem.activations == "bf16" and routed_decode.fits(*sizes, device):
                routed_decode.prepare(*sizes, device)
            shape = *sizes, problem.experts, max_tokens, problem.top_k
            layouts = [list(grouped.scratch(mode, *shape).values()) for mode in modes]
            reserve(device, max(map(bytes_of, layouts)) + bytes_of([((max_tokens, problem.hidden), torch.float32)]))
        torch.cuda.synchronize(device)

    def routed_experts(self, x: Tensor, weights: list[Tensor], routing: Routing, call: Call, out: Tensor) -> None:
        with torch.cuda.device(x.device), exclusive(x.device):
            run_aligned(_run, x, weights, routing, call, out=out)

    def prepare_moe(self, shared: Problem, device: torch.device, max_tokens: int) -> None:
        """Compile and load the shared expert's kernels with a result in fp32."""
        if shared.activations != "fp8":
            with torch.cuda.device(device):
                BACKEND.prepare_result(shared, device, max_tokens, torch.float32)

    def moe(self, x: Tensor, weights: list[Tensor], routing: Routing, call: Call, beside: Beside, out: Tensor) -> None:
        if beside.backend is not BACKEND or beside.call.activations == "fp8":
            super().moe(x, weights, routing, call, beside, out)
            return
        with torch.cuda.device(x.device), exclusive(x.device):
            run_aligned(_run_beside, x, weights, routing, call, beside, out=out)


def _run(x: Tensor, weights: list[Tensor], routing: Routing, call: Call, out: Tensor) -> None:
    run = routed_decode.routed_experts if _few(x, weights, routing, call) else grouped.routed_experts
    run(x, weights, routing, call, out)


def _run_beside(x: Tensor, weights: list[Tensor], routing: Routing, call: Call, beside: Beside, out: Tensor) -> None:
    of_shared, top_k = beside.call, routing.indices.shape[1]
    same_size = beside.weights[0].numel() == weights[0][0].numel()
    same_format = of_shared.activations == "bf16" and of_shared.clamp == call.clamp
    if _few(x, weights, routing, call) and same_size and same_format:
        routed_decode.routed_experts(x, weights, routing, call, out, beside.weights)
        return
    # Scratch of the two calls begins at one place; what one hands the other lies behind both.
    tokens, hidden = x.shape
    experts, _, size = weights[2].shape
    layouts = (
        gemm.scratch(_mode(of_shared), hidden, beside.weights[2].shape[1], tokens, x.dtype),
        grouped.scratch(_mode(call), hidden, size, experts, tokens, top_k),
    )
    used = max(bytes_of(list(layout.values())) for layout in layouts)
    (addend,) = carve(x.device, ((tokens, hidden), torch.float32), behind=used)
    BACKEND.shared_expert(x, beside.weights, of_shared, addend)
    grouped.routed_experts(x, weights, routing, call, out, addend)


def _few(x: Tensor, weights: list[Tensor], routing: Routing, call: Call) -> bool:
    few = call.activations == "bf16" and routed_decode.takes(*routing.indices.shape)
    return few and routed_decode.fits(x.shape[1], weights[2].shape[2], x.device)


def _mode(call: Call) -> str:
    return call.activation_scale if call.activations == "nvfp4" else "bf16"


ROUTED = Sm90RoutedExperts(BACKEND)
