# SPDX-License-Identifier: Apache-2.0
"""The test bench itself: poisoned memory really is poisoned, seeds really are fixed."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BYTE_OF_NAN = {torch.float8_e4m3fn: 0x7F, torch.float8_e8m0fnu: 0xFF, torch.uint8: 0xFF}
ALLOCATORS = {
    "empty": lambda dtype: torch.empty(4099, dtype=dtype),
    "empty_like": lambda dtype: torch.empty_like(torch.zeros(4099, dtype=torch.uint8), dtype=dtype),
    "new_empty": lambda dtype: torch.zeros(1).new_empty(4099, dtype=dtype),
    "empty_strided": lambda dtype: torch.empty_strided((64, 65), (1, 64), dtype=dtype),
    "resize_": lambda dtype: torch.zeros(0, dtype=dtype).resize_(4099),
}


@pytest.mark.parametrize("allocator", ALLOCATORS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_uninitialised_floats_are_nan(allocator: str, dtype: torch.dtype) -> None:
    assert ALLOCATORS[allocator](dtype).isnan().all()


@pytest.mark.parametrize("allocator", ALLOCATORS)
@pytest.mark.parametrize("dtype", BYTE_OF_NAN, ids=str)
def test_uninitialised_bytes_are_nan_or_the_largest(allocator: str, dtype: torch.dtype) -> None:
    assert (ALLOCATORS[allocator](dtype).view(torch.uint8) == BYTE_OF_NAN[dtype]).all()


def test_the_poison_reaches_inside_custom_ops() -> None:
    @torch.library.custom_op("nvfp4_experts_test::forgets_to_write", mutates_args=())
    def forgets_to_write(x: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(x)

    assert forgets_to_write(torch.ones(7)).isnan().all()


def test_seeds_are_fixed() -> None:
    seen = torch.rand(3), np.random.rand(3), random.random()
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    assert torch.equal(seen[0], torch.rand(3))
    assert np.array_equal(seen[1], np.random.rand(3))
    assert seen[2] == random.random()
