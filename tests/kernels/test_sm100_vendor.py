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

from nvfp4_experts.errors import UnsupportedError
from nvfp4_experts.formats.codes import decode_blocks
from nvfp4_experts.formats.nvfp4 import quantize
from nvfp4_experts.formats.stack import Nvfp4Stack
from nvfp4_experts.kernels import reference
from nvfp4_experts.kernels.dispatch import (
    ACTIVATION_SCALES,
    WEIGHTINGS,
    Call,
    Problem,
    Routing,
    choose_backend,
    get_backend,
    get_routed_backend,
)
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


def scaled_grouped_mm_in_fp32(
    a: Tensor,
    b: Tensor,
    a_scales: list[Tensor],
    a_recipe: list[object],
    b_scales: list[Tensor],
    b_recipe: list[object],
    *swizzles: object,
    offs: Tensor,
    output_dtype: torch.dtype,
) -> Tensor:
    """torch's before it rounds, under the checks of `GroupedBlas.cpp`; group e is rows offs[e - 1] .. offs[e]."""
    functional = torch.nn.functional
    assert a.dtype == b.dtype == torch.float4_e2m1fn_x2 and output_dtype == torch.bfloat16
    for scales, recipe in ((a_scales, a_recipe), (b_scales, b_recipe)):
        assert recipe == [functional.ScalingType.BlockWise1x16, functional.ScalingType.TensorWise]
        assert scales[0].dtype == torch.float8_e4m3fn and scales[1].dtype == torch.float32
        assert scales[1].shape == (len(b),) and (scales[1] == 1).all()  # so that a mix-up cannot hide
    assert swizzles == ([functional.SwizzleType.SWIZZLE_32_4_4, functional.SwizzleType.NO_SWIZZLE],) * 2
    a, b = a.view(torch.uint8), b.view(torch.uint8).transpose(1, 2)
    (rows, half), (experts, outputs, _) = a.shape, b.shape
    assert a.is_contiguous() and b.is_contiguous() and half % 16 == 0 and outputs % 16 == 0
    assert offs.dtype == torch.int32 and offs.shape == (experts,) and int(offs[-1]) <= rows
    padded = swizzled_shape(outputs, half // 8)
    assert a_scales[0].ndim == 2 and len(a_scales[0]) >= rows and a_scales[0].is_contiguous()
    assert b_scales[0].shape == (experts, padded[0] * padded[1]) and b_scales[0].is_contiguous()
    sums, begin, tile = torch.full((rows, outputs), torch.nan), 0, 0
    for expert, end in enumerate(offs.tolist()):
        tiles = -(-(end - begin) // 128) * 128
        of_rows, of_expert = (s.view(torch.uint8) for s in (a_scales[0][tile : tile + tiles], b_scales[0][expert]))
        if end > begin:
            sums[begin:end] = product(a[begin:end], of_rows, b[expert], of_expert)
        begin, tile = end, tile + tiles
    return sums


def scaled_grouped_mm(*operands: Any, **options: Any) -> Tensor:
    return scaled_grouped_mm_in_fp32(*operands, **options).bfloat16()


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


# --- routed experts ---------------------------------------------------------------------------------------------------


def routed_error(mode: str, weighting: str, indices: Tensor) -> float:
    """Of a small layer through torch's grouped GEMM against the reference."""
    experts = [
        [quantize(torch.randn(*shape) * 0.1 * (1 + e)) for shape in ((96, 160), (96, 160), (160, 96))] for e in range(3)
    ]
    stacks = [Nvfp4Stack.of(projection) for projection in zip(*experts, strict=True)]
    scales = torch.tensor([5.0, 6, 7]) / 2688, torch.tensor([8.0, 16, 12]) / 2688
    x, weights = torch.randn(len(indices), 160), torch.randn(indices.shape)
    options = {"swiglu_limit": 10.0, "activations": "nvfp4", "activation_scale": mode, "weighting": weighting}
    want = reference.routed_experts(
        x, *stacks, indices, weights, **options, input_scale=scales[0], hidden_scale=scales[1]
    )
    backend, got = get_routed_backend("sm100-torch"), torch.empty_like(x)
    packed = list(backend.pack(*stacks).values())
    backend.routed_experts(x, packed, Routing(indices, weights, weighting), Call(10.0, "nvfp4", mode, *scales), got)
    return float((got - want).norm() / want.norm().clamp(min=1e-30))


ROUTINGS = {
    "one token": [[2, 0]],
    "all on one": [[1]] * 140,
    "nobody here": [[-1, 3], [2**40, -7]],
    "mixed": [[0, 2, 2], [-1, 1, 0], [3, 3, 3], [2, -1, 2], *[[e % 3, e % 4, -1] for e in range(130)]],
}


@pytest.mark.skipif(not hasattr(torch.nn.functional, "scaled_grouped_mm"), reason="a torch without scaled_grouped_mm")
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("mode", ACTIVATION_SCALES)
@pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS)
def test_all_but_the_grouped_gemm_is_the_reference(
    routing: list[list[int]], mode: str, weighting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where sums are fp32; and in bf16, as they are, within what is derived."""
    for gemm, limit in (
        (scaled_grouped_mm_in_fp32, AGAINST_REFERENCE["routed_experts", "nvfp4"]),
        (scaled_grouped_mm, AGAINST_REFERENCE["routed_experts", "nvfp4", "sm100-torch"]),
    ):
        monkeypatch.setattr(torch.nn.functional, "scaled_grouped_mm", gemm)
        assert routed_error(mode, weighting, torch.tensor(routing)) <= limit


def test_the_grouped_gemm_runs_where_torch_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = get_routed_backend("sm100-torch")
    for capability in ((12, 0), (12, 1)):
        blackwell = Problem(256, 128, "nvfp4", Target("cuda", "a GPU", capability, 148), experts=4, top_k=2)
        assert "10.0 or 10.3" in (backend.refusal(blackwell) or "")
    assert backend.refusal(Problem(256, 128, "nvfp4", B200, experts=4, top_k=2)) is None
    monkeypatch.delattr(torch.nn.functional, "scaled_grouped_mm")
    assert "scaled_grouped_mm" in (backend.refusal(Problem(256, 128, "nvfp4", B200, experts=4, top_k=2)) or "")


def test_a_torch_built_without_the_grouped_gemm_says_so_when_a_layer_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **__: Any) -> Tensor:
        raise NotImplementedError("not supported without USE_FBGEMM_GENAI")

    monkeypatch.setattr(torch.nn.functional, "scaled_grouped_mm", missing)
    problem = Problem(256, 128, "nvfp4", B200, experts=4, top_k=2)
    with pytest.raises(UnsupportedError, match="USE_FBGEMM_GENAI"):
        get_routed_backend("sm100-torch").prepare(problem, torch.device("cpu"), 8)
    monkeypatch.setattr(torch.nn.functional, "scaled_grouped_mm", scaled_grouped_mm)
    get_routed_backend("sm100-torch").prepare(problem, torch.device("cpu"), 8)
