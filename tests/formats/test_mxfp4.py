# SPDX-License-Identifier: Apache-2.0
"""MXFP4: decoding by definition, and the cast to NVFP4 that changes no value."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nvfp4_experts.errors import FormatError
from nvfp4_experts.formats.mxfp4 import Mxfp4Tensor, exponent_max, mxfp4_to_nvfp4
from tests.formats import scalar_oracle as oracle


def random_mxfp4(rows: int = 6, blocks: int = 4, low: int = 110, high: int = 127) -> Mxfp4Tensor:
    """Every block nonzero, exponents from low - 127 to high - 127."""
    codes = torch.randint(0, 256, (rows, blocks * 16), dtype=torch.uint8) | 1
    return Mxfp4Tensor(codes, torch.randint(low, high + 1, (rows, blocks), dtype=torch.uint8))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))


def test_dequantize_follows_the_definition() -> None:
    t = random_mxfp4(3, 2, 0, 254)
    t.scales[0, 0] = 0
    expected = torch.tensor(
        [
            [
                oracle.e2m1(int(t.codes[n, k // 2]) >> 4 * (k % 2) & 15) * 2.0 ** (int(t.scales[n, k // 32]) - 127)
                for k in range(64)
            ]
            for n in range(3)
        ],
        dtype=torch.float64,
    )
    assert t.shape == (3, 64)
    assert same_bits(t.dequantize(), expected.float())
    assert torch.equal(t.dequantize(torch.bfloat16), expected.float().bfloat16())


def test_nan_scale_decodes_to_nan_in_its_block_only() -> None:
    t = random_mxfp4(2, 2)
    t.scales[1, 0] = 0xFF
    assert t.dequantize().isnan().sum(-1).tolist() == [0, 32]
    assert t.dequantize()[1, :32].isnan().all()


def test_torchao_decodes_the_same_values() -> None:
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    t = random_mxfp4(8, 4, 100, 140)
    decoded = mx.to_dtype(t.codes, t.scales.view(torch.float8_e8m0fnu), torch.float4_e2m1fn_x2, 32, torch.float32)
    assert torch.equal(t.dequantize(), decoded)


@given(top=st.integers(17, 254), rows=st.integers(0, 3), spare=st.integers(0, 20))
def test_cast_keeps_every_value_and_every_code_byte(top: int, rows: int, spare: int) -> None:
    t = random_mxfp4(rows, 3, top - 17, top)
    n = mxfp4_to_nvfp4(t)
    assert n.codes.data_ptr() == t.codes.data_ptr()
    assert same_bits(n.dequantize(), t.dequantize())
    if rows:
        largest = int(t.scales.max()) - 127
        assert exponent_max(t) == largest
        assert n.global_scale == 2.0 ** (max(largest, -118) - 8)
        shared = min(int(t.scales.min()) - 127 + 17, 127)
        assert same_bits(mxfp4_to_nvfp4(t, exponent_max=shared).dequantize(), t.dequantize())


def test_cast_scale_bytes_are_golden() -> None:
    """Exponents 0, -1, -14, -15, -17 below the largest: e4m3 256, 128, 2^-6 and the subnormals 2^-7, 2^-9."""
    codes = torch.full((1, 80), 0x8F, dtype=torch.uint8)  # -6 and -0
    t = Mxfp4Tensor(codes, torch.tensor([[130, 129, 116, 115, 113]], dtype=torch.uint8))
    n = mxfp4_to_nvfp4(t)
    assert n.block_scales.view(torch.uint8).tolist() == [[0x78, 0x78, 0x70, 0x70, 0x08, 0x08, 0x04, 0x04, 0x01, 0x01]]
    assert n.global_scale == 2.0 ** (3 - 8)
    assert (n.codes == 0x8F).all()  # negative zeros keep their nibble


def test_cast_of_a_range_too_wide_names_the_block() -> None:
    t = random_mxfp4(4, 3, 120, 120)
    t.scales[2, 1] = 120 - 18
    with pytest.raises(FormatError, match=r"block \(2, 1\): under exponent_max -7 NVFP4 holds .* -24..-7 .*, got -25"):
        mxfp4_to_nvfp4(t)
    t.scales[2, 1] = 120 - 17
    assert same_bits(mxfp4_to_nvfp4(t).dequantize(), t.dequantize())


def test_cast_under_a_shared_exponent() -> None:
    gate, up = random_mxfp4(4, 2, 115, 120), random_mxfp4(4, 2, 118, 125)
    shared = max(exponent_max(gate), exponent_max(up))
    a, b = mxfp4_to_nvfp4(gate, shared), mxfp4_to_nvfp4(up, shared)
    assert a.global_scale == b.global_scale
    assert same_bits(a.dequantize(), gate.dequantize()) and same_bits(b.dequantize(), up.dequantize())
    with pytest.raises(FormatError, match=r"block \(\d, \d\): under exponent_max"):
        mxfp4_to_nvfp4(up, exponent_max(up) - 1)
    with pytest.raises(FormatError, match="exponent_max: must be at most 127"):
        mxfp4_to_nvfp4(up, 128)


def test_cast_does_not_mind_the_scale_of_a_zero_block() -> None:
    t = random_mxfp4(2, 3, 120, 121)
    t.codes[0, :16], t.codes[1, 16:32] = 0x80, 0x08
    t.scales[0, 0], t.scales[1, 1] = 0, 254
    assert exponent_max(t) in (-7, -6)
    assert same_bits(mxfp4_to_nvfp4(t).dequantize(), t.dequantize())


def test_cast_of_nothing_but_zeros() -> None:
    t = Mxfp4Tensor(torch.full((2, 16), 0x80, dtype=torch.uint8), torch.full((2, 1), 127, dtype=torch.uint8))
    assert exponent_max(t) == -127
    n = mxfp4_to_nvfp4(t)
    assert same_bits(n.dequantize(), t.dequantize()) and n.global_scale == 2.0**-126
    assert exponent_max(random_mxfp4(0)) == -127


def test_nan_scale_cannot_be_cast() -> None:
    t = random_mxfp4(3, 2)
    t.scales[1, 1] = 0xFF
    for call in (mxfp4_to_nvfp4, exponent_max):
        with pytest.raises(FormatError, match=r"scales: must not be NaN, got byte 0xFF at \(1, 1\)"):
            call(t)


@pytest.mark.parametrize(
    ("codes", "scales", "message"),
    [
        (torch.zeros(4, 32, dtype=torch.int8), torch.zeros(4, 2, dtype=torch.uint8), "codes: must be uint8"),
        (torch.zeros(4, 32).byte(), torch.zeros(4, 2), "scales: must be uint8, got torch.float32"),
        (torch.zeros(4, 24).byte(), torch.zeros(4, 1).byte(), "codes: the last dimension must be a positive multiple"),
        (torch.zeros(4, 0).byte(), torch.zeros(4, 0).byte(), "codes: the last dimension must be a positive multiple"),
        (torch.zeros(4, 32).byte(), torch.zeros(4, 4).byte(), "scales: expected (4, 2) for codes (4, 32), got (4, 4)"),
        (
            torch.zeros(4, 32).byte(),
            torch.zeros(4, 2, device="meta").byte(),
            "scales: must be on the device of the codes",
        ),
    ],
)
def test_refuses(codes: torch.Tensor, scales: torch.Tensor, message: str) -> None:
    with pytest.raises(FormatError) as error:
        Mxfp4Tensor(codes, scales)
    assert message in str(error.value)


def test_repr_holds_metadata_only() -> None:
    assert repr(random_mxfp4(2, 1)) == "Mxfp4Tensor(shape=(2, 32), device='cpu')"
