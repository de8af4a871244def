# SPDX-License-Identifier: Apache-2.0
"""A shared expert with FP8 activations on Hopper: fp8.py at any number of tokens.

Weights are packed as layouts/e4m3_fragments.py says, from which a lane picks e4m3 operands with half of the
instructions that it takes from the form for bf16: decoding is what these kernels would otherwise wait for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...layouts.e4m3_fragments import pack_e4m3_fragments, unpack_e4m3_fragments
from ..dispatch import Call, Problem
from . import fp8
from .backend import Sm90Backend


class Sm90Fp8Backend(Sm90Backend):
    """See the module docstring."""

    name = "sm90-fp8"
    for_fp8 = True
    pack_matrix, unpack_matrix = staticmethod(pack_e4m3_fragments), staticmethod(unpack_e4m3_fragments)

    def prepare_result(self, problem: Problem, device: torch.device, max_tokens: int, result: torch.dtype) -> None:
        fp8.prepare(problem, device, max_tokens, result)

    def prepare_mailboxes(self, problem: Problem, device: torch.device) -> None:
        """Nothing: launches end before others read what they wrote."""

    def most_scratch(
        self, activations: str, hidden: int, intermediate: int, max_tokens: int, x: torch.dtype, result: torch.dtype
    ) -> int:
        return fp8.most_scratch(hidden, intermediate, max_tokens, result)

    def launch(self, x: Tensor, weights: list[Tensor], call: Call, size: int, out: Tensor) -> None:
        fp8.shared_expert(x, weights, call, size, out)


BACKEND = Sm90Fp8Backend()
