# SPDX-License-Identifier: Apache-2.0
"""A shared expert with FP8 activations on Hopper: decode.cu for up to 8 tokens, fp8.py for more.

Weights are packed as layouts/e4m3_fragments.py says, from which a lane picks e4m3 operands with half of the
instructions that it takes from the form for bf16: decoding is what these kernels would otherwise wait for.
"""

from __future__ import annotations

import torch

from ...layouts.e4m3_fragments import pack_e4m3_fragments, unpack_e4m3_fragments
from . import fp8
from .backend import Sm90Backend


class Sm90Fp8Backend(Sm90Backend):
    """See the module docstring."""

    name = "sm90-fp8"
    for_fp8 = True
    prepare_gemms, by_gemms = staticmethod(fp8.prepare), staticmethod(fp8.shared_expert)
    pack_matrix, unpack_matrix = staticmethod(pack_e4m3_fragments), staticmethod(unpack_e4m3_fragments)

    def most_scratch(
        self, activations: str, hidden: int, intermediate: int, max_tokens: int, x: torch.dtype, result: torch.dtype
    ) -> int:
        return fp8.most_scratch(hidden, intermediate, max_tokens, result)


BACKEND = Sm90Fp8Backend()
