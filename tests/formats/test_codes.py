# SPDX-License-Identifier: Apache-2.0
"""The code tables, enumerated: every code, every byte, every bf16 value, every tie."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from nvfp4_experts.errors import FormatError
from nvfp4_experts.formats import codes as codes_module
from nvfp4_experts.formats.codes import (
    E2M1_VALUES,
    decode_blocks,
    decode_codes,
    decode_e2m1,
    decode_e4m3,
    decode_e8m0,
    encode_e2m1,
    encode_e4m3,
    pack_codes,
    unpack_codes,
)
from tests.formats import scalar_oracle as oracle

ALL_BYTES = torch.arange(256, dtype=torch.uint8)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MIDPOINTS = {0.25: 0, 0.75: 2, 1.25: 2, 1.75: 4, 2.5: 4, 3.5: 6, 5.0: 6}  # value -> the even code


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal, NaN matching NaN, and -0 not matching +0."""
    signs = torch.signbit(a) == torch.signbit(b)
    return bool(((a.isnan() & b.isnan()) | ((a == b) & signs)).all())


def test_e2m1_values_follow_from_the_bits() -> None:
    assert tuple(oracle.e2m1(code) for code in range(16)) == E2M1_VALUES
    assert [np.signbit(v) for v in E2M1_VALUES] == [False] * 8 + [True] * 8


def test_encode_rounds_every_bf16_value_to_the_nearest_code() -> None:
    x = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16).float()
    x = x[~x.isnan()]
    assert torch.equal(encode_e2m1(x), torch.from_numpy(oracle.encode_e2m1(x.numpy())))


@pytest.mark.parametrize(("value", "code"), MIDPOINTS.items())
def test_encode_breaks_ties_to_the_even_code(value: float, code: int) -> None:
    middle = torch.tensor([value, -value])
    assert encode_e2m1(middle).tolist() == [code, code | 8]
    below, above = torch.nextafter(middle, middle * 0), torch.nextafter(middle, middle * 2)
    lower = sum(value > m for m in MIDPOINTS)  # codes between the midpoints, in order
    assert encode_e2m1(below).tolist() == [lower, lower | 8]
    assert encode_e2m1(above).tolist() == [lower + 1, lower + 1 | 8]


def test_encode_rounds_random_bit_patterns_to_the_nearest_code() -> None:
    x = torch.randint(-(2**31), 2**31, (1 << 18,), dtype=torch.int64).to(torch.int32).view(torch.float32)
    near = torch.rand(1 << 18) * 14 - 7
    for values in (x[~x.isnan()], near):
        assert torch.equal(encode_e2m1(values), torch.from_numpy(oracle.encode_e2m1(values.numpy())))


def test_encode_special_values() -> None:
    inf, tiny = torch.inf, 2.0**-149
    x = torch.tensor([0.0, -0.0, inf, -inf, tiny, -tiny, 6.0, 3e38, -3e38])
    assert encode_e2m1(x).tolist() == [0, 8, 7, 15, 0, 8, 7, 7, 15]


def test_encode_gives_code_7_for_every_nan() -> None:
    bits = torch.tensor([0x7F800001, 0x7FC00000, 0x7FFFFFFF, -0x7FFFFF, -0x400000, -1], dtype=torch.int32)
    assert bits.view(torch.float32).isnan().all()
    assert encode_e2m1(bits.view(torch.float32)).tolist() == [7] * 6


def test_encode_leaves_its_input_and_takes_any_strides() -> None:
    x = (torch.randn(8, 6) * 4).T
    before = x.clone()
    assert torch.equal(encode_e2m1(x), encode_e2m1(x.contiguous()))
    assert torch.equal(x, before)


def test_even_k_is_the_low_nibble() -> None:
    codes = torch.tensor([[1, 2, 15, 0], [8, 7, 3, 12]], dtype=torch.uint8)
    assert pack_codes(codes).tolist() == [[0x21, 0x0F], [0x78, 0xC3]]


def test_pack_and_unpack_every_byte() -> None:
    codes = unpack_codes(ALL_BYTES)
    assert codes.tolist() == [nibble for byte in range(256) for nibble in (byte % 16, byte // 16)]
    assert torch.equal(pack_codes(codes), ALL_BYTES)


@given(rows=st.integers(0, 5), pairs=st.integers(1, 9), transposed=st.booleans())
def test_pack_is_the_inverse_of_unpack(rows: int, pairs: int, transposed: bool) -> None:
    codes = torch.randint(0, 16, (2 * pairs, rows) if transposed else (rows, 2 * pairs), dtype=torch.uint8)
    codes = codes.T if transposed else codes
    assert torch.equal(unpack_codes(pack_codes(codes)), codes)


def test_pack_refuses_an_odd_number_of_codes() -> None:
    with pytest.raises(FormatError, match=r"nibbles: the last dimension must be even, got \(3,\)"):
        pack_codes(torch.zeros(3, dtype=torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decode_codes_of_every_byte(dtype: torch.dtype) -> None:
    expected = torch.tensor([oracle.e2m1(n) for byte in range(256) for n in (byte % 16, byte // 16)], dtype=dtype)
    assert same_bits(decode_codes(ALL_BYTES.view(16, 16), dtype), expected.view(16, 32))
    assert same_bits(decode_e2m1(unpack_codes(ALL_BYTES), dtype), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decode_blocks_is_exact_for_every_code_and_scale_byte(dtype: torch.dtype) -> None:
    """16 codes x 256 scale bytes, in both nibbles, against float64 products: NaN, -0 and negative scales included."""
    codes = pack_codes(torch.arange(16, dtype=torch.uint8).expand(256, 16))
    decoded = decode_blocks(codes, ALL_BYTES.view(torch.float8_e4m3fn).view(256, 1), dtype)
    expected = torch.tensor([[oracle.e4m3(s) * oracle.e2m1(c) for c in range(16)] for s in range(256)])
    assert decoded.dtype == dtype
    assert expected.dtype == torch.float32 and int(expected.isnan().all(-1).sum()) == 2
    assert same_bits(decoded.double(), expected.double())
    swapped = decode_blocks((codes >> 4) | (codes << 4), ALL_BYTES.view(torch.float8_e4m3fn).view(256, 1), dtype)
    assert same_bits(swapped.view(256, 8, 2).flip(-1).reshape(256, 16).double(), expected.double())


def test_decode_blocks_takes_any_leading_shape_and_strides() -> None:
    codes = torch.randint(0, 256, (3, 5, 24), dtype=torch.uint8)
    scales = torch.randint(0, 0x7F, (3, 5, 3), dtype=torch.uint8).view(torch.float8_e4m3fn)
    expected = decode_codes(codes).view(3, 5, 3, 16) * scales.float().unsqueeze(-1)
    assert torch.equal(decode_blocks(codes, scales, torch.float32), expected.flatten(-2))
    strided = decode_blocks(codes.transpose(0, 1), scales.transpose(0, 1), torch.float32)
    assert torch.equal(strided, expected.flatten(-2).transpose(0, 1))
    assert decode_blocks(codes[:0], scales[:0]).shape == (0, 5, 48)
    assert torch.equal(decode_blocks(codes[0, 0], scales[0, 0]).float(), expected[0, 0].flatten())


def test_decode_blocks_refuses_what_does_not_fit() -> None:
    codes, scales = torch.zeros(4, 16, dtype=torch.uint8), torch.zeros(4, 2).to(torch.float8_e4m3fn)
    with pytest.raises(FormatError, match=r"block_scales: one per 16 values of codes \(4, 16\), got \(4, 1\)"):
        decode_blocks(codes, scales[:, :1])
    with pytest.raises(FormatError, match="dtype: must be bfloat16, float16 or float32"):
        decode_blocks(codes, scales, torch.float8_e5m2)


def test_encode_e4m3_rounds_to_the_nearest_and_saturates() -> None:
    x = torch.cat((torch.rand(1 << 14) * 500, torch.exp2(torch.rand(1 << 14) * 24 - 14)))
    middles = torch.from_numpy((oracle.E4M3[1:] + oracle.E4M3[:-1]) / 2).float()
    x = torch.cat((x, middles, torch.nextafter(middles, middles * 0), torch.nextafter(middles, middles * 2)))
    expected = torch.from_numpy(oracle.nearest(x.double().numpy(), oracle.E4M3)).to(torch.uint8)
    assert torch.equal(encode_e4m3(x).view(torch.uint8), expected)
    assert torch.equal(encode_e4m3(-x).view(torch.uint8), expected | 0x80)


def test_encode_e4m3_special_values() -> None:
    x = torch.tensor([448.0, 464.0, 480.0, 1e38, torch.inf, -torch.inf, -0.0, 2.0**-10, 2.0**-9])
    assert encode_e4m3(x).view(torch.uint8).tolist() == [0x7E, 0x7E, 0x7E, 0x7E, 0x7E, 0xFE, 0x80, 0, 1]
    assert encode_e4m3(torch.tensor(torch.nan)).float().isnan()


def test_decode_e4m3_of_every_byte() -> None:
    values = ALL_BYTES.view(torch.float8_e4m3fn)
    decoded = decode_e4m3(values)
    assert [v for v in range(256) if decoded[v].isnan()] == [0x7F, 0xFF]
    for byte in {*range(256)} - {0x7F, 0xFF}:
        exponent, mantissa = byte >> 3 & 15, byte & 7
        value = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
        assert decoded[byte].item() == (-value if byte & 0x80 else value)
        assert decoded[byte].signbit().item() == (byte >= 0x80)
    some = values[:100].view(10, 10).T[1:]
    assert same_bits(decode_e4m3(some), decoded[:100].view(10, 10).T[1:])
    assert decode_e4m3(values[:0]).shape == (0,)


def test_decode_e4m3_does_not_heed_how_threads_treat_subnormals() -> None:
    """Threads keep the mode that they were started with, so all of them have it here: in a process of its own."""
    script = """
import torch
from nvfp4_experts.formats.codes import decode_e4m3
torch.set_num_threads(2)
torch.set_flush_denormal(True)
every = torch.arange(256, dtype=torch.uint8)
torch.ones(1 << 20) * 2.0
for flush in (True, False):
    torch.set_flush_denormal(flush)
    decoded = decode_e4m3(every.repeat(1 << 12).view(torch.float8_e4m3fn)).view(-1, 256)
    one = decode_e4m3(every.view(torch.float8_e4m3fn))
    assert (decoded.nan_to_num(7) == one.nan_to_num(7)).all() and one[1] == 2.0**-9
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_decode_e8m0_of_every_byte() -> None:
    decoded = decode_e8m0(ALL_BYTES)
    assert decoded[:255].double().tolist() == [2.0 ** (byte - 127) for byte in range(255)]
    assert decoded[255].isnan()
    assert same_bits(decode_e8m0(ALL_BYTES.view(torch.float8_e8m0fnu)), decoded)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int32], ids=str)
def test_encode_takes_fp32_alone(dtype: torch.dtype) -> None:
    with pytest.raises(FormatError, match="must be float32"):
        encode_e2m1(torch.ones(4, dtype=dtype))


def test_tracing_leaves_no_fake_table_behind() -> None:
    codes = torch.arange(8, dtype=torch.uint8)
    codes_module._scaled_pairs.cache_clear()
    with FakeTensorMode(allow_non_fake_inputs=True):
        decode_codes(codes)
    assert type(decode_codes(codes)) is torch.Tensor
