# SPDX-License-Identifier: Apache-2.0
"""Interleaved gate and up, and K-major codes: golden tables, closed forms and inverses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nvfp4_experts.errors import LayoutError
from nvfp4_experts.formats.nvfp4 import quantize
from nvfp4_experts.layouts.weights import (
    deinterleave_gate_up,
    deinterleave_rows,
    from_k_major,
    interleave_gate_up,
    interleave_rows,
    to_k_major,
)

GOLDEN_ROWS = "0001020304050607 8081828384858687 08090a0b0c0d0e0f 88898a8b8c8d8e8f"


def test_golden_rows() -> None:
    a = torch.arange(16, dtype=torch.uint8).view(16, 1)
    assert bytes(interleave_rows(a, a + 0x80).flatten().tolist()) == bytes.fromhex(GOLDEN_ROWS)
    by_two = interleave_rows(a[:4], a[:4] + 0x80, granularity=2)
    assert by_two.flatten().tolist() == [0x00, 0x01, 0x80, 0x81, 0x02, 0x03, 0x82, 0x83]


@pytest.mark.parametrize("rows", [8, 32, 288])
def test_every_row_is_where_the_formula_says(rows: int) -> None:
    a, b = torch.randint(0, 256, (2, rows, 6), dtype=torch.uint8)
    interleaved = interleave_rows(a, b)
    for r in range(rows):
        assert torch.equal(interleaved[2 * r - r % 8], a[r])
        assert torch.equal(interleaved[2 * r - r % 8 + 8], b[r])


@given(
    leading=st.lists(st.integers(0, 3), max_size=2), groups=st.integers(0, 5), granularity=st.sampled_from([1, 2, 8]),
    columns=st.integers(1, 5), strided=st.booleans(),
)  # fmt: skip
def test_deinterleave_is_the_inverse(
    leading: list[int], groups: int, granularity: int, columns: int, strided: bool
) -> None:
    a, b = torch.randint(0, 256, (2, *leading, groups * granularity, columns), dtype=torch.uint8)
    a = a.mT.contiguous().mT if strided else a
    interleaved = interleave_rows(a, b, granularity)
    assert interleaved.shape == (*leading, 2 * groups * granularity, columns)
    back = deinterleave_rows(interleaved, granularity)
    assert torch.equal(back[0], a) and torch.equal(back[1], b)


def test_gate_and_up_interleave_codes_and_scales_together() -> None:
    gate, up = quantize(torch.randn(32, 64)), quantize(3 * torch.randn(32, 64))
    codes, block_scales = interleave_gate_up(gate, up)
    assert codes.shape == (64, 32) and block_scales.shape == (64, 4)
    assert block_scales.dtype == torch.float8_e4m3fn
    for r in range(32):
        for offset, source in ((0, gate), (8, up)):
            row = 2 * r - r % 8 + offset
            assert torch.equal(codes[row], source.codes[r])
            assert torch.equal(block_scales.view(torch.uint8)[row], source.block_scales.view(torch.uint8)[r])
    gate_back, up_back = deinterleave_gate_up(codes, block_scales, gate.global_scale, up.global_scale)
    assert torch.equal(gate_back.dequantize(), gate.dequantize())
    assert torch.equal(up_back.dequantize(), up.dequantize())


def test_experts_interleave_one_by_one() -> None:
    gate, up = quantize(torch.randn(3, 16, 32)), quantize(torch.randn(3, 16, 32))
    codes, _ = interleave_gate_up(gate, up)
    for e in range(3):
        assert torch.equal(codes[e], interleave_rows(gate.codes[e], up.codes[e]))


def test_k_major_bytes_and_strides() -> None:
    codes = torch.arange(24, dtype=torch.uint8).view(3, 8)  # N = 3, K/2 = 8
    k_major = to_k_major(codes)
    assert k_major.shape == (8, 3) and k_major.stride() == (1, 8)
    assert k_major.data_ptr() == codes.data_ptr()
    flat = torch.as_strided(k_major, (24,), (1,))
    for j in range(8):
        for n in range(3):
            assert k_major[j, n] == flat[n * 8 + j] == codes[n, j]


@given(leading=st.lists(st.integers(1, 3), max_size=1), rows=st.integers(1, 5), half=st.integers(1, 9))
def test_from_k_major_is_the_inverse(leading: list[int], rows: int, half: int) -> None:
    codes = torch.randint(0, 256, (*leading, rows, half), dtype=torch.uint8)
    back = from_k_major(to_k_major(codes))
    assert torch.equal(back, codes) and back.is_contiguous()
    assert back.data_ptr() == codes.data_ptr()
    transposed = codes.mT.contiguous().mT  # rows not packed: to_k_major copies
    assert torch.equal(from_k_major(to_k_major(transposed)), codes)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: interleave_rows(torch.ones(8, 2), torch.ones(16, 2)),
            "a and b: must have one shape, dtype and device, got (8, 2) torch.float32 on cpu and (16, 2) torch.float32",
        ),
        (
            lambda: interleave_rows(torch.ones(8, 2), torch.ones(8, 2).int()),
            "a and b: must have one shape, dtype and device",
        ),
        (
            lambda: interleave_rows(torch.ones(12, 2), torch.ones(12, 2)),
            "a: the number of rows must be a multiple of 8, got (12, 2)",
        ),
        (lambda: interleave_rows(torch.ones(8), torch.ones(8)), "a: must have rows and columns, got (8,)"),
        (
            lambda: deinterleave_rows(torch.ones(24, 2)),
            "interleaved: the number of rows must be a multiple of 16, got (24, 2)",
        ),
        (
            lambda: interleave_gate_up(quantize(torch.ones(12, 32)), quantize(torch.ones(12, 32))),
            "a: the number of rows must be a multiple of 8, got (12, 16)",
        ),
        (lambda: to_k_major(torch.ones(8)), "codes: must have rows and columns, got (8,)"),
        (lambda: from_k_major(torch.ones(8)), "k_major: must have rows and columns, got (8,)"),
        (
            lambda: from_k_major(torch.ones(8, 3)),
            "k_major: K, the dimension before the last, must be contiguous, got strides (3, 1)",
        ),
    ],
)
def test_refuses(call, message: str) -> None:
    with pytest.raises(LayoutError) as error:
        call()
    assert message in str(error.value)


@pytest.mark.parametrize("granularity", [0, -8])
def test_a_granularity_that_is_none(granularity: int) -> None:
    with pytest.raises(LayoutError, match="granularity"):
        interleave_rows(torch.ones(8, 2), torch.ones(8, 2), granularity)


def test_interleaving_across_devices_is_refused() -> None:
    with pytest.raises(LayoutError, match="one shape, dtype and device"):
        interleave_rows(torch.ones(8, 2), torch.ones(8, 2, device="meta"))
