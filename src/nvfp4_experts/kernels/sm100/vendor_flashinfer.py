# SPDX-License-Identifier: Apache-2.0
"""Blackwell through FlashInfer's `mm_fp4`, whose result is bf16.

    sums = fp32(bf16(sum over K in fp32 * alpha))        alpha = 1

So gate and up pass through bf16 once, before their global scales, and y is rounded to bf16 before its own and then to
the dtype of x: this backend is as far from the reference as tests/tolerances.py derives, not as near as `sm100`. Of
FlashInfer's kernels it names CUTLASS: one for all four chips, whose rules are in the source that FlashInfer ships.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from ..dispatch import Problem
from .vendor import VendorBackend


class FlashInferBackend(VendorBackend):
    """See the module docstring, and vendor.py for all but the GEMM.

    Cost: FlashInfer keeps a workspace of its own on the device, which `scratch_bytes` does not count.
    Source: `flashinfer/gemm/gemm_base.py` and `fp4_gemm_cutlass.cu` of flashinfer-python 0.6.0 and 0.7.2.post1.
    """

    def missing(self) -> str | None:
        try:
            library = importlib.import_module("flashinfer")
        except (ImportError, RuntimeError, OSError) as problem:
            what = str(problem).partition("\n")[0]
            return f"needs FlashInfer (pip install 'nvfp4-experts[flashinfer]'): {what}"
        if not hasattr(library, "mm_fp4"):
            return f"needs a FlashInfer that has mm_fp4, which {library.__version__} has not"
        return None

    def prepare(self, problem: Problem, device: torch.device, max_tokens: int) -> None:
        """Multiply zeros of one token: FlashInfer compiles or loads its kernel, for any shape, at the first product."""
        rows = columns = 128
        codes = torch.zeros(rows, columns // 2, dtype=torch.uint8, device=device)
        scales = torch.zeros(rows, columns // 16, dtype=torch.uint8, device=device)
        self.multiply(codes[:1], scales, codes, scales)

    def multiply(self, a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor) -> Tensor:
        from flashinfer import mm_fp4

        with torch.cuda.device_of(a):  # its launcher takes the device that is current
            alpha = torch.ones(1, device=a.device)
            sums = mm_fp4(a, b.t(), a_scales, b_scales.t(), alpha, torch.bfloat16, backend="cutlass")
        # Where the global scale is one number, (), torch would multiply it by bf16 sums in bf16.
        return sums.float()


BACKEND = FlashInferBackend("sm100-flashinfer")
