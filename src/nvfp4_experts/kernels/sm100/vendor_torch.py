# SPDX-License-Identifier: Apache-2.0
"""Blackwell through torch's `scaled_mm`: BlockWise1x16 scales in the order SWIZZLE_32_4_4, sums in fp32."""

from __future__ import annotations

import torch
from torch import Tensor

from .vendor import VendorBackend


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


BACKEND = TorchBackend("sm100-torch")
