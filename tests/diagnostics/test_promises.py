# SPDX-License-Identifier: Apache-2.0
"""Kept promises are silent; one changed bit is found, with its place and both values."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nvfp4_experts.diagnostics.promises import BitCheck, check_bits
from nvfp4_experts.diagnostics.weights import Weight
from nvfp4_experts.formats.fp8_block import Fp8BlockTensor
from nvfp4_experts.formats.mxfp4 import Mxfp4Tensor, mxfp4_to_nvfp4
from nvfp4_experts.formats.nvfp4 import RECIPES, Nvfp4Tensor, quantize

E2M1 = (0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6)


@pytest.fixture
def floating() -> dict[str, Weight]:
    return {name: (0.05 * torch.randn(32, 64)).bfloat16() for name in ("gate", "up", "down")}


@pytest.fixture
def mxfp4() -> dict[str, Weight]:
    def weight() -> Mxfp4Tensor:
        scales = torch.randint(115, 122, (32, 2), dtype=torch.uint8)
        return Mxfp4Tensor(torch.randint(0, 256, (32, 32), dtype=torch.uint8), scales)

    return {name: weight() for name in ("gate", "up", "down")}


def quantized(original: dict[str, Weight], recipe: str, joint: bool) -> dict[str, Weight]:
    amax = {name: float(weight.abs().amax()) for name, weight in original.items()}
    if joint:
        amax["gate"] = amax["up"] = max(amax["gate"], amax["up"])
    return {name: quantize(weight, recipe, amax[name]) for name, weight in original.items()}


def mismatches(checks: list[BitCheck]) -> dict[str, str]:
    return {check.projection: str(check.mismatch) for check in checks if check.mismatch}


def test_nothing_is_promised_about_rounding_without_a_recipe(floating: dict[str, Weight]) -> None:
    assert check_bits(quantized(floating, "modelopt", True), floating, None) == []


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("recipe", RECIPES)
def test_requantising_gives_the_same_bits(floating: dict[str, Weight], recipe: str, joint: bool) -> None:
    checks = check_bits(quantized(floating, recipe, joint), floating, recipe)
    assert [check.promise for check in checks] == [f"requantised by {recipe}"] * 3
    assert mismatches(checks) == {}


def test_another_recipe_is_found_out(floating: dict[str, Weight]) -> None:
    assert mismatches(check_bits(quantized(floating, "kernel", True), floating, "modelopt"))


def test_fp8_is_requantised_from_its_fp32_values() -> None:
    weight = Fp8BlockTensor(torch.randn(32, 64).to(torch.float8_e4m3fn), torch.tensor([[0.013]]))
    actual: dict[str, Weight] = {"down": quantize(weight.dequantize())}
    (check,) = check_bits(actual, {"down": weight}, "modelopt")
    assert check.mismatch is None


def test_the_same_format_is_passed_through(floating: dict[str, Weight]) -> None:
    actual = {name: weight.clone() for name, weight in floating.items()}
    assert {check.promise for check in check_bits(actual, floating, "modelopt")} == {"passed through"}
    actual["up"][3, 5] = 1.0
    actual["up"][3, 6] = 1.0
    expected = float(floating["up"][3, 5])
    bits = int(floating["up"][3, 5].view(torch.int16)) % 65536
    text = f"weight[3, 5] must be {expected:.9g} (0x{bits:04x}), is 1 (0x3f80) (2 stored elements differ)"
    assert mismatches(check_bits(actual, floating, None)) == {"up": text}


@pytest.mark.parametrize(("shift", "column"), [(0, 10), (4, 11)])
def test_a_changed_code_is_found_by_row_and_k(floating: dict[str, Weight], shift: int, column: int) -> None:
    original = quantized(floating, "modelopt", True)
    down = original["down"]
    codes = down.codes.clone()
    codes[7, 5] ^= 2 << shift
    before = (int(down.codes[7, 5]) >> shift) & 0xF
    (check,) = check_bits({"down": replace(down, codes=codes)}, {"down": down}, None)
    assert check.mismatch is not None
    assert (check.mismatch.part, check.mismatch.row, check.mismatch.column) == ("codes", 7, column)
    values = [f"{code:#x} ({E2M1[code]:g})" for code in (before, before ^ 2)]
    assert [check.mismatch.expected, check.mismatch.actual] == values
    assert check.mismatch.count == 1


def test_a_changed_block_scale_is_found(floating: dict[str, Weight]) -> None:
    down = quantized(floating, "modelopt", True)["down"]
    scales = down.block_scales.clone()
    scales.view(torch.uint8)[31, 3] = 0x38
    (check,) = check_bits({"down": replace(down, block_scales=scales)}, {"down": down}, None)
    assert check.mismatch is not None
    assert (check.mismatch.part, check.mismatch.row, check.mismatch.column) == ("block_scales", 31, 3)
    assert check.mismatch.actual == "1 (0x38)"


@pytest.mark.parametrize(("factor", "kept"), [(1 + 2.0**-23, True), (1 + 2.0**-20, False), (2.0, False)])
def test_a_global_scale_may_be_one_rounding_away(floating: dict[str, Weight], factor: float, kept: bool) -> None:
    down = quantized(floating, "modelopt", True)["down"]
    (check,) = check_bits({"down": replace(down, global_scale=down.global_scale * factor)}, {"down": down}, None)
    assert (check.mismatch is None) is kept


@pytest.mark.parametrize("exponent", [None, 2])
def test_the_exact_cast_is_known_under_any_exponent(mxfp4: dict[str, Weight], exponent: int | None) -> None:
    actual = {name: mxfp4_to_nvfp4(weight, exponent) for name, weight in mxfp4.items()}
    checks = check_bits(actual, mxfp4, None)
    assert [check.promise for check in checks] == ["exact cast"] * 3
    assert mismatches(checks) == {}


def test_a_wrong_cast_is_found(mxfp4: dict[str, Weight]) -> None:
    actual = mxfp4_to_nvfp4(mxfp4["down"])
    doubled = replace(actual, global_scale=2 * actual.global_scale)
    (check,) = check_bits({"down": doubled}, mxfp4 | {"down": mxfp4["down"]}, None)
    assert check.mismatch is not None and check.mismatch.part == "scales"
    requantised = quantize(mxfp4["down"].dequantize())
    (check,) = check_bits({"down": requantised}, mxfp4, None)
    assert check.mismatch is not None


def test_the_scale_of_a_block_of_zeros_is_free() -> None:
    codes = torch.full((4, 32), 0x11, dtype=torch.uint8)
    codes[0, :16] = 0x80  # a block of +0 and -0
    original = Mxfp4Tensor(codes, torch.tensor([[30, 120]] * 4, dtype=torch.uint8))
    original.scales[1:, 0] = 120
    actual: Nvfp4Tensor = mxfp4_to_nvfp4(original)
    (check,) = check_bits({"down": actual}, {"down": original}, None)
    assert check.mismatch is None
