# SPDX-License-Identifier: Apache-2.0
"""Who takes part: this library's layer in each activation format, and the same layer as people write it in torch.

A candidate refuses with a reason, or prepares: it turns NVFP4 weights into a callable x (T, H) -> y (T, H), both bf16,
that owns its memory. It says which activation format it means, so that `kernels/reference.py` can say what is right,
and how far from that it may be (rel-L2):

    ours, bf16    2^-8   h and y are rounded to bf16 (0.0016 each) on sums taken in another order; this holds even if
                         every rounding fell the other way
    ours, fp8     2^-5   gate and up may pass through bf16, and FP8 tensor cores keep 13 fractional bits of a sum: both
                         move a row's largest h by 2^-8, and values across boundaries of e4m3, 2^-3.5 apart:
                         sqrt(2^-3.5 * 2^-8) = 0.019, which a few tokens may exceed by half
    ours, nvfp4   2^-6   sums differ by 1e-5, which moves h by sqrt(2^-1.5 * 1e-5) = 0.002, a few times where block
                         scales flip
    bf16 peers    0.01   weights, gate and up are rounded to bf16 too: sqrt(6) * 0.0016 = 0.004
    torch fp8     0.1    six e4m3 operands at 0.026 each: 0.064

Ours are held to the reference in their own activation format, peers to it in bf16.

On CUDA the peers' elementwise parts are compiled into one kernel each (torch.compile), as a serving engine has them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from ...kernels.target import Target
from ...layers.shared_expert import Nvfp4SharedExpert
from .work import HIDDEN_SCALE, INPUT_SCALE, SWIGLU_LIMIT, Weights

# As the module docstring derives them, y in bf16.
OUR_BOUNDS = {"bf16": 2.0**-8, "fp8": 2.0**-5, "nvfp4": 2.0**-6}
BF16_PEER_BOUND, FP8_PEER_BOUND = 0.01, 0.1

_E4M3_MAX = torch.finfo(torch.float8_e4m3fn).max


@dataclass(frozen=True)
class Prepared:
    """A candidate holding one copy of the weights.

    Args:
        run: x (T, H) bf16 -> y (T, H) bf16; of a mixture of experts (x, step) -> y, with a `moe.Step`.
        tensors: what it keeps on the device; no other copy shares their memory.
        nbytes: bytes of weights among them.
        detail: what runs, in a word or two: a backend, a version.
    """

    run: Callable[..., Tensor]
    tensors: tuple[Tensor, ...]
    nbytes: int
    detail: str


class Candidate(Protocol):
    """Something that computes a shared expert (or, in moe_candidates.py, a mixture); see the module docstring."""

    @property
    def name(self) -> str:
        """How the report calls it."""

    @property
    def ours(self) -> bool:
        """Whether it is this library's: then it failing is our fault, and the command's exit code says so."""

    @property
    def reference(self) -> tuple[str, str]:
        """(activations, activation_scale) for `kernels/reference.py`."""

    @property
    def bound(self) -> float:
        """Largest rel-L2 against the reference."""

    def refusal(self, target: Target) -> str | None:
        """Why it cannot run on this machine, as a clause; None if it may."""

    def prepare(self, weights: Any, max_tokens: int) -> Prepared:
        """Build it on the device of the weights (`work.Weights`, or `moe.MoeWeights`), in memory of its own."""


@dataclass(frozen=True)
class OurMode:
    """One activation format on one backend ("auto" or a name) of this library."""

    activations: str
    activation_scale: str
    backend: str
    ours = True

    @property
    def name(self) -> str:
        scale = f" {self.activation_scale}" if self.activations == "nvfp4" else ""
        backend = "" if self.backend == "auto" else f" [{self.backend}]"
        return f"nvfp4-experts {self.activations}{scale}{backend}"

    @property
    def reference(self) -> tuple[str, str]:
        return self.activations, self.activation_scale

    @property
    def bound(self) -> float:
        return OUR_BOUNDS[self.activations]

    def refusal(self, target: Target) -> str | None:
        return None  # the layer itself says so when it is built


@dataclass(frozen=True)
class Ours(OurMode):
    """`Nvfp4SharedExpert`."""

    def prepare(self, weights: Weights, max_tokens: int) -> Prepared:
        own = weights.clone()
        expert = Nvfp4SharedExpert(
            own.gate,
            own.up,
            own.down,
            swiglu_limit=SWIGLU_LIMIT,
            activations=self.activations,
            activation_scale=self.activation_scale,
            input_scale=INPUT_SCALE,
            hidden_scale=HIDDEN_SCALE,
            max_tokens=max_tokens,
            backend=self.backend,
        )
        return Prepared(expert, tuple(expert.buffers()), expert.resident_bytes, f"backend {expert.backend}")


@dataclass(frozen=True)
class TorchBf16Mode:
    """torch on weights dequantised to bf16, wherever torch runs."""

    name = "torch bf16"
    ours = False
    reference = ("bf16", "dynamic")
    bound = BF16_PEER_BOUND

    def refusal(self, target: Target) -> str | None:
        return None


@dataclass(frozen=True)
class TorchBf16(TorchBf16Mode):
    """The layer without quantisation: two torch linears, SwiGLU in fp32."""

    def prepare(self, weights: Weights, max_tokens: int) -> Prepared:
        gate_up = torch.cat((weights.gate.dequantize(torch.bfloat16), weights.up.dequantize(torch.bfloat16)))
        down = weights.down.dequantize(torch.bfloat16)
        activate = fused(swiglu, gate_up.device.type)

        def run(x: Tensor) -> Tensor:
            return linear(activate(linear(x, gate_up)), down)

        return _prepared(run, (gate_up, down), "F.linear")


@dataclass(frozen=True)
class TorchFp8:
    """e4m3 weights with one scale per output row, e4m3 activations with one per token, torch._scaled_mm."""

    name = "torch fp8"
    ours = False
    reference = ("bf16", "dynamic")
    bound = FP8_PEER_BOUND

    def refusal(self, target: Target) -> str | None:
        if target.capability is None or target.capability < (8, 9):
            return "needs fp8 tensor cores (compute capability 8.9 or later)"
        return None

    def prepare(self, weights: Weights, max_tokens: int) -> Prepared:
        gate_up, gate_up_scale = fp8_rows(torch.cat((weights.gate.dequantize(), weights.up.dequantize())))
        down, down_scale = fp8_rows(weights.down.dequantize())
        enter, activate = (fused(part, gate_up.device.type) for part in (fp8_rows, swiglu_fp8_rows))

        def multiply(entered: tuple[Tensor, Tensor], weight: Tensor, weight_scale: Tensor) -> Tensor:
            values, scale = entered
            return torch._scaled_mm(
                values, weight.t(), scale, weight_scale.t(), out_dtype=torch.bfloat16, use_fast_accum=True
            )

        def run(x: Tensor) -> Tensor:
            return multiply(activate(multiply(enter(x), gate_up, gate_up_scale)), down, down_scale)

        return _prepared(run, (gate_up, gate_up_scale, down, down_scale), "torch._scaled_mm, row-wise")


def swiglu(gate_up: Tensor, factors: Tensor | None = None) -> Tensor:
    """(T, 2I), gate's columns then up's, to silu(min(gate, L)) * clamp(up, -L, L), (T, I); fp32 inside.

    `factors` (T, 1) fp32 multiply it before it is rounded.
    """
    gate, up = gate_up.float().chunk(2, dim=-1)
    h = silu(gate.clamp(max=SWIGLU_LIMIT)) * up.clamp(-SWIGLU_LIMIT, SWIGLU_LIMIT)
    return (h if factors is None else h * factors).to(gate_up.dtype)


def fp8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in e4m3 with one fp32 scale each, (..., 1), amax / 448: the usual recipe, for a peer."""
    x = x.float()
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / _E4M3_MAX
    return (x / scale).clamp(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn), scale


def swiglu_fp8_rows(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """`swiglu` and then `fp8_rows`, so that one kernel does both."""
    return fp8_rows(swiglu(gate_up))


@functools.cache
def fused(function: Callable[..., Any], device_type: str) -> Callable[..., Any]:
    """An elementwise function as one kernel on CUDA; as it is elsewhere, where launches cost nothing."""
    return torch.compile(function, dynamic=True) if device_type == "cuda" else function


def _prepared(run: Callable[[Tensor], Tensor], tensors: tuple[Tensor, ...], detail: str) -> Prepared:
    return Prepared(run, tensors, sum(t.nbytes for t in tensors), detail)
