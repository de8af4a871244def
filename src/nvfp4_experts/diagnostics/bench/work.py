# SPDX-License-Identifier: Apache-2.0
"""The work that is timed: one shared expert of a named shape, its weights, and hidden states that never fade; and what
a whole mixture of experts is (moe.py makes its weights).

Calls are chained: the output of one is the input of the next, so no call can start on its operands early. Nothing is
launched in between to rescale, because the weights keep the values where they are:

    gate, up ~ N(0, (2L)^2) for x ~ N(0, 1)        weights of std 2L / sqrt(H), L the SwiGLU limit
    rms(h)   = L^2 sqrt((0.124 + 0.617) * half of that) = 0.524 L^2
    y        ~ N(0, 1)                             weights of std 1 / (0.524 L^2 sqrt(I))

The clamp makes it a stable point: where rms(x) is off by 1 %, rms(y) is off by 0.33 %. (Without a clamp the layer grows
with the square of x, and a chain of it runs to zero or to infinity.) Checks use x ~ N(0, 1/16), which the clamp touches
in 1 value of 20 only, so that errors of gate and up show.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from ...errors import InputError
from ...formats.nvfp4 import Nvfp4Tensor, quantize
from ..hidden_states import synthetic_hidden_states

SHAPES = {"V4-Pro": (7168, 3072), "V4-Flash": (4096, 2048), "V4.1-Flash": (5120, 2304)}  # name -> H, I
ROUTED = {"V4-Pro": (384, 2.5), "V4-Flash": (256, 1.5), "V4.1-Flash": (384, 1.5)}  # name -> E, routed_scaling_factor
SWIGLU_LIMIT = 10.0
BYTES_PER_WEIGHT = 0.5625  # a nibble, and an e4m3 scale per 16

TOP_K = 6
GATE_UP_STD, DOWN_STD = 2 * SWIGLU_LIMIT, 1 / (0.524 * SWIGLU_LIMIT**2)  # times sqrt(K)

_OTHER_SCALING_FACTOR = 1.5
_CHECK_STD = 0.25
# Static scales, amax / 2688: of x ~ N(0, 1), and of h, which the clamp holds below L^2.
INPUT_SCALE, HIDDEN_SCALE = 6.0 / 2688, SWIGLU_LIMIT**2 / 2688


@dataclass(frozen=True)
class Weights:
    """gate (I, H), up (I, H) and down (H, I) in NVFP4; gate and up share one global scale, as engines expect."""

    gate: Nvfp4Tensor
    up: Nvfp4Tensor
    down: Nvfp4Tensor

    def clone(self) -> Weights:
        """The same weights in memory of their own."""
        return Weights(*(_clone(w) for w in (self.gate, self.up, self.down)))


@dataclass(frozen=True)
class Work:
    """One shared expert: H, I, and the two costs no implementation with NVFP4 weights can avoid."""

    shape: str
    hidden: int
    intermediate: int

    def __str__(self) -> str:
        return f"one shared expert, {self.shape}: H {self.hidden}, I {self.intermediate}"

    def to_dict(self) -> dict[str, object]:
        return {"shape": self.shape, "hidden_size": self.hidden, "intermediate_size": self.intermediate}

    @property
    def weight_count(self) -> int:
        """Weights of gate, up and down: 3HI."""
        return 3 * self.hidden * self.intermediate

    def floor_seconds(self, tokens: float, read_rate: float, matmul_rate: float) -> float:
        """max(0.5625 B x 3HI / read_rate, 2 T 3HI / matmul_rate); rates in B/s and FLOP/s."""
        return max(BYTES_PER_WEIGHT * self.weight_count / read_rate, 2 * tokens * self.weight_count / matmul_rate)

    def weights(self, device: torch.device) -> Weights:
        """Gaussian weights in NVFP4, the same on every machine of a kind."""
        generator = torch.Generator(device).manual_seed(0)

        def draw(rows: int, columns: int, std: float) -> Tensor:
            w = torch.randn(rows, columns, generator=generator, device=device)
            return w.mul_(std / columns**0.5).bfloat16()

        gate, up = (draw(self.intermediate, self.hidden, GATE_UP_STD) for _ in range(2))
        amax = torch.maximum(gate.abs().amax(), up.abs().amax()).float()
        down = draw(self.hidden, self.intermediate, DOWN_STD)
        return Weights(quantize(gate, amax=amax), quantize(up, amax=amax), quantize(down))

    def hidden_states(self, tokens: int, device: torch.device) -> Tensor:
        """(tokens, H) bf16 of N(0, 1), where the chain of calls starts."""
        return synthetic_hidden_states(tokens, self.hidden, seed=1).bfloat16().to(device)

    def check_states(self, tokens: int, device: torch.device) -> Tensor:
        """(tokens, H) bf16 of N(0, 1/16), on which outputs are compared."""
        return (synthetic_hidden_states(tokens, self.hidden, seed=2) * _CHECK_STD).bfloat16().to(device)


@dataclass(frozen=True)
class MoeWork:
    """A layer of routed experts, of which a token takes top_k, with or without a shared expert beside them.

    Args:
        expert: one expert's shape; all have one.
        experts: E, without the shared one.
        top_k: k; each token's k experts are drawn uniformly, without replacement.
        shared: whether there is a shared expert, which takes every token.
        scaling_factor: what a token's routing weights add up to.
    """

    expert: Work
    experts: int
    top_k: int
    shared: bool
    scaling_factor: float

    def __str__(self) -> str:
        parts = f"{self.experts} routed experts, top-{self.top_k}" + (", and a shared one" if self.shared else "")
        return f"{parts}, {self.expert.shape}: H {self.expert.hidden}, I {self.expert.intermediate}"

    def to_dict(self) -> dict[str, object]:
        fields = asdict(self)
        del fields["expert"]
        return {**self.expert.to_dict(), **fields}

    def expected_hits(self, tokens: float) -> float:
        """Distinct routed experts that so many tokens take on the mean: E (1 - (1 - k/E)^T)."""
        return self.experts * (1 - (1 - self.top_k / self.experts) ** tokens)

    def bytes_read(self, hits: float, tokens: float) -> float:
        """Bytes no implementation can leave where they are: hit experts, the shared one, x and y (bf16)."""
        experts = hits + self.shared
        return BYTES_PER_WEIGHT * experts * self.expert.weight_count + 2 * 2 * tokens * self.expert.hidden

    def floor_seconds(self, tokens: float, read_rate: float, matmul_rate: float, hits: float | None = None) -> float:
        """max(bytes_read / read_rate, 2 T n 3HI / matmul_rate), n = k + 1 with a shared expert; hits None: expected."""
        hits = self.expected_hits(tokens) if hits is None else hits
        flop = 2 * tokens * (self.top_k + self.shared) * self.expert.weight_count
        return max(self.bytes_read(hits, tokens) / read_rate, flop / matmul_rate)


def find_moe(shape: str, experts: int | None = None, top_k: int = TOP_K, shared: bool = True) -> MoeWork:
    """The work of a mixture of experts.

    Args:
        shape: as for `find_work`.
        experts: E; None is that of the named shape.
        top_k: k, from 1 to E.
        shared: whether there is a shared expert.

    Raises:
        InputError: as `find_work`; or no E for a shape without a name; or k or E out of range.
    """
    expert = find_work(shape)
    known, factor = ROUTED.get(shape, (None, _OTHER_SCALING_FACTOR))
    count = known if experts is None else experts
    if count is None:
        raise InputError("experts", "must be given where the shape is no name", repr(shape), "say --experts 256")
    if not 1 <= top_k <= count:
        raise InputError("top_k", f"must be from 1 to the number of experts, {count}", top_k, "choose fewer")
    return MoeWork(expert, count, top_k, shared, factor)


def find_work(shape: str) -> Work:
    """The work of a shape: a name of SHAPES, or "HxI".

    Raises:
        InputError: neither, or H or I is no positive multiple of 16.
    """
    if shape in SHAPES:
        return Work(shape, *SHAPES[shape])
    sizes = shape.lower().split("x")
    if len(sizes) != 2 or not all(size.isdecimal() and int(size) > 0 and int(size) % 16 == 0 for size in sizes):
        rule = f"must be one of {', '.join(SHAPES)}, or HxI in multiples of 16"
        raise InputError("shape", rule, repr(shape), "try V4-Flash or 4096x2048")
    return Work(shape, int(sizes[0]), int(sizes[1]))


def _clone(w: Nvfp4Tensor) -> Nvfp4Tensor:
    return Nvfp4Tensor(w.codes.clone(), w.block_scales.clone(), w.global_scale.clone())
