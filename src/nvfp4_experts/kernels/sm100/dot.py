# SPDX-License-Identifier: Apache-2.0
"""The block-scaled dot: the one place where kernels differ between Blackwell and everything else.

    sum[i, j] += sum_k e2m1(a[i, k]) * a_scale[i, k // 16] * e2m1(b[j, k]) * b_scale[j, k // 16]

NATIVE is the FP4 instruction of Blackwell's tensor cores (kind::mxf4nvf4, one e4m3 scale per 16). Otherwise operands
are decoded to fp16, which holds them exactly, and multiplied with fp32 sums. Every other line of every kernel here is
the same in both, so what runs on another GPU or under the interpreter proves all but that instruction.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .numbers import decode_blocks


@triton.jit
def block_scaled_dot(a, a_scales, b, b_scales, total, NATIVE: tl.constexpr):
    """a (M, K/2), b (N, K/2) uint8, their scales (M, K/16), (N, K/16), added to total (M, N) fp32.

    Scales are uint8; where NATIVE they may be e4m3.
    """
    if NATIVE:
        a_scales = a_scales.to(tl.float8e4nv, bitcast=True)
        b_scales = b_scales.to(tl.float8e4nv, bitcast=True)
        return tl.dot_scaled(a, a_scales, "e2m1", b.T, b_scales, "e2m1", total)
    else:
        return tl.dot(decode_blocks(a, a_scales), decode_blocks(b, b_scales).T, total)
