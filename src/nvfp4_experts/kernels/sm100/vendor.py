# SPDX-License-Identifier: Apache-2.0
"""Blackwell through a vendor's block-scaled GEMM: the packed weights of `sm100`, everything else in plain torch.

    sums = codes of x * block scales  @  codes of gate and up * block scales      without global scales
    h    = swiglu(sums of gate * scale, sums of up * scale), quantised in torch, and again

The global scales of gate and of up differ, and those of tokens may ("per_token"), so the vendor gets none: they are
applied to the sums, in fp32. For comparison, by name alone. As `sm100`, not yet run on that hardware; the tests replace
the vendor's function and nothing else.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...formats.activations import quantize_activation
from ...layouts.scales import swizzle_scales
from ..dispatch import Call, Problem
from .backend import Sm100Backend
from .config import chip_of

_WHOLE_LOADS = 32  # values in 16 bytes, which the vendors' rows are multiples of


class VendorBackend(Sm100Backend):
    """See the module docstring; a vendor is `missing` and `multiply`."""

    def missing(self) -> str | None:
        """What the vendor's library lacks here, as a clause; None if nothing."""
        raise NotImplementedError

    def multiply(self, a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor) -> Tensor:
        """(M, N) fp32 sums of codes (M, K/2) and (N, K/2) under swizzled block scales; operands are uint8."""
        raise NotImplementedError

    def refusal(self, problem: Problem) -> str | None:
        if problem.activations != "nvfp4":
            return "multiplies NVFP4 by NVFP4 alone (activations='nvfp4')"
        if chip_of(problem.target) is None:
            return "needs FP4 tensor cores (compute capability 10.0, 10.3, 12.0 or 12.1)"
        if problem.hidden % _WHOLE_LOADS or problem.intermediate % _WHOLE_LOADS:
            return f"the vendor's GEMM needs multiples of {_WHOLE_LOADS}"
        return self.missing()

    def prepare(self, problem: Problem, device: torch.device, max_tokens: int) -> None:
        """Nothing: the vendor's library loads its kernels itself."""

    def scratch_bytes(self, device: torch.device) -> int:
        return 0  # calls take their temporaries from torch's allocator and give them back

    def shared_expert(self, x: Tensor, weights: list[Tensor], call: Call, out: Tensor) -> None:
        gate_up, gate_up_scales, global_scales, down, down_scales, down_global_scale = weights
        sums, scale = self._product(x, call, call.input_scale, gate_up, gate_up_scales)
        h = swiglu(sums, scale * global_scales[0], scale * global_scales[1], call.clamp)
        sums, scale = self._product(h, call, call.hidden_scale, down, down_scales)
        torch.mul(sums, scale * down_global_scale, out=sums)
        out.copy_(sums)

    def _product(
        self, values: Tensor, call: Call, static: Tensor | None, codes: Tensor, scales: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Sums of values, entered into NVFP4, times packed weights; and the scale of the values, () or (T, 1)."""
        q = quantize_activation(values, call.activation_scale, static if call.activation_scale == "static" else None)
        swizzled = swizzle_scales(q.block_scales.view(torch.uint8))
        return self.multiply(q.codes, swizzled, codes, scales), q.global_scale


def swiglu(sums: Tensor, gate_scale: Tensor, up_scale: Tensor, limit: float) -> Tensor:
    """h (T, I) of the sums (T, 2I) of gate and up, interleaved by 8, under their scales, () or (T, 1)."""
    gate, up = sums.unflatten(1, (-1, 2, 8)).unbind(2)
    gate, up = gate.flatten(1) * gate_scale, up.flatten(1) * up_scale
    return torch.nn.functional.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)
