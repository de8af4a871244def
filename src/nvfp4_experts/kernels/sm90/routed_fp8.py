# SPDX-License-Identifier: Apache-2.0
"""Routed experts with FP8 activations on Hopper: grouped.py at any number of tokens, gemm.cu on FP8 tensor cores.

Weights are packed as layouts/e4m3_fragments.py says, from which a lane picks e4m3 operands with half of the
instructions that it takes from the form for bf16: decoding is what these kernels would otherwise wait for.
"""

from __future__ import annotations

from ...layouts.e4m3_fragments import pack_e4m3_fragments, unpack_e4m3_fragments
from .backend import Sm90Backend
from .routed import Sm90RoutedExperts


class _One(Sm90Backend):
    """Packs one expert."""

    name = "sm90-fp8"
    pack_matrix, unpack_matrix = staticmethod(pack_e4m3_fragments), staticmethod(unpack_e4m3_fragments)


class Sm90Fp8RoutedExperts(Sm90RoutedExperts):
    """See the module docstring."""

    for_fp8 = True


ROUTED = Sm90Fp8RoutedExperts(_One())
