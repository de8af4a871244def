# SPDX-License-Identifier: Apache-2.0
"""The backend over torch's block-scaled GEMM: everything but that GEMM, which no CPU has."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nvfp4_experts.formats.codes import decode_blocks
from nvfp4_experts.formats.nvfp4 import quantize
from nvfp4_experts.kernels import reference
from nvfp4_experts.kernels.dispatch import ACTIVATION_SCALES, Call, Problem, choose_backend, get_backend
from nvfp4_experts.kernels.sm100 import vendor
from nvfp4_experts.kernels.target import Target
from nvfp4_experts.layouts.scales import unswizzle_scales
from tests.tolerances import AGAINST_REFERENCE


def decoded(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor) -> Tensor:
    """What torch's documentation says of BlockWise1x16 and SWIZZLE_32_4_4, in plain torch."""
    operands = [
        decode_blocks(
            codes,
            unswizzle_scales(scales, codes.shape[0], codes.shape[1] // 8).view(torch.float8_e4m3fn),
            torch.float32,
        )
        for codes, scales in ((a, a_scales), (b, b_scales))
    ]
    return operands[0] @ operands[1].T


@pytest.mark.parametrize("mode", ACTIVATION_SCALES)
@pytest.mark.parametrize("limit", [0.0, 0.5, 10.0])
def test_all_but_the_gemm_is_the_reference(mode: str, limit: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vendor, "multiply", decoded)
    weights = [quantize(torch.randn(*shape) * 0.1) for shape in ((96, 160), (96, 160), (160, 96))]
    scales = torch.tensor(5 / 2688), torch.tensor(8 / 2688)
    packed = list(vendor.BACKEND.pack(*weights).values())
    for tokens in (1, 129):
        x = torch.randn(tokens, 160)
        out = torch.empty_like(x)
        vendor.BACKEND.shared_expert(x, packed, Call(limit, "nvfp4", mode, *scales), out)
        options = {"swiglu_limit": limit, "activations": "nvfp4", "activation_scale": mode}
        want = reference.shared_expert(x, *weights, **options, input_scale=scales[0], hidden_scale=scales[1])
        assert (out - want).norm() <= AGAINST_REFERENCE["shared_expert", "nvfp4"] * want.norm()


def test_what_is_handed_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two codes a byte, K contiguous in both operands, flat e4m3 scales in whole tiles, an fp32 result."""
    functional = torch.nn.functional
    if not hasattr(functional, "scaled_mm"):
        pytest.skip(f"torch {torch.__version__} has no scaled_mm")
    seen: list[object] = []
    monkeypatch.setattr(functional, "scaled_mm", lambda *given, **named: seen.extend((given, named)))
    codes = torch.zeros(7, 32, dtype=torch.uint8), torch.zeros(160, 32, dtype=torch.uint8)
    scales = torch.zeros(128, 4, dtype=torch.uint8), torch.zeros(256, 4, dtype=torch.uint8)
    vendor.multiply(codes[0], scales[0], codes[1], scales[1])
    (a, b, a_scale, a_recipe, b_scale, b_recipe, *swizzles), named = seen
    assert a.dtype == b.dtype == torch.float4_e2m1fn_x2 and a.shape == (7, 32) and b.shape == (32, 160)
    assert a.stride() == (32, 1) and b.stride() == (1, 32)
    assert a_scale.shape == (512,) and b_scale.shape == (1024,) and a_scale.dtype == torch.float8_e4m3fn
    assert a_recipe == b_recipe == functional.ScalingType.BlockWise1x16
    assert swizzles == [functional.SwizzleType.SWIZZLE_32_4_4] * 2 and named == {"output_dtype": torch.float32}


def test_it_runs_where_asked_for_on_blackwell_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.functional, "scaled_mm", print, raising=False)
    b200 = Target("cuda", "a GPU", (10, 0), 148)
    assert choose_backend("sm100-torch", Problem(256, 128, "nvfp4", b200)).name == "sm100-torch"
    backend = get_backend("sm100-torch")
    assert "multiples of 32" in (backend.refusal(Problem(144, 128, "nvfp4", b200)) or "")
    assert "NVFP4 alone" in (backend.refusal(Problem(256, 128, "bf16", b200)) or "")
    assert "FP4 tensor cores" in (backend.refusal(Problem(256, 128, "nvfp4", Target("cpu", "cpu"))) or "")
    monkeypatch.delattr(torch.nn.functional, "scaled_mm")
    assert "scaled_mm" in (backend.refusal(Problem(256, 128, "nvfp4", b200)) or "")
