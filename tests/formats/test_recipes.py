# SPDX-License-Identifier: Apache-2.0
"""Each recipe against the package it is named after, bit for bit: codes, scale bytes and global scale."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nvfp4_experts.errors import FormatError
from nvfp4_experts.formats.nvfp4 import RECIPES, quantize
from nvfp4_experts.formats.recipes import find_recipe
from tests.formats.oracles import ORACLES

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)


def normals() -> Tensor:
    return torch.randn(192, 256)


def rows_of_every_scale() -> Tensor:
    return torch.randn(128, 256) * torch.logspace(-6, 3, 128)[:, None]


def blocks_of_every_scale() -> Tensor:
    """Blocks over 2^-40..2^40: scales that underflow to zero, that are subnormal, and that fill e4m3."""
    return (torch.randn(64, 81, 16) * torch.exp2(torch.arange(-40, 41))[:, None]).flatten(1)


def ties() -> Tensor:
    """Every tie midpoint of e2m1 and its fp32 neighbours, both signs, in blocks whose scale is a power of two."""
    middle = torch.tensor(MIDPOINTS)
    around = torch.cat((middle, torch.nextafter(middle, middle * 0), torch.nextafter(middle, middle + 9)))
    values = torch.nn.functional.pad(torch.cat((around, -around)), (0, 6), value=-3.5).reshape(-1, 12)
    blocks = torch.cat((values, torch.tensor([6.0, -0.0, 0.0, -1e-3]).expand(4, 4)), dim=1)
    rows = torch.stack([blocks * 2.0**e for e in range(-9, 9)]).flatten(1)
    return torch.cat((rows, -rows))


def scale_ties() -> Tensor:
    """Block maxima whose scale lies on or beside a midpoint of two e4m3 values, under an amax of 2688."""
    values = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middle = (values[1:] + values[:-1]) / 2 * 6
    maxima = torch.cat((middle, torch.nextafter(middle, middle * 0), torch.nextafter(middle, middle * 2)))
    blocks = torch.rand(len(maxima), 16) * maxima[:, None]
    blocks[:, 0] = maxima
    return torch.cat((blocks, torch.full((1, 16), 2688.0)))


def zeros_among_values() -> Tensor:
    """Zero blocks, zero rows and negative zeros beside values."""
    w = torch.randn(64, 128)
    w[::4] = 0.0
    w[1::4] = -0.0
    w[2::4, 16:48] = -0.0
    w[3::4, ::2] = 0.0
    return w


def subnormals() -> Tensor:
    """Blocks of fp32 subnormals (zeros in fp16) beside ordinary ones, both signs."""
    w = torch.randn(32, 64)
    w[:, 16:32] *= 2.0**-135
    w[:, 32:48] *= 2.0**-148
    return w


def wide() -> Tensor:
    """Blocks near the largest and the smallest normal values of fp32."""
    return torch.randn(64, 5, 16).mul(torch.tensor([1e36, 1.0, 1e-30, 1e-36, 1e-43])[:, None]).flatten(1)


CASES: tuple[Callable[[], Tensor], ...] = (
    normals, rows_of_every_scale, blocks_of_every_scale, ties, scale_ties, zeros_among_values, subnormals, wide,
)  # fmt: skip


def assert_oracle_bytes(w: Tensor, recipe: str, amax: Tensor | None = None) -> None:
    codes, scales, global_scale = ORACLES[recipe](w, w.abs().amax() if amax is None else amax)
    ours = quantize(w, recipe, amax=amax)
    assert ours.global_scale.item() == global_scale.item()
    assert torch.equal(ours.block_scales.view(torch.uint8), scales)
    assert torch.equal(ours.codes, codes)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_bytes_equal_the_oracle(case: Callable[[], Tensor], dtype: torch.dtype, recipe: str) -> None:
    limit = torch.finfo(dtype).max
    assert_oracle_bytes(case().clamp(-limit, limit).to(dtype), recipe)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("exponent", range(-10, 11))
def test_bytes_equal_the_oracle_at_every_magnitude(exponent: int, recipe: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert_oracle_bytes((torch.randn(32, 512) * 2.0**exponent).to(dtype), recipe)


@pytest.mark.parametrize("recipe", RECIPES)
def test_bytes_equal_the_oracle_for_every_amax_mantissa(recipe: str) -> None:
    """1,024 values of amax: the roundings of the global scale itself."""
    for amax in 1 + torch.rand(1024):
        w = torch.randn(1, 32).clamp(-1, 1)
        w[0, 0] = amax
        assert_oracle_bytes(w, recipe)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("factor", [1e-4, 0.1, 0.9, 1.1, 7.0, 1e4])
def test_bytes_equal_the_oracle_under_a_given_amax(factor: float, recipe: str) -> None:
    """Below the tensor's own amax block scales and codes saturate, above it they use less of their range."""
    w = torch.randn(64, 256)
    assert_oracle_bytes(w, recipe, w.abs().amax() * factor)
    assert_oracle_bytes(w.bfloat16(), recipe, w.abs().amax() * factor)


def test_recipes_differ() -> None:
    """Each name is a recipe of its own: on bf16 ties no two of them give the same codes and scales."""
    w = torch.randn(512, 512).bfloat16()
    w[0, :16] = 0
    results = [quantize(w, recipe) for recipe in RECIPES]
    for i, a in enumerate(results):
        for b in results[:i]:
            assert not torch.equal(a.block_scales.view(torch.uint8), b.block_scales.view(torch.uint8))


def test_unknown_recipe_names_the_known_ones() -> None:
    with pytest.raises(FormatError, match=r"modelopt, torchao, compressed-tensors, kernel.*'nvidia'"):
        find_recipe("nvidia")
