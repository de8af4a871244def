# SPDX-License-Identifier: Apache-2.0
"""The layers whose sums over K are those of Blackwell's FP4 tensor core: to compare others with, not to be fast.

    x, h       quantised as formats/activations.py says
    sums       rule.exact_matmul
    the rest   as kernels/reference.py says, in fp32: sum * (activation's scale * weight's scale), clamp, SwiGLU

The sums have the same bits on every device. exp and the division of SwiGLU are torch's on that device, and may be one
unit in the last place apart; where that moves a value of h across a boundary of e2m1, devices differ in that token.

    resident   0.5625 bytes per weight
    scratch    see rule.py, and gate, up and h in fp32; for routed experts those of one expert's rows at a time, and a
               row (H,) in fp32 per slot
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...formats.activations import Nvfp4Activation, quantize_activation
from ...formats.nvfp4 import Nvfp4Tensor
from .. import native
from ..dispatch import Call, Problem
from ..one_by_one import OneByOne
from ..plain import PlainWeights
from .rule import exact_matmul


class ExactBackend(PlainWeights):
    """See the module docstring."""

    name = "exact"

    def refusal(self, problem: Problem) -> str | None:
        if problem.activations != "nvfp4":
            return 'computes activations="nvfp4" alone, which is what an FP4 tensor core multiplies'
        if problem.target.device_type not in ("cpu", "cuda"):
            return "needs fp64, and so a CPU or a CUDA GPU"
        if problem.target.device_type == "cpu" and native.load()[0] is not None:
            native.tier()  # a forced tier that is not here is an error, and no reason to compute in torch
        return None

    def prepare(self, problem: Problem, device: torch.device, max_tokens: int) -> None:
        """Nothing: it is not there to be fast on its first call."""

    def shared_expert(self, x: Tensor, weights: list[Tensor], call: Call, out: Tensor) -> None:
        gate, up, down = self.unpack(dict(enumerate(weights)), x.shape[1], weights[0].shape[0] // 2)
        h = _intermediate(_enter(x, call, call.input_scale), gate, up, call)
        out.copy_(_linear(_enter(h, call, call.hidden_scale), down))


class ExactRoutedExperts(OneByOne):
    """Routed experts, one hit expert after the other: see one_by_one.py."""

    def enter(self, x: Tensor, call: Call, static_scale: Tensor | None) -> Nvfp4Activation:
        return _enter(x, call, static_scale)

    def take(self, entered: Nvfp4Activation, token: Tensor) -> Nvfp4Activation:
        scale = entered.global_scale
        # As bytes: not every torch takes rows of float8.
        block_scales = entered.block_scales.view(torch.uint8)[token].view(torch.float8_e4m3fn)
        return Nvfp4Activation(entered.codes[token], block_scales, scale[token] if scale.ndim else scale)

    def expert(
        self, entered: Nvfp4Activation, weights: dict[int, Tensor], call: Call, factors: Tensor | None
    ) -> Tensor:
        gate, up, down = self.one.unpack(weights, 2 * entered.codes.shape[1], weights[0].shape[0] // 2)
        h = _intermediate(entered, gate, up, call)
        return _linear(_enter(h if factors is None else h * factors, call, call.hidden_scale), down)


def _enter(x: Tensor, call: Call, static_scale: Tensor | None) -> Nvfp4Activation:
    return quantize_activation(x, call.activation_scale, static_scale if call.activation_scale == "static" else None)


def _intermediate(a: Nvfp4Activation, gate: Nvfp4Tensor, up: Nvfp4Tensor, call: Call) -> Tensor:
    return _swiglu(_linear(a, gate), _linear(a, up), call.swiglu_limit)


def _linear(a: Nvfp4Activation, w: Nvfp4Tensor) -> Tensor:
    """(T, K) times (N, K): (T, N) fp32, the global scales applied to the exact sum."""
    sums = exact_matmul(a.codes, a.block_scales, w.codes, w.block_scales)
    return sums.mul_(a.global_scale * w.global_scale)


def _swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    if limit > 0:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(gate) * up


BACKEND = ExactBackend()
ROUTED = ExactRoutedExperts(BACKEND)
