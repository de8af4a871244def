# SPDX-License-Identifier: Apache-2.0
"""Tensor-core fragments: the byte map element by element, the inverse, and what a kernel reads out of it.

What both forms promise is tested of both; the rest of the other is in test_e4m3_fragments.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from nvfp4_experts.errors import LayoutError
from nvfp4_experts.formats.codes import E2M1_VALUES, pack_codes, unpack_codes
from nvfp4_experts.layouts.e4m3_fragments import pack_e4m3_fragments, unpack_e4m3_fragments
from nvfp4_experts.layouts.fragments import (
    CHUNK_BYTES,
    FROM_FIRST,
    fragment_bytes,
    pack_fragments,
    unpack_fragments,
)

FORMS = [(pack_fragments, unpack_fragments), (pack_e4m3_fragments, unpack_e4m3_fragments)]
both = pytest.mark.parametrize(("pack", "unpack"), FORMS, ids=["bf16", "e4m3"])
Form = Callable[..., Any]


def random_weight(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    codes = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8)
    scales = torch.randint(1, 127, (rows, columns // 16), dtype=torch.uint8)
    return codes, scales.view(torch.float8_e4m3fn)


def offsets(row: int, column: int, columns: int) -> tuple[int, int, int]:
    """First byte of the two words, code 2 i + e in them, byte of the scale: the closed form of the module docstring."""
    chunks = -(-columns // 64)
    tile, h, g = row // 16, row % 16 // 8, row % 8
    chunk, m, block, c = column // 64, column % 64 // 32, column % 64 // 16, column % 8 // 2
    start = (tile * chunks + chunk) * CHUNK_BYTES
    i = column % 32 // 16 * 4 + column % 16 // 8 * 2 + h
    return start + (4 * g + c) * 16 + m * 8, 2 * i + column % 2, start + 512 + 8 * g + 4 * h + block


def rotated(word: int, places: int) -> int:
    return (word << places | word >> 32 - places) & 0xFFFFFFFF


def registers_of(first: int, second: int) -> list[int]:
    """The eight registers of two words, as the module docstring says."""
    mixed = (first & 0x60306030) | (second & ~0x60306030)
    return [rotated((first, second, mixed)[i % 3], 2 * i) & 0x81C081C0 for i in range(8)]


def words_at(packed: list[int], start: int) -> tuple[int, int]:
    first, second = (int.from_bytes(bytes(packed[at : at + 4]), "little") for at in (start, start + 4))
    return first, second


@pytest.mark.parametrize("shape", [(16, 64), (16, 16), (32, 1088), (48, 2048)], ids=str)
def test_every_element_is_where_the_closed_form_says(shape: tuple[int, int]) -> None:
    codes, scales = random_weight(*shape)
    packed = pack_fragments(codes, scales).tolist()
    nibbles = unpack_codes(codes).tolist()
    for row in range(0, shape[0], 3):
        for column in range(shape[1]):
            start, code, scale = offsets(row, column, shape[1])
            half = registers_of(*words_at(packed, start))[code // 2] >> 16 * (code % 2) & 0xFFFF
            assert half >> 12 | half >> 6 & 7 == nibbles[row][column]
            fp16 = torch.tensor(packed[scale] << 7, dtype=torch.int16).view(torch.float16)
            assert float(fp16) / 128 == float(scales[row, column // 16])


def test_golden_bytes() -> None:
    """A chunk written by hand: three codes and three scales, each where a lane of the kernel looks for it."""
    nibbles = torch.zeros(16, 64, dtype=torch.uint8)
    nibbles[0, 0], nibbles[8, 1], nibbles[9, 58] = 0xF, 0x5, 0xE  # -6, 3, -4
    scales = torch.full((16, 4), 2.0**-9)
    scales[0, 0], scales[9, 3] = 448.0, 1.0
    packed = pack_fragments(pack_codes(nibbles), scales.to(torch.float8_e4m3fn)).tolist()
    # Lane 0, words 0 and 1: row 0 column 0 is register 0, low half, of the first; row 8 column 1 register 1, high half,
    # of the second, 2 bits lower. Lane 5, words 2 and 3: row 9 column 58 is register 7, low half, of the second: a
    # sign 14 bits below 15, at 1, and magnitude 6 at bits 8..6, 14 lower: from 26 (it went round) on.
    assert packed[0:4] == [0xC0, 0x81, 0x00, 0x00] and packed[4:8] == [0x00, 0x00, 0x50, 0x00]
    assert packed[5 * 16 + 8 : 5 * 16 + 16] == [0x00, 0x00, 0x00, 0x00, 0x02, 0x00, 0x00, 0x06]
    assert packed[512] == 0xF6 and packed[512 + 4] == 0x68  # rows 0 and 8: fp16(448 * 128), fp16(2^-9 * 128), over 2^7
    assert packed[512 + 15] == 0xB0  # row 9, block 3: fp16(1 * 128) = 0x5800, over 2^7
    assert sum(byte != 0 for byte in packed[:512]) == 5


@pytest.mark.parametrize("shape", [(16, 64), (16, 16), (32, 288), (64, 1408), (32, 2304), (16, 7168)], ids=str)
@both
def test_round_trip(pack: Form, unpack: Form, shape: tuple[int, int]) -> None:
    codes, scales = random_weight(*shape)
    packed = pack(codes, scales)
    assert packed.numel() == fragment_bytes(*shape)
    again, scales_again = unpack(packed, *shape)
    assert torch.equal(again, codes)
    assert torch.equal(scales_again.view(torch.uint8), scales.view(torch.uint8))


@both
def test_every_scale_byte_survives_nan_included(pack: Form, unpack: Form) -> None:
    scales = torch.arange(128, dtype=torch.uint8).view(16, 8).view(torch.float8_e4m3fn)
    _, again = unpack(pack(torch.zeros(16, 64, dtype=torch.uint8), scales), 16, 128)
    assert torch.equal(again.view(torch.uint8), scales.view(torch.uint8))


def bf16(bits: int) -> float:
    return float(torch.tensor(bits, dtype=torch.uint16).view(torch.bfloat16).double())


def test_every_bit_of_two_words_is_a_code_bit() -> None:
    """The sets {15, 8, 7, 6} - 2 i tile the words, so rotations and masks are all a kernel needs."""
    taken = [[], [], []]
    for i in range(8):
        taken[i % 3] += [(bit + half - 2 * i) % 32 for bit in (15, 8, 7, 6) for half in (0, 16)]
    first, second, mixed = map(set, taken)
    assert [len(bits) for bits in taken] == [len(first), len(second), len(mixed)] == [24, 24, 16]
    from_first = {bit for bit in range(32) if FROM_FIRST >> bit & 1}
    assert first | (mixed & from_first) == second | (mixed - from_first) == set(range(32))
    assert not first & mixed & from_first and not second & (mixed - from_first)


def test_rotations_and_masks_of_the_kernel_read_bf16_values() -> None:
    """What decode() of common.cuh does to two words gives e2m1 * 2^-126 in every register and half, for every code."""
    for code in range(16):
        codes = torch.full((16, 32), code | code << 4, dtype=torch.uint8)
        packed = pack_fragments(codes, torch.ones(16, 4).to(torch.float8_e4m3fn)).tolist()
        for register in registers_of(*words_at(packed, 0)):
            for half in (register & 0xFFFF, register >> 16):
                assert bf16(half) * 2.0**126 == E2M1_VALUES[code]


def test_scale_arithmetic_of_the_kernel_gives_bf16_scales() -> None:
    """Four bytes to two pairs, scale * 2^119 of blocks 0, 2 and 1, 3, for every scale but zero, NaN included."""
    scales = torch.arange(128, dtype=torch.uint8).view(16, 8).view(torch.float8_e4m3fn)
    packed = pack_fragments(torch.zeros(16, 64, dtype=torch.uint8), scales)
    for row in range(16):
        for chunk in range(2):
            first = offsets(row, 64 * chunk, 128)[2]
            word = packed[first : first + 4].view(torch.uint32).item()
            even = (word << 4 & 0x0FF00FF0) | 0x70007000
            odd = (word >> 4 & 0x0FF00FF0) | 0x70007000
            for block, bits in enumerate((even & 0xFFFF, odd & 0xFFFF, even >> 16, odd >> 16)):
                value, want = bf16(bits), float(scales[row, 4 * chunk + block])
                assert value == want * 2.0**119 or want == 0 or (value != value and want != want)


@both
def test_codes_under_a_zero_scale_lose_their_magnitude_and_nothing_else(pack: Form, unpack: Form) -> None:
    codes = torch.full((16, 32), 0xF7, dtype=torch.uint8)
    again, scales = unpack(pack(codes, torch.zeros(16, 4).to(torch.float8_e4m3fn)), 16, 64)
    assert set(again.flatten().tolist()) == {0x80} and not scales.float().any()


@both
def test_errors(pack: Form, unpack: Form) -> None:
    codes, scales = random_weight(24, 64)
    with pytest.raises(LayoutError, match="multiple of 16"):
        pack(codes, scales)
    with pytest.raises(LayoutError, match="negative"):
        pack(torch.zeros(16, 32, dtype=torch.uint8), (-torch.ones(16, 4)).to(torch.float8_e4m3fn))
    with pytest.raises(LayoutError, match="bytes"):
        unpack(torch.zeros(10, dtype=torch.uint8), 16, 64)
