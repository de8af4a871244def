# SPDX-License-Identifier: Apache-2.0
"""Blackwell through torch: the same packed weights, multiplied by the vendor's block-scaled GEMM.

    sums = scaled_mm(codes, block scales; BlockWise1x16, SWIZZLE_32_4_4)      fp32, without global scales
    h    = swiglu(sums of gate * scale, sums of up * scale), quantised in torch, and again

For comparison, by name alone: quantisation and SwiGLU are passes of plain torch. As `sm100`, not yet run on that
hardware; the tests replace `multiply` and nothing else.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...formats.activations import quantize_activation
from ...layouts.scales import swizzle_scales
from ..dispatch import Call, Problem
from .backend import Sm100Backend
from .config import chip_of

_WHOLE_LOADS = 32  # values in 16 bytes, which the vendor's rows are multiples of


def multiply(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor) -> Tensor:
    """(M, N) fp32 sums of codes (M, K/2) and (N, K/2) under swizzled block scales; all uint8."""
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


class VendorBackend(Sm100Backend):
    """See the module docstring; packed as `sm100` packs."""

    def refusal(self, problem: Problem) -> str | None:
        if problem.activations != "nvfp4":
            return "multiplies NVFP4 by NVFP4 alone (activations='nvfp4')"
        if chip_of(problem.target) is None:
            return "needs FP4 tensor cores (compute capability 10.0, 10.3, 12.0 or 12.1)"
        if not hasattr(torch.nn.functional, "scaled_mm"):
            return f"needs a torch that has torch.nn.functional.scaled_mm, which {torch.__version__} has not"
        if problem.hidden % _WHOLE_LOADS or problem.intermediate % _WHOLE_LOADS:
            return f"the vendor's GEMM needs multiples of {_WHOLE_LOADS}"
        return None

    def prepare(self, problem: Problem, device: torch.device, max_tokens: int) -> None:
        """Nothing: the vendor's library loads its kernels itself."""

    def scratch_bytes(self, device: torch.device) -> int:
        return 0  # calls take their temporaries from torch's allocator and give them back

    def shared_expert(self, x: Tensor, weights: list[Tensor], call: Call, out: Tensor) -> None:
        gate_up, gate_up_scales, global_scales, down, down_scales, down_global_scale = weights
        sums, scale = self._product(x, call, call.input_scale, gate_up, gate_up_scales)
        gate, up = sums.unflatten(1, (-1, 2, 8)).unbind(2)  # interleaved by 8
        gate, up = gate.flatten(1) * (scale * global_scales[0]), up.flatten(1) * (scale * global_scales[1])
        gate, up = gate.clamp(max=call.clamp), up.clamp(-call.clamp, call.clamp)
        h = torch.nn.functional.silu(gate) * up
        sums, scale = self._product(h, call, call.hidden_scale, down, down_scales)
        torch.mul(sums, scale * down_global_scale, out=sums)
        out.copy_(sums)

    @staticmethod
    def _product(
        values: Tensor, call: Call, static: Tensor | None, codes: Tensor, scales: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Sums of values, entered into NVFP4, times packed weights; and the scale of the values, () or (T, 1)."""
        q = quantize_activation(values, call.activation_scale, static if call.activation_scale == "static" else None)
        swizzled = swizzle_scales(q.block_scales.view(torch.uint8))
        return multiply(q.codes, swizzled, codes, scales), q.global_scale


BACKEND = VendorBackend("sm100-torch")
