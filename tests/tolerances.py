# SPDX-License-Identifier: Apache-2.0
"""Every numeric bound of the test suite, with the sentence that derives it; never loosened to make a run pass: a bound
changes with its derivation or not at all.

All are relative L2: |got - want| / |want|.
"""

# (op, activations[, backend]) -> backend against kernels/reference.py, fp32 in and out. Operands and products are
# the same in both; only the order of the fp32 sums differs, by about sqrt(K) * 2^-24 of the sum: 1e-6 for the K of the
# tests. That moves a value of h across a rounding boundary once in (spacing / 1e-6) values, and then by one spacing:
# error = spacing * sqrt(1e-6 / spacing) = sqrt(spacing * 1e-6). Each bound is about four times that.
AGAINST_REFERENCE: dict[tuple[str, ...], float] = {
    # bf16 values are 2^-7.5 of themselves apart on the mean: 7e-5.
    ("shared_expert", "bf16"): 2.0**-12,
    # e4m3: 2^-3.5 apart: 3e-4.
    ("shared_expert", "fp8"): 2.0**-10,
    # The same on sm90-fp8, whose gate and up (few tokens: h) are bf16 and whose FP8 tensor cores keep 13 fractional
    # bits of a sum: both move the largest value of a row of h, and so its scale, by 2^-8; its values then cross
    # boundaries of e4m3, 2^-3.5 apart: sqrt(2^-3.5 * 2^-8) = 0.019, and up to three times that where one token is all.
    ("shared_expert", "fp8", "sm90-fp8"): 2.0**-4,
    # e2m1: 2^-1.5 apart, and a block scale that flips moves 16 values: 6e-4, a few times.
    ("shared_expert", "nvfp4"): 2.0**-8,
    # The same where sums leave FlashInfer's GEMM in bf16: gate and up are off by 2^-10 on the mean, h by 2^-9.5. Its
    # values cross boundaries of e2m1, 2^-1.5 apart: sqrt(2^-1.5 * 2^-9.5) = 0.022; and where one global scale is the
    # largest of h it moves too, and block scales, 2^-3.5 apart, cross boundaries once in 2^6: 16 values move by 2^-3,
    # 2^-3 * sqrt(2^-6) = 0.016. Together 0.03, and four times that.
    ("shared_expert", "nvfp4", "sm100-flashinfer"): 2.0**-3,
    # A row of an expert is a shared expert's, and its weight is exact; the errors of a token's rows are as independent
    # as the rows are, so their sum has the same relative error, and the sum itself adds 2^-24 a slot.
    ("routed_experts", "bf16"): 2.0**-12,
    ("routed_experts", "fp8"): 2.0**-10,
    ("routed_experts", "nvfp4"): 2.0**-8,
    # On sm90-fp8 h is rounded to bf16 before it enters, and sums keep 13 fractional bits: the largest value of a row,
    # and so its scale, moves by 2^-9, and values cross boundaries of e4m3: sqrt(2^-3.5 * 2^-9) = 0.013; twice and more.
    ("routed_experts", "fp8", "sm90-fp8"): 2.0**-5,
    # torch's grouped GEMM gives bf16 sums: as for sm100-flashinfer above.
    ("routed_experts", "nvfp4", "sm100-torch"): 2.0**-3,
}

# activations -> the layer against exact (fp64) math on the same NVFP4 weights, Gaussian fp32 data, per_token scales:
# the error e of rounding one operand, met by x on the way to gate and to up and once more by h: e * sqrt(3).
AGAINST_EXACT_MATH = {
    # bf16: spacing 2^-7 over sqrt(12), over a mantissa of 1.4 on the mean: e = 0.0016.
    "bf16": 0.0030,
    # e4m3: 2^-3 over sqrt(12) over 1.4: e = 0.026, and the weights are rounded too: e * sqrt(6).
    "fp8": 0.075,
    # NVFP4 of Gaussian data: e = 0.095 (see below).
    "nvfp4": 0.19,
}

# Quantising Gaussian weights to NVFP4, any recipe, costs 0.095 on the mean; blocks of 16 vary little.
NVFP4_OF_GAUSSIAN = 0.098


def against_reference(
    activations: str, backend: str, h_values: int, rounded: bool = False, op: str = "shared_expert"
) -> float:
    """The bound of an op on a GPU against kernels/reference.py on a CPU.

    Args:
        h_values: how many values h has, T * I. In nvfp4 a block whose scale crosses a boundary of e4m3 is quantised
            anew, up to 2^-3 of its 16 values; where h is small, two such blocks are 2^-3 * sqrt(2 * 16 / h_values). And
            tensor cores truncate a running sum, up to 2^-16 of it for K = 7168: sqrt(2^-1.5 * 2^-16) = 2^-8.75, and
            about three times that.
        rounded: y is bf16, 2^-7.5 apart. Results that differ by 2^-12 are rounded apart once in 2^4.5 values:
            sqrt(2^-7.5 * 2^-12) = 2^-9.75.
    """
    bound = AGAINST_REFERENCE.get((op, activations, backend), AGAINST_REFERENCE[op, activations])
    if activations == "nvfp4":
        bound = max(bound, 2.0**-7, 2.0**-3 * (32 / h_values) ** 0.5)
    return max(bound, 2.0**-9) if rounded else bound


# A layer over ranks against the whole layer, both on the backend `cpu` in fp32, where the same operands enter. Shards:
# sums over I are taken apart, sqrt(I) * 2^-24 = 1e-6 for the I of the tests, and four times that. Shares (k = 6): five
# additions of rows in another order, each off by 2^-24 of a partial sum on both sides, all the same way; the sizes of
# six independent rows add up to sqrt(6) of their sum's: 2 * 5 * 2.45 * 2^-24 = 2^-19.4.
# Logits of a bf16 model: a sum that differs in its last bits is rounded apart now and then, and what follows rounds
# anew: at most all of its 40 or so roundings, 0.0016 each, on both sides: 0.0016 * sqrt(2 * 40) = 0.014.
OVER_RANKS = {"shards": 2.0**-18, "shares": 2.0**-19, "logits": 2.0**-6}
