# SPDX-License-Identifier: Apache-2.0
"""Tensor-core fragments: the byte map element by element, the inverse, and what a kernel reads out of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nvfp4_experts.errors import LayoutError
from nvfp4_experts.formats.codes import E2M1_VALUES, pack_codes, unpack_codes
from nvfp4_experts.layouts.fragments import (
    CHUNK_BYTES,
    EXPONENT_BIT,
    MANTISSA_BIT,
    SIGN_BIT,
    fragment_bytes,
    pack_fragments,
    unpack_fragments,
)


def random_weight(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    codes = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8)
    scales = torch.randint(1, 127, (rows, columns // 16), dtype=torch.uint8)
    return codes, scales.view(torch.float8_e4m3fn)


def offsets(row: int, column: int, columns: int) -> tuple[int, int, int]:
    """Byte of the 16-bit half, register, byte of the scale: the closed form of the module docstring."""
    chunks = -(-columns // 64)
    tile, h, g = row // 16, row % 16 // 8, row % 8
    chunk, j, c = column // 64, column % 64 // 16, column % 8 // 2
    second, odd = column % 16 // 8, column % 2
    start = (tile * chunks + chunk) * CHUNK_BYTES
    lane, q = 4 * g + c, 2 * second + h
    return start + lane * 16 + j * 4 + odd * 2, q, start + 512 + 8 * g + 4 * h + j


@pytest.mark.parametrize("shape", [(16, 64), (16, 16), (32, 1088), (48, 2048)], ids=str)
def test_every_element_is_where_the_closed_form_says(shape: tuple[int, int]) -> None:
    codes, scales = random_weight(*shape)
    packed = pack_fragments(codes, scales).tolist()
    nibbles = unpack_codes(codes).tolist()
    for row in range(0, shape[0], 3):
        for column in range(shape[1]):
            half, q, scale = offsets(row, column, shape[1])
            word = packed[half] | packed[half + 1] << 8
            code = (word >> SIGN_BIT[q] & 1) << 3 | (word >> EXPONENT_BIT[q] & 3) << 1 | word >> MANTISSA_BIT[q] & 1
            assert code == nibbles[row][column]
            fp16 = torch.tensor(packed[scale] << 7, dtype=torch.int16).view(torch.float16)
            assert float(fp16) / 128 == float(scales[row, column // 16])


def test_golden_bytes() -> None:
    """A chunk written by hand: three codes and three scales, each where a lane of the kernel looks for it."""
    nibbles = torch.zeros(16, 64, dtype=torch.uint8)
    nibbles[0, 0], nibbles[8, 1], nibbles[9, 58] = 0xF, 0x5, 0xE  # -6, 3, -4
    scales = torch.full((16, 4), 2.0**-9)
    scales[0, 0], scales[9, 3] = 448.0, 1.0
    packed = pack_fragments(pack_codes(nibbles), scales.to(torch.float8_e4m3fn)).tolist()
    assert packed[0:4] == [0xC0, 0x81, 0x28, 0x00]  # lane 0, word 0: row 0 column 0 low half, row 8 column 1 high half
    assert packed[5 * 16 + 12 : 5 * 16 + 16] == [0x00, 0x2C, 0x00, 0x00]  # lane 5, word 3: row 9 column 58
    assert packed[512] == 0xF6 and packed[512 + 4] == 0x68  # rows 0 and 8: fp16(448 * 128), fp16(2^-9 * 128), over 2^7
    assert packed[512 + 15] == 0xB0  # row 9, block 3: fp16(1 * 128) = 0x5800, over 2^7
    assert sum(byte != 0 for byte in packed[:512]) == 4


@pytest.mark.parametrize("shape", [(16, 64), (16, 16), (32, 288), (64, 1408), (32, 2304), (16, 7168)], ids=str)
def test_round_trip(shape: tuple[int, int]) -> None:
    codes, scales = random_weight(*shape)
    packed = pack_fragments(codes, scales)
    assert packed.numel() == fragment_bytes(*shape)
    again, scales_again = unpack_fragments(packed, *shape)
    assert torch.equal(again, codes)
    assert torch.equal(scales_again.view(torch.uint8), scales.view(torch.uint8))


def test_every_scale_byte_survives_nan_included() -> None:
    scales = torch.arange(128, dtype=torch.uint8).view(16, 8).view(torch.float8_e4m3fn)
    _, again = unpack_fragments(pack_fragments(torch.zeros(16, 64, dtype=torch.uint8), scales), 16, 128)
    assert torch.equal(again.view(torch.uint8), scales.view(torch.uint8))


def bf16(bits: int) -> float:
    return float(torch.tensor(bits, dtype=torch.uint16).view(torch.bfloat16).double())


def test_masks_and_shifts_of_the_kernel_read_bf16_values() -> None:
    """What decode.cu does to a word gives e2m1 * 2^-126 in every register and half, for every code."""
    for code in range(16):
        codes = torch.full((16, 32), code | code << 4, dtype=torch.uint8)
        packed = pack_fragments(codes, torch.ones(16, 4).to(torch.float8_e4m3fn))
        word = packed[:4].view(torch.uint32).item()
        registers = (
            word & 0x81C081C0,
            word << 3 & 0x81C081C0,
            (word << 6 & 0x01C001C0) | (word << 1 & 0x80008000),
            (word >> 3 & 0x01C001C0) | (word << 2 & 0x80008000),
        )
        for register in registers:
            for half in (register & 0xFFFF, register >> 16 & 0xFFFF):
                assert bf16(half) * 2.0**126 == E2M1_VALUES[code]


def test_scale_arithmetic_of_the_kernel_gives_bf16_scales() -> None:
    """Four bytes to two pairs, scale * 2^119 of blocks 0, 2 and 1, 3, for every scale but zero, NaN included."""
    scales = torch.arange(128, dtype=torch.uint8).view(16, 8).view(torch.float8_e4m3fn)
    packed = pack_fragments(torch.zeros(16, 64, dtype=torch.uint8), scales)
    for row in range(16):
        for chunk in range(2):
            first = offsets(row, 64 * chunk, 128)[2]
            word = packed[first : first + 4].view(torch.uint32).item()
            even = (word << 4 & 0x0FF00FF0) + 0x70007000
            odd = (word >> 4 & 0x0FF00FF0) + 0x70007000
            for block, bits in enumerate((even & 0xFFFF, odd & 0xFFFF, even >> 16, odd >> 16)):
                value, want = bf16(bits), float(scales[row, 4 * chunk + block])
                assert value == want * 2.0**119 or want == 0 or (value != value and want != want)


def test_codes_under_a_zero_scale_lose_their_magnitude_and_nothing_else() -> None:
    codes = torch.full((16, 32), 0xF7, dtype=torch.uint8)
    again, scales = unpack_fragments(pack_fragments(codes, torch.zeros(16, 4).to(torch.float8_e4m3fn)), 16, 64)
    assert set(again.flatten().tolist()) == {0x80} and not scales.float().any()


def test_errors() -> None:
    codes, scales = random_weight(24, 64)
    with pytest.raises(LayoutError, match="multiple of 16"):
        pack_fragments(codes, scales)
    with pytest.raises(LayoutError, match="negative"):
        pack_fragments(torch.zeros(16, 32, dtype=torch.uint8), (-torch.ones(16, 4)).to(torch.float8_e4m3fn))
    with pytest.raises(LayoutError, match="bytes"):
        unpack_fragments(torch.zeros(10, dtype=torch.uint8), 16, 64)
