# SPDX-License-Identifier: Apache-2.0
"""Block-scaled FP8: decoding by definition, with ragged blocks and both kinds of scale."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nvfp4_experts.errors import FormatError
from nvfp4_experts.formats.fp8_block import Fp8BlockTensor
from tests.formats import scalar_oracle as oracle


def random_fp8(rows: int, columns: int, block: tuple[int, int], e8m0: bool) -> Fp8BlockTensor:
    values = torch.randint(0, 256, (rows, columns), dtype=torch.uint8).view(torch.float8_e4m3fn)
    shape = (-(-rows // block[0]), -(-columns // block[1]))
    scales = torch.randint(100, 150, shape, dtype=torch.uint8) if e8m0 else torch.rand(shape) * 1e-3
    return Fp8BlockTensor(values, scales, block)


@given(
    rows=st.integers(0, 9), columns=st.integers(1, 9), block=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    e8m0=st.booleans(),
)  # fmt: skip
def test_dequantize_follows_the_definition(rows: int, columns: int, block: tuple[int, int], e8m0: bool) -> None:
    t = random_fp8(rows, columns, block, e8m0)
    decoded = t.dequantize()
    assert t.shape == decoded.shape == (rows, columns)
    for n in range(rows):
        for k in range(columns):
            scale = t.scales[n // block[0], k // block[1]].item()
            exact = oracle.e4m3(int(t.values.view(torch.uint8)[n, k])) * (2.0 ** (scale - 127) if e8m0 else scale)
            expected = torch.tensor(exact, dtype=torch.float32)
            assert torch.equal(decoded[n, k], expected) or (decoded[n, k].isnan() and expected.isnan())


@pytest.mark.parametrize("block", [(128, 128), (32, 32)])
def test_real_block_sizes_and_dtypes(block: tuple[int, int]) -> None:
    t = random_fp8(300, 200, block, e8m0=True)
    scale = torch.exp2(t.scales.double() - 127).repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    expected = (t.values.double() * scale[:300, :200]).float()
    assert torch.equal(t.dequantize().nan_to_num(7), expected.nan_to_num(7))
    assert torch.equal(t.dequantize(torch.bfloat16).nan_to_num(7), expected.bfloat16().nan_to_num(7))


def test_nan_scale_spoils_its_block_only() -> None:
    t = Fp8BlockTensor(torch.ones(4, 4).to(torch.float8_e4m3fn), torch.full((2, 2), 127, dtype=torch.uint8), (2, 2))
    t.scales[0, 1] = 0xFF
    assert t.dequantize().isnan().tolist() == [[False, False, True, True]] * 2 + [[False] * 4] * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": torch.zeros(4, 4)}, "values: must be float8_e4m3fn, got torch.float32"),
        ({"values": torch.zeros(1, 4, 4).to(torch.float8_e4m3fn)}, "values: must be a matrix (N, K), got (1, 4, 4)"),
        ({"scales": torch.ones(2, 2).bfloat16()}, "scales: must be float32, or uint8 e8m0 bytes, got torch.bfloat16"),
        ({"scales": torch.ones(1, 2)}, "scales: expected (2, 2) for values (4, 4) in blocks (2, 2), got (1, 2)"),
        ({"scales": torch.ones(2, 2, device="meta")}, "scales: must be on the device of the values, cpu, got meta"),
        ({"block": (0, 2)}, "block: must be two positive integers, got (0, 2)"),
        ({"block": (2,)}, "block: must be two positive integers, got (2,)"),
    ],
)
def test_refuses(change: dict, message: str) -> None:
    good = {"values": torch.zeros(4, 4).to(torch.float8_e4m3fn), "scales": torch.ones(2, 2), "block": (2, 2)}
    with pytest.raises(FormatError) as error:
        Fp8BlockTensor(**{**good, **change})
    assert message in str(error.value)


def test_repr_holds_metadata_only() -> None:
    assert repr(random_fp8(4, 6, (2, 2), True)) == "Fp8BlockTensor(shape=(4, 6), block=(2, 2), device='cpu')"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_those_of_the_whole_wherever_blocks_begin(dtype: torch.dtype) -> None:
    values = torch.randn(100, 70).mul(50).to(torch.float8_e4m3fn)
    t = Fp8BlockTensor(values, torch.randint(110, 130, (4, 3), dtype=torch.uint8), (32, 32))
    whole = t.dequantize(dtype)
    assert torch.equal(whole.float(), t.dequantize())  # e8m0 scales: exact in bf16
    for start, stop in ((0, 100), (0, 1), (31, 33), (32, 64), (96, 100), (5, 99)):
        assert torch.equal(t.dequantize_rows(start, stop, dtype), whole[start:stop])
