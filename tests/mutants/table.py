# SPDX-License-Identifier: Apache-2.0
"""Mistakes that people make with this format, each as one replaced piece of source, and the test that must catch it.

`old` must occur exactly once in the file: a mutant whose text is gone is a broken guard, and says so.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """One wrong version of one file.

    Args:
        name: what went wrong, in words.
        file: the file below src/nvfp4_experts.
        old: source text that occurs exactly once in it.
        new: what the mistake would have written instead.
        killed_by: the pytest node id that must fail on it.
    """

    name: str
    file: str
    old: str
    new: str
    killed_by: str


MUTANTS = (
    Mutant(
        "nibbles packed the other way round",
        "formats/codes.py",
        "return (pairs | (pairs >> 4)).to(torch.uint8)",
        "return ((pairs << 4) | (pairs >> 8)).to(torch.uint8)",
        "tests/formats/test_codes.py::test_even_k_is_the_low_nibble",
    ),
    Mutant(
        "nibbles unpacked the other way round",
        "formats/codes.py",
        "torch.stack((packed & 0xF, packed >> 4), dim=-1)",
        "torch.stack((packed >> 4, packed & 0xF), dim=-1)",
        "tests/formats/test_codes.py::test_pack_and_unpack_every_byte",
    ),
    Mutant(
        "ties go toward zero",
        "formats/codes.py",
        ".clamp_(max=0x40C0_0000)",
        ".clamp_(max=0x40C0_0000).sub_(1).clamp_(min=0)",
        "tests/formats/test_codes.py::test_encode_breaks_ties_to_the_even_code",
    ),
    Mutant(
        "the largest value of another e4m3",
        "formats/codes.py",
        "E4M3_MAX = 448.0",
        "E4M3_MAX = 240.0",
        "tests/formats/test_codes.py::test_encode_e4m3_rounds_to_the_nearest_and_saturates",
    ),
    Mutant(
        "e8m0 exponents off by one",
        "formats/codes.py",
        "byte << 23)",
        "(byte + 1) << 23)",
        "tests/formats/test_codes.py::test_decode_e8m0_of_every_byte",
    ),
    Mutant(
        "global scale stored as its reciprocal",
        "formats/recipes.py",
        "return s.reciprocal(), s\n",
        "return s, s.reciprocal()\n",
        "tests/formats/test_nvfp4.py::TestDequantize::test_error_of_a_round_trip",
    ),
    Mutant(
        "global scale dropped when decoding",
        "formats/nvfp4.py",
        "values.mul_(self.global_scale).to(dtype)",
        "values.to(dtype)",
        "tests/formats/test_nvfp4.py::TestDequantize::test_is_one_exact_product_then_one_rounding",
    ),
    Mutant(
        "another recipe's floor",
        "formats/recipes.py",
        "(block_amax / E2M1_MAX / s).clamp(min=2.0**-6)",
        "(block_amax / E2M1_MAX / s).clamp(min=2.0**-9)",
        "tests/formats/test_recipes.py::test_bytes_equal_the_oracle",
    ),
    Mutant(
        "one amax for all rows of a per-token batch",
        "formats/activations.py",
        "amax = x.abs().amax(-1, keepdim=True)\n    else:",
        "amax = x.abs().amax().expand(*x.shape[:-1], 1)\n    else:",
        "tests/layers/test_shared_expert.py::TestNan::test_per_token_rows_do_not_depend_on_each_other",
    ),
    Mutant(
        "clamp lost",
        "kernels/torch_backend.py",
        "gate.clamp_(max=limit), up.clamp_(-limit, limit)",
        "gate, up",
        "tests/kernels/test_shared_expert.py::test_clamp_is_one_sided_for_gate_and_two_sided_for_up",
    ),
    Mutant(
        "gate clamped from below too",
        "kernels/torch_backend.py",
        "gate.clamp_(max=limit)",
        "gate.clamp_(-limit, limit)",
        "tests/kernels/test_shared_expert.py::test_clamp_is_one_sided_for_gate_and_two_sided_for_up",
    ),
    Mutant(
        "gate and up exchanged",
        "kernels/torch_backend.py",
        "torch.cat((gate.codes, up.codes))",
        "torch.cat((up.codes, gate.codes))",
        "tests/kernels/test_shared_expert.py::test_backend_matches_reference",
    ),
    Mutant(
        "gate's global scale used for up",
        "kernels/torch_backend.py",
        "global_scales[index], activations",
        "global_scales[0], activations",
        "tests/kernels/test_shared_expert.py::test_gate_and_up_keep_their_own_global_scales",
    ),
    Mutant(
        "weight's global scale dropped",
        "kernels/torch_backend.py",
        ".mul_(global_scale if scale is None else scale * global_scale)",
        ".mul_(1.0 if scale is None else scale)",
        "tests/kernels/test_shared_expert.py::test_backend_matches_reference",
    ),
    Mutant(
        "h rounded to bf16 before it is quantised",
        "kernels/torch_backend.py",
        'torch.bfloat16 if call.activations == "bf16" else torch.float32\n        h =',
        "torch.bfloat16\n        h =",
        "tests/kernels/test_shared_expert.py::test_backend_matches_reference",
    ),
    Mutant(
        "a named backend falls back in silence",
        "kernels/dispatch.py",
        'wanted = BACKENDS if name == "auto" else (name,)',
        "wanted = BACKENDS",
        "tests/kernels/test_dispatch.py::test_a_named_backend_that_refuses_is_not_replaced",
    ),
    Mutant(
        "calibration forgets earlier calls",
        "layers/calibration.py",
        "scale if previous is None else torch.maximum(scale, previous)",
        "scale",
        "tests/layers/test_shared_expert.py::TestCalibration::test_running_maximum_over_calls",
    ),
    Mutant(
        "whole-model dtype conversion converts scales",
        "layers/shared_expert.py",
        "fn(t.reshape(-1).view(torch.uint8)).view(t.dtype).view(t.shape)",
        "fn(t)",
        "tests/layers/test_shared_expert.py",
    ),
)
