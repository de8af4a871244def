# SPDX-License-Identifier: Apache-2.0
"""One layer on a Hopper GPU, ready to be run by the half: results to compare, and timers over rotated weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

from ...kernels import reference
from ...kernels.dispatch import Call
from ...kernels.sm90 import backend, gemm
from ...kernels.sm90.compile import compile_all
from ...kernels.sm90.config import GemmConfig
from ..bench.machine import rotation_bytes
from ..bench.timing import GraphTimer, Timer
from ..bench.work import SWIGLU_LIMIT, Work

_STD = {True: 0.25, False: 1.0}  # of what enters gate_up: so small that the clamp hides little; of what enters down
_DECODE = Call(SWIGLU_LIMIT, "bf16", "dynamic")


class Layer:
    """bf16 activations, as many copies of the packed weights as the caches cannot hold.

    Args:
        work: the shape.
        device: a Hopper GPU.
    """

    def __init__(self, work: Work, device: torch.device) -> None:
        self._work, self._device = work, device
        weights = work.weights(device)
        self._gate, self._up, self._down = (w.dequantize() for w in (weights.gate, weights.up, weights.down))
        first = list(backend.BACKEND.pack(weights.gate, weights.up, weights.down).values())
        copies = max(2, -(-rotation_bytes(device) // (first[0].nbytes + first[3].nbytes)))
        self._copies = [first, *([w.clone() for w in first] for _ in range(copies - 1))]
        torch.cuda.synchronize(device)  # launches read weights before they wait for what runs in front of them

    def compile(self, gate_up: bool, configs: Iterable[GemmConfig]) -> None:
        """Have the kernels of one half ready, several compiled at a time."""
        compile_all(("gemm.cu", gemm.macros_of(config, gate_up)) for config in configs)

    def result(self, gate_up: bool, tokens: int, config: GemmConfig) -> Tensor:
        """What one half gives, bf16."""
        return self._half(self._copies[0], gate_up, config, self._values(gate_up, tokens))

    def truth(self, gate_up: bool, tokens: int) -> Tensor:
        """What it should give, by fp32 math on the decoded weights."""
        values = self._values(gate_up, tokens).float()
        if not gate_up:
            return values @ self._down.T
        return reference.swiglu(values @ self._gate.T, values @ self._up.T, SWIGLU_LIMIT)

    def half_timer(self, gate_up: bool, tokens: int, config: GemmConfig) -> Timer:
        """One half, on one input and another copy of the weights each call."""
        values = self._values(gate_up, tokens)

        def run(weights: list[Tensor], x: Tensor) -> Tensor:
            self._half(weights, gate_up, config, values)
            return x

        return self._timer(run, tokens)

    def pair_timer(self, tokens: int, gate_up: GemmConfig, down: GemmConfig) -> Timer:
        """The layer by gemm.cu, each call on the output of the one before."""

        def run(weights: list[Tensor], x: Tensor) -> Tensor:
            return self._half(weights, False, down, self._half(weights, True, gate_up, x))

        return self._timer(run, tokens)

    def decode_timer(self, tokens: int) -> Timer:
        """The layer by decode.cu, each call on the output of the one before."""

        def run(weights: list[Tensor], x: Tensor) -> Tensor:
            out = torch.empty_like(x)
            backend.decode(x, weights, _DECODE, self._work.intermediate, out)
            return out

        return self._timer(run, tokens)

    def _timer(self, run: Callable[[list[Tensor], Tensor], Tensor], tokens: int) -> Timer:
        return GraphTimer([partial(run, weights) for weights in self._copies], self._hidden_states(tokens))

    def _hidden_states(self, tokens: int) -> Tensor:
        return self._work.hidden_states(tokens, self._device)

    def _values(self, gate_up: bool, tokens: int) -> Tensor:
        generator = torch.Generator(self._device).manual_seed(tokens)
        columns = self._work.hidden if gate_up else self._work.intermediate
        return (torch.randn(tokens, columns, generator=generator, device=self._device) * _STD[gate_up]).bfloat16()

    def _half(self, weights: list[Tensor], gate_up: bool, config: GemmConfig, values: Tensor) -> Tensor:
        packed, scales = weights[:2] if gate_up else weights[3:5]
        columns = self._work.intermediate if gate_up else self._work.hidden
        out = torch.empty(values.shape[0], columns, dtype=torch.bfloat16, device=self._device)
        rows = 2 * columns if gate_up else columns
        gemm.run_half(values, packed, rows, scales, out, config, gate_up=gate_up, limit=SWIGLU_LIMIT)
        return out
