# SPDX-License-Identifier: Apache-2.0
"""A work on a device, as `measure` sees it: what candidates are built from and called with, and what is right.

Here that of one shared expert, whose calls go over copies of the weights; a mixture of experts is in moe.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ...kernels import reference
from .candidates import Prepared
from .timing import Call
from .work import HIDDEN_SCALE, INPUT_SCALE, SWIGLU_LIMIT, Weights, Work

Mode = tuple[str, str]  # activations, activation_scale


class Task(Protocol):
    """See the module docstring."""

    weights: Any
    """what `Candidate.prepare` takes"""

    def copies(self, nbytes: int) -> int:
        """How many copies of a candidate, each of so many bytes of weights, its calls go over."""

    def calls(self, copies: Sequence[Prepared], tokens: int) -> list[Call]:
        """The chain that is timed: x (T, H) bf16 -> y (T, H) bf16 each; the first is the one that is checked."""

    def start(self, tokens: int) -> Tensor:
        """(T, H) bf16 of N(0, 1), where the chain starts."""

    def input(self, tokens: int) -> Tensor:
        """(T, H) bf16, on which outputs are compared."""

    def output(self, tokens: int, activations: str, activation_scale: str) -> Tensor:
        """What the first call makes of `input`, (T, H) bf16, by `kernels/reference.py`; computed once."""

    def forget(self) -> None:
        """Give back the memory of `output`."""

    def hits(self, tokens: int) -> float | None:
        """Distinct routed experts a call of the chain reads, on the mean; None where there are none."""

    def floor_seconds(self, tokens: int, read_rate: float, matmul_rate: float) -> float:
        """What no implementation can be faster than, but for units that multiply faster than bf16."""


class KnownOutputs:
    """What both tasks do alike: outputs are computed once, by `_output`."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, str, str], Tensor] = {}

    def output(self, tokens: int, activations: str, activation_scale: str) -> Tensor:
        key = (tokens, activations, activation_scale if activations == "nvfp4" else "")
        if key not in self._known:
            self._known[key] = self._output(tokens, activations, activation_scale)
        return self._known[key]

    def forget(self) -> None:
        self._known.clear()

    def _output(self, tokens: int, activations: str, activation_scale: str) -> Tensor:
        raise NotImplementedError


def shared_expert_output(x: Tensor, weights: Weights, activations: str, activation_scale: str) -> Tensor:
    """What is right for one shared expert of the bench, (T, H) in the dtype of x."""
    return reference.shared_expert(
        x,
        weights.gate,
        weights.up,
        weights.down,
        swiglu_limit=SWIGLU_LIMIT,
        activations=activations,
        activation_scale=activation_scale,
        input_scale=torch.tensor(INPUT_SCALE, device=x.device),
        hidden_scale=torch.tensor(HIDDEN_SCALE, device=x.device),
    )


class SharedExpertTask(KnownOutputs):
    """One shared expert; its calls go over enough copies that `rotate` bytes lie between two reads of a weight."""

    def __init__(self, work: Work, device: torch.device, rotate: int) -> None:
        super().__init__()
        self._work, self._device, self._rotate = work, device, rotate
        self.weights = work.weights(device)

    def copies(self, nbytes: int) -> int:
        return max(2, -(-self._rotate // nbytes))

    def calls(self, copies: Sequence[Prepared], tokens: int) -> list[Call]:
        return [copy.run for copy in copies]

    def start(self, tokens: int) -> Tensor:
        return self._work.hidden_states(tokens, self._device)

    def input(self, tokens: int) -> Tensor:
        return self._work.check_states(tokens, self._device)

    def _output(self, tokens: int, activations: str, activation_scale: str) -> Tensor:
        return shared_expert_output(self.input(tokens), self.weights, activations, activation_scale)

    def hits(self, tokens: int) -> float | None:
        return None

    def floor_seconds(self, tokens: int, read_rate: float, matmul_rate: float) -> float:
        return self._work.floor_seconds(tokens, read_rate, matmul_rate)
