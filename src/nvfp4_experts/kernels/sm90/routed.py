# SPDX-License-Identifier: Apache-2.0
"""Routed experts on Hopper, and a shared expert beside them: which kernels run them.

    up to 8 tokens and 64 slots           routed_decode.py, one launch, a shared expert of the same size and format a
    (static and fp8: 16)                  group of it; not where I is below 100 or so (`routed_decode.fits`)
    else                                  grouped.py; the shared expert first, its fp32 result (fp8, many tokens: bf16,
                                          as its GEMM leaves it) added with the rows

Kernels keep rows apart, so a token's result does not depend on the others (but for "dynamic"). fp8 is another backend,
`sm90-fp8` (routed_fp8.py): its weights are packed otherwise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..cuda.alignment import run_aligned
from ..cuda.workspace import bytes_of, carve, exclusive, reserve
from ..dispatch import Beside, Call, Problem, Routing
from ..one_by_one import StackedExperts
from . import grouped, routed_decode
from .backend import BACKEND, Sm90Backend
from .fp8_backend import BACKEND as FP8_BACKEND

_MAX_EXPERTS = 8192  # each with a count in the shared memory of one block
# Up to how many slots a call is one launch. More are faster in groups where x is another for each expert ("static"),
# and where the tensor cores of one launch need operands twice as wide ("fp8").
_MOST_SLOTS = {"bf16": 64, "static": 16, "dynamic": 64, "per_token": 64, "fp8": 16}


class Sm90RoutedExperts(StackedExperts):
    """See the module docstring."""

    one: Sm90Backend

    def refusal(self, problem: Problem) -> str | None:
        if (reason := super().refusal(problem)) is not None:
            return reason
        if problem.experts > _MAX_EXPERTS:
            return f"takes at most {_MAX_EXPERTS} experts"
        return None

    def prepare(self, problem: Problem, device: torch.device, max_tokens: int) -> None:
        """Compile and load what a call with bf16 hidden states runs, and reserve its scratch."""
        nvfp4 = problem.activations == "nvfp4"
        modes = ("static", "dynamic", "per_token") if nvfp4 else (problem.activations,)
        sizes = problem.hidden, problem.intermediate
        with torch.cuda.device(device):
            grouped.prepare(problem.experts, modes, max_tokens * problem.top_k, device)
            if routed_decode.fits(*sizes, device):
                routed_decode.prepare(*sizes, modes, device)
            shape = *sizes, problem.experts, max_tokens, problem.top_k
            layouts = [list(grouped.scratch(mode, *shape).values()) for mode in modes]
            reserve(device, max(map(bytes_of, layouts)) + bytes_of([((max_tokens, problem.hidden), torch.float32)]))
        torch.cuda.synchronize(device)

    def routed_experts(self, x: Tensor, weights: list[Tensor], routing: Routing, call: Call, out: Tensor) -> None:
        with torch.cuda.device(x.device), exclusive(x.device):
            run_aligned(_run, x, weights, routing, call, out=out)

    def prepare_moe(self, shared: Problem, device: torch.device, max_tokens: int) -> None:
        """Compile and load the shared expert's kernels with a result in fp32, and reserve what they and it take."""
        one = next((one for one in (BACKEND, FP8_BACKEND) if one.refusal(shared) is None), None)
        if one is None:
            return
        with torch.cuda.device(device):
            one.prepare_result(shared, device, max_tokens, torch.float32)
            sizes = shared.activations, shared.hidden, shared.intermediate, max_tokens
            of_shared = one.most_scratch(*sizes, torch.bfloat16, torch.float32)
            reserve(device, of_shared + bytes_of([((max_tokens, shared.hidden), torch.float32)]))

    def moe(self, x: Tensor, weights: list[Tensor], routing: Routing, call: Call, beside: Beside, out: Tensor) -> None:
        if beside.backend not in (BACKEND, FP8_BACKEND):
            super().moe(x, weights, routing, call, beside, out)
            return
        with torch.cuda.device(x.device), exclusive(x.device):
            run_aligned(_run_beside, x, weights, routing, call, beside, out=out)


def _run(x: Tensor, weights: list[Tensor], routing: Routing, call: Call, out: Tensor) -> None:
    run = routed_decode.routed_experts if _few(x, weights, routing, call) else grouped.routed_experts
    run(x, weights, routing, call, out)


def _run_beside(x: Tensor, weights: list[Tensor], routing: Routing, call: Call, beside: Beside, out: Tensor) -> None:
    one = FP8_BACKEND if beside.backend is FP8_BACKEND else BACKEND
    of_shared, top_k = beside.call, routing.indices.shape[1]
    same_size = beside.weights[0].numel() == weights[0][0].numel()
    same_format = grouped.mode_of(of_shared) == grouped.mode_of(call) and of_shared.clamp == call.clamp
    if _few(x, weights, routing, call) and same_size and same_format:
        routed_decode.routed_experts(x, weights, routing, call, out, beside)
        return
    # Scratch of the two calls begins at one place; what one hands the other lies behind both.
    tokens, hidden = x.shape
    experts, _, size = weights[2].shape
    of_routed = list(grouped.scratch(grouped.mode_of(call), hidden, size, experts, tokens, top_k).values())
    sizes = of_shared.activations, hidden, beside.weights[2].shape[1], tokens
    used = max(bytes_of(of_routed), one.most_scratch(*sizes, x.dtype, torch.float32))
    (addend,) = carve(x.device, ((tokens, hidden), torch.float32), behind=used)
    one.shared_expert(x, beside.weights, of_shared, addend)
    grouped.routed_experts(x, weights, routing, call, out, addend)


def _few(x: Tensor, weights: list[Tensor], routing: Routing, call: Call) -> bool:
    most = _MOST_SLOTS.get(grouped.mode_of(call), 0)
    few = routing.indices.numel() <= most and routed_decode.takes(*routing.indices.shape)
    return few and routed_decode.fits(x.shape[1], weights[2].shape[2], x.device)


ROUTED = Sm90RoutedExperts(BACKEND)
