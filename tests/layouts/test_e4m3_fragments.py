# SPDX-License-Identifier: Apache-2.0
"""Fragments for FP8 tensor cores: the byte map element by element, and what a kernel picks out of it.

Their inverse, and what else both forms of fragments promise: test_fragments.py.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nvfp4_experts.formats.codes import E2M1_VALUES, pack_codes, unpack_codes
from nvfp4_experts.layouts.e4m3_fragments import pack_e4m3_fragments
from nvfp4_experts.layouts.fragments import CHUNK_BYTES
from tests.layouts.test_fragments import random_weight


def offsets(row: int, column: int, columns: int) -> tuple[int, int, int]:
    """First byte of the word, code in it, byte of the scale: the closed form of the module docstring."""
    chunks = -(-columns // 64)
    tile, h, g = row // 16, row % 16 // 8, row % 8
    chunk, c, word, q = column // 64, column % 64 // 16, column % 16 // 8, column % 8
    start, lane = (tile * chunks + chunk) * CHUNK_BYTES, 4 * g + c
    return start + 16 * lane + 8 * h + 4 * word, q, start + 512 + 2 * lane + h


def word_at(packed: list[int], start: int) -> int:
    return int.from_bytes(bytes(packed[start : start + 4]), "little")


@pytest.mark.parametrize("shape", [(16, 64), (16, 16), (32, 1088), (48, 2048)], ids=str)
def test_every_element_is_where_the_closed_form_says(shape: tuple[int, int]) -> None:
    codes, scales = random_weight(*shape)
    packed = pack_e4m3_fragments(codes, scales).tolist()
    nibbles = unpack_codes(codes).tolist()
    for row in range(0, shape[0], 3):
        for column in range(shape[1]):
            start, q, scale = offsets(row, column, shape[1])
            word = word_at(packed, start)
            sign = word >> (8 * (q % 4) + 7 - 4 * (q // 4)) & 1
            assert sign << 3 | word >> 4 * q & 7 == nibbles[row][column]
            fp16 = torch.tensor(packed[scale] << 7, dtype=torch.int16).view(torch.float16)
            assert float(fp16) / 128 == float(scales[row, column // 16])


def picked(word: int, table: list[float], second: bool) -> list[float]:
    """Four codes of a word as the kernel picks them: prmt's nibbles, and a sign each."""
    selectors, signs = word & 0x77777777, word << 4 if second else word
    if second:
        selectors >>= 16
    bytes_ = [table[selectors >> 4 * i & 0xF] for i in range(4)]
    return [-b if signs >> 8 * i + 7 & 1 else b for i, b in enumerate(bytes_)]


def transposed(columns: Tensor) -> Tensor:
    """Each 64 columns as a 4 x 4 matrix of words of four, transposed: the order of activations."""
    return columns.view(-1, 4, 4, 4).transpose(1, 2).reshape(columns.shape)


def test_a_lane_picks_its_operands_in_the_order_of_activations() -> None:
    """Lane 4 g + c has k = 4 c + i and 16 + 4 c + i of each of two steps, for rows g and g + 8."""
    codes, scales = random_weight(16, 64)
    packed = pack_e4m3_fragments(codes, scales).tolist()
    values = torch.tensor([E2M1_VALUES[code] for code in unpack_codes(codes).flatten().tolist()]).view(16, 64)
    in_order = torch.stack([transposed(row) for row in values]).tolist()
    magnitudes = [abs(E2M1_VALUES[code]) for code in range(8)]
    for lane in range(32):
        g, c = divmod(lane, 4)
        for step in range(2):
            for register in range(4):
                row, begin = g + 8 * (register % 2), 32 * step + 16 * (register // 2) + 4 * c
                word = word_at(packed, 16 * lane + 8 * (register % 2) + 4 * step)
                assert picked(word, magnitudes, register >= 2) == in_order[row][begin : begin + 4]


def test_scale_arithmetic_of_the_kernel_gives_fp32_scales() -> None:
    """A byte moved by 20 bits and raised by 112 exponents is scale * 2^7, for every scale but zero and NaN."""
    scales = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn)
    bytes_ = torch.zeros(16, 8, dtype=torch.uint8)
    bytes_.view(-1)[1:127] = scales.view(torch.uint8)
    packed = pack_e4m3_fragments(torch.zeros(16, 64, dtype=torch.uint8), bytes_.view(torch.float8_e4m3fn))
    for row in range(16):
        for block in range(8):
            byte = int(packed[offsets(row, 16 * block, 128)[2]])
            value = torch.tensor((byte << 20) + (112 << 23), dtype=torch.int32).view(torch.float32)
            want = bytes_[row, block].view(torch.float8_e4m3fn).float()
            assert float(value) == float(want) * 128 or float(want) == 0


def test_golden_bytes() -> None:
    nibbles = torch.zeros(16, 64, dtype=torch.uint8)
    nibbles[0, 0], nibbles[8, 5], nibbles[9, 58] = 0xF, 0x5, 0xE  # -6, 3, -4
    scales = torch.full((16, 4), 2.0**-9)
    scales[0, 0], scales[9, 3] = 448.0, 1.0
    packed = pack_e4m3_fragments(pack_codes(nibbles), scales.to(torch.float8_e4m3fn)).tolist()
    # Lane 0: row 0 column 0 is code 0 of its first word, sign at bit 7; row 8 column 5 code 5 of its third. Lane 7:
    # row 9 column 58 is code 2 of its last word, magnitude at bit 8, sign at bit 23.
    assert packed[0:4] == [0x87, 0, 0, 0] and packed[8:12] == [0, 0, 0x50, 0]
    assert packed[7 * 16 + 12 : 7 * 16 + 16] == [0, 0x06, 0x80, 0]
    assert sum(byte != 0 for byte in packed[:512]) == 4
    assert packed[512] == 0xF6 and packed[513] == 0x68 and packed[512 + 15] == 0xB0
