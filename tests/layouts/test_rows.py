# SPDX-License-Identifier: Apache-2.0
"""Weights as vector lanes: the byte map element by element, the inverse, and bytes written by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nvfp4_experts.errors import LayoutError
from nvfp4_experts.formats.codes import pack_codes, unpack_codes
from nvfp4_experts.layouts.rows import pack_rows, row_tile_bytes, unpack_rows

SHAPES = [(16, 16), (16, 48), (48, 272), (32, 1408), (272, 64)]


def random_weight(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    codes = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8)
    scales = torch.randint(0, 256, (rows, columns // 16), dtype=torch.uint8)
    return codes, scales.view(torch.float8_e4m3fn)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_element_is_where_the_closed_form_says(shape: tuple[int, int]) -> None:
    rows, columns = shape
    codes, scales = random_weight(rows, columns)
    packed = pack_rows(codes, scales).tolist()
    nibbles, scale_bytes = unpack_codes(codes).tolist(), scales.view(torch.uint8).tolist()
    for n in range(rows):
        tile = n // 16 * columns * 9
        for k in range(columns):
            byte = packed[tile + 128 * (k // 16) + 64 * (k % 16 // 8) + 4 * (n % 16) + k % 4]
            assert (byte >> 4 if k % 8 >= 4 else byte & 0xF) == nibbles[n][k]
            assert packed[tile + 8 * columns + k // 16 * 16 + n % 16] == scale_bytes[n][k // 16]


def test_golden_bytes() -> None:
    """Five codes and three scales of a (16, 32) matrix, each byte written by hand."""
    nibbles = torch.zeros(16, 32, dtype=torch.uint8)
    nibbles[0, 0], nibbles[0, 4], nibbles[1, 3], nibbles[15, 15], nibbles[2, 17] = 0x1, 0xF, 0x5, 0x9, 0x7
    scales = torch.zeros(16, 2, dtype=torch.uint8)
    scales[0, 0], scales[15, 0], scales[3, 1] = 0x38, 0x7F, 0xB0
    packed = pack_rows(pack_codes(nibbles), scales.view(torch.float8_e4m3fn)).tolist()
    assert len(packed) == 288
    found = {place: byte for place, byte in enumerate(packed) if byte}
    assert found == {0: 0xF1, 7: 0x05, 127: 0x90, 137: 0x07, 256: 0x38, 271: 0x7F, 275: 0xB0}


@pytest.mark.parametrize("shape", [*SHAPES, (64, 2304), (16, 7168)], ids=str)
def test_round_trip(shape: tuple[int, int]) -> None:
    codes, scales = random_weight(*shape)
    packed = pack_rows(codes, scales)
    assert packed.numel() == row_tile_bytes(*shape) == codes.numel() + scales.numel()
    again, scales_again = unpack_rows(packed, *shape)
    assert torch.equal(again, codes)
    assert torch.equal(scales_again.view(torch.uint8), scales.view(torch.uint8))


def test_errors() -> None:
    with pytest.raises(LayoutError, match="multiple of 16"):
        pack_rows(*random_weight(24, 64))
    with pytest.raises(LayoutError, match="bytes"):
        unpack_rows(torch.zeros(10, dtype=torch.uint8), 16, 64)
