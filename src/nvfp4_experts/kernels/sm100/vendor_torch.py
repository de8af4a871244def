# SPDX-License-Identifier: Apache-2.0
"""Blackwell through torch's block-scaled GEMMs: BlockWise1x16 scales in the order SWIZZLE_32_4_4.

    shared expert    `scaled_mm`          sums in fp32
    routed experts   `scaled_grouped_mm`  sums in bf16, the only result it has; compute capability 10.x alone

The grouped GEMM wants a global scale for each expert and operand. An expert here has one for gate and one for up, and
each token may have its own, so it gets ones, and ours are applied to the sums, which are bf16 by then: routed experts
are as far from the reference as tests/tolerances.py derives.
Source: `GroupedBlas.cpp` of PyTorch, `f4f4bf16_grouped_common.cuh` of FBGEMM, whose kernel that is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import Problem
from .vendor import VendorBackend
from .vendor_routed import VendorRoutedExperts


class TorchBackend(VendorBackend):
    """See the module docstring, and vendor.py for all but the GEMM."""

    def missing(self) -> str | None:
        if not hasattr(torch.nn.functional, "scaled_mm"):
            return f"needs a torch that has torch.nn.functional.scaled_mm, which {torch.__version__} has not"
        return None

    def multiply(self, a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor) -> Tensor:
        from torch.nn.functional import ScalingType, SwizzleType, scaled_mm

        scales = [swizzled.flatten().view(torch.float8_e4m3fn) for swizzled in (a_scales, b_scales)]
        return scaled_mm(
            a.view(torch.float4_e2m1fn_x2),
            b.view(torch.float4_e2m1fn_x2).t(),
            scales[0],
            ScalingType.BlockWise1x16,
            scales[1],
            ScalingType.BlockWise1x16,
            SwizzleType.SWIZZLE_32_4_4,
            SwizzleType.SWIZZLE_32_4_4,
            output_dtype=torch.float32,
        )


class TorchRoutedExperts(VendorRoutedExperts):
    """See the module docstring, and vendor_routed.py for all but the GEMM."""

    def missing(self, problem: Problem) -> str | None:
        if not hasattr(torch.nn.functional, "scaled_grouped_mm"):
            return f"needs a torch that has torch.nn.functional.scaled_grouped_mm, which {torch.__version__} has not"
        if problem.target.capability is None or problem.target.capability[0] != 10:
            return "torch's grouped GEMM needs compute capability 10.0 or 10.3"
        return None

    def multiply(self, a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, ends: Tensor) -> Tensor:
        from torch.nn.functional import (  # type: ignore[attr-defined]
            ScalingType,
            SwizzleType,
            scaled_grouped_mm,
        )

        ones = torch.ones(len(b), device=b.device)
        recipe = [ScalingType.BlockWise1x16, ScalingType.TensorWise]
        swizzle = [SwizzleType.SWIZZLE_32_4_4, SwizzleType.NO_SWIZZLE]
        return scaled_grouped_mm(
            a.view(torch.float4_e2m1fn_x2),
            b.view(torch.float4_e2m1fn_x2).transpose(1, 2),
            [a_scales.view(torch.float8_e4m3fn), ones],
            recipe,
            [b_scales.flatten(1).view(torch.float8_e4m3fn), ones],
            recipe,
            swizzle,
            swizzle,
            offs=ends,
            output_dtype=torch.bfloat16,
        ).float()


BACKEND = TorchBackend("sm100-torch")
ROUTED = TorchRoutedExperts(BACKEND)
