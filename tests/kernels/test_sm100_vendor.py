# SPDX-License-Identifier: Apache-2.0
"""The backends over a vendor's block-scaled GEMM: everything but that GEMM, which no CPU has.

A stand-in takes the place of the vendor's function: it asks of its operands what the vendor asks, decodes them, and
multiplies.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from nvfp4_experts.formats.codes import decode_blocks
from nvfp4_experts.formats.nvfp4 import quantize
from nvfp4_experts.kernels import reference
from nvfp4_experts.kernels.dispatch import ACTIVATION_SCALES, Call, Problem, choose_backend, get_backend
from nvfp4_experts.kernels.target import Target
from nvfp4_experts.layouts.scales import swizzled_shape, unswizzle_scales
from tests.tolerances import AGAINST_REFERENCE

VENDORS = ("sm100-torch", "sm100-flashinfer")
B200 = Target("cuda", "a GPU", (10, 0), 148)


def product(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor) -> Tensor:
    """What both vendors document: codes (M, K/2) and (N, K/2), scales in 128x4 order of whatever shape, fp32 sums."""
    assert a.dtype == b.dtype == a_scales.dtype == b_scales.dtype == torch.uint8
    values = []
    for codes, scales in ((a, a_scales), (b, b_scales)):
        rows, columns = codes.shape[0], codes.shape[1] // 8
        assert codes.is_contiguous() and scales.is_contiguous()
        linear = unswizzle_scales(scales.view(swizzled_shape(rows, columns)), rows, columns)
        values.append(decode_blocks(codes, linear.view(torch.float8_e4m3fn), torch.float32))
    return values[0] @ values[1].T


def scaled_mm(
    a: Tensor,
    b: Tensor,
    a_scales: Tensor,
    a_recipe: object,
    b_scales: Tensor,
    b_recipe: object,
    *swizzles: object,
    output_dtype: torch.dtype,
) -> Tensor:
    """torch's: two codes an element, K contiguous in both operands, flat e4m3 scales in whole tiles."""
    functional = torch.nn.functional
    assert a.dtype == b.dtype == torch.float4_e2m1fn_x2
    assert a_scales.dtype == b_scales.dtype == torch.float8_e4m3fn and a_scales.ndim == b_scales.ndim == 1
    assert a_recipe == b_recipe == functional.ScalingType.BlockWise1x16
    assert swizzles == (functional.SwizzleType.SWIZZLE_32_4_4,) * 2
    operands = (a, a_scales, b.t(), b_scales)
    return product(*(operand.view(torch.uint8) for operand in operands)).to(output_dtype)


def mm_fp4_in_fp32(
    a: Tensor, b: Tensor, a_scales: Tensor, b_scales: Tensor, alpha: Tensor, out_dtype: torch.dtype, *, backend: str
) -> Tensor:
    """FlashInfer's before it rounds, under the checks of its `mm_fp4` and `fp4_gemm_cutlass.cu`; b is transposed."""
    assert backend == "cutlass" and a.ndim == b.ndim == a_scales.ndim == b_scales.ndim == 2
    assert a.shape[1] == b.shape[0] and (2 * a.shape[1]) % 32 == 0 and b.shape[1] % 32 == 0
    assert alpha.dtype == torch.float32 and alpha.numel() == 1 and alpha.device == a.device
    assert out_dtype in (torch.bfloat16, torch.float16)
    return product(a, a_scales, b.T, b_scales.T) * alpha


def mm_fp4(*operands: Any, backend: str) -> Tensor:
    return mm_fp4_in_fp32(*operands, backend=backend).to(operands[5])


def flashinfer(**contents: object) -> ModuleType:
    module = ModuleType("flashinfer")
    module.__dict__.update(contents)
    return module


@pytest.fixture(params=VENDORS)
def vendor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a backend whose vendor's function is the stand-in."""
    if request.param == "sm100-flashinfer":
        monkeypatch.setitem(sys.modules, "flashinfer", flashinfer(mm_fp4=mm_fp4))
    elif hasattr(torch.nn.functional, "scaled_mm"):
        monkeypatch.setattr(torch.nn.functional, "scaled_mm", scaled_mm)
    else:
        pytest.skip(f"torch {torch.__version__} has no scaled_mm")
    return request.param


def error(backend: str, tokens: int, limit: float, mode: str) -> float:
    """Of a small layer against the reference."""
    weights = [quantize(torch.randn(*shape) * 0.1) for shape in ((96, 160), (96, 160), (160, 96))]
    scales = torch.tensor(5 / 2688), torch.tensor(8 / 2688)
    x = torch.randn(tokens, 160)
    options = {"swiglu_limit": limit, "activations": "nvfp4", "activation_scale": mode}
    want = reference.shared_expert(x, *weights, **options, input_scale=scales[0], hidden_scale=scales[1])
    packed = list(get_backend(backend).pack(*weights).values())
    got = torch.empty_like(x)
    get_backend(backend).shared_expert(x, packed, Call(limit, "nvfp4", mode, *scales), got)
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("mode", ACTIVATION_SCALES)
@pytest.mark.parametrize("limit", [0.0, 0.5, 10.0])
def test_all_but_the_gemm_is_the_reference(
    mode: str, limit: float, vendor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where sums are fp32, which FlashInfer's are not."""
    monkeypatch.setitem(sys.modules, "flashinfer", flashinfer(mm_fp4=mm_fp4_in_fp32))
    for tokens in (1, 129):
        assert error(vendor, tokens, limit, mode) <= AGAINST_REFERENCE["shared_expert", "nvfp4"]


@pytest.mark.parametrize("mode", ACTIVATION_SCALES)
@pytest.mark.parametrize("vendor", ["sm100-flashinfer"], indirect=True)
def test_sums_in_bf16_cost_what_is_derived(mode: str, vendor: str) -> None:
    found = error(vendor, 129, 10.0, mode)
    tight = AGAINST_REFERENCE["shared_expert", "nvfp4"]
    assert tight < found <= AGAINST_REFERENCE["shared_expert", "nvfp4", vendor]


def test_sums_leave_in_fp32(vendor: str) -> None:
    """Not in bf16: what is multiplied next, a scale of shape (), would not make them fp32."""
    codes, scales = torch.zeros(32, 16, dtype=torch.uint8), torch.zeros(128, 4, dtype=torch.uint8)
    assert get_backend(vendor).multiply(codes, scales, codes, scales).dtype == torch.float32


def test_flashinfer_loads_its_kernel_before_the_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens: list[int] = []

    def recording(*operands: Any, backend: str) -> Tensor:
        tokens.append(len(operands[0]))
        return mm_fp4(*operands, backend=backend)

    monkeypatch.setitem(sys.modules, "flashinfer", flashinfer(mm_fp4=recording))
    problem = Problem(160, 96, "nvfp4", B200)
    get_backend("sm100-flashinfer").prepare(problem, torch.device("cpu"), max_tokens=8192)
    assert tokens == [1]


def test_they_run_where_asked_for_on_blackwell_alone(vendor: str) -> None:
    backend = get_backend(vendor)
    assert choose_backend(vendor, Problem(256, 128, "nvfp4", B200)) is backend
    assert "multiples of 32" in (backend.refusal(Problem(144, 128, "nvfp4", B200)) or "")
    assert "multiples of 32" in (backend.refusal(Problem(256, 144, "nvfp4", B200)) or "")
    assert "NVFP4 alone" in (backend.refusal(Problem(256, 128, "bf16", B200)) or "")
    for other in (Target("cpu", "cpu"), Target("cuda", "a GPU", (9, 0), 132)):
        assert "FP4 tensor cores" in (backend.refusal(Problem(256, 128, "nvfp4", other)) or "")


@pytest.mark.parametrize(
    ("library", "reason"),
    [(None, "nvfp4-experts[flashinfer]"), (flashinfer(__version__="0.2.0"), "mm_fp4, which 0.2.0 has not")],
)
def test_flashinfer_must_be_there_and_new_enough(
    library: ModuleType | None, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", library)  # None: importing it raises
    assert reason in (get_backend("sm100-flashinfer").refusal(Problem(256, 128, "nvfp4", B200)) or "")


def test_torch_must_be_new_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.nn.functional, "scaled_mm", raising=False)
    refusal = get_backend("sm100-torch").refusal(Problem(256, 128, "nvfp4", B200))
    assert "scaled_mm" in (refusal or "")
