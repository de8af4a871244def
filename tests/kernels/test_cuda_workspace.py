# SPDX-License-Identifier: Apache-2.0
"""Scratch of the GPU kernels, as far as it goes without a GPU: parts of a block, and blocks of streams."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nvfp4_experts.errors import UnsupportedError
from nvfp4_experts.kernels.cuda import workspace
from nvfp4_experts.kernels.cuda.workspace import ALIGNMENT, Part, bytes_of, carve, exclusive, reserve, scratch_bytes

CPU = torch.device("cpu", 0)
DTYPES = (torch.bfloat16, torch.float32, torch.int32, torch.uint8, torch.int64)
SHAPES = st.lists(st.integers(1, 40), min_size=1, max_size=3).map(tuple)
PARTS = st.lists(st.tuples(SHAPES, st.sampled_from(DTYPES)), min_size=1, max_size=6)


@pytest.fixture(scope="module")
def capturing() -> Iterator[None]:
    """As inside a graph capture, where the block comes from torch's allocator."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        yield


def test_bytes_are_rounded_up_part_by_part() -> None:
    assert bytes_of([]) == 0
    assert bytes_of([((1,), torch.uint8)]) == ALIGNMENT == 256
    assert bytes_of([((128,), torch.bfloat16)]) == 256
    assert bytes_of([((129,), torch.bfloat16)]) == 512
    assert bytes_of([((3, 5), torch.float32), ((7, 100), torch.bfloat16), ((1,), torch.int64)]) == 256 + 1536 + 256


@pytest.mark.usefixtures("capturing")
@given(parts=PARTS)
def test_parts_lie_one_after_the_other(parts: list[Part]) -> None:
    carved = carve(CPU, *parts)
    assert [(tuple(t.shape), t.dtype) for t in carved] == parts and all(t.is_contiguous() for t in carved)
    block = carved[0].untyped_storage()
    assert block.nbytes() == bytes_of(parts)
    begins = [t.data_ptr() - block.data_ptr() for t in carved]
    ends = [begin + t.nbytes for begin, t in zip(begins, carved, strict=True)]
    assert all(t.untyped_storage().data_ptr() == block.data_ptr() for t in carved)
    assert begins[0] == 0 and all(begin % ALIGNMENT == 0 for begin in begins) and ends[-1] <= block.nbytes()
    for end, begin in zip(ends, begins[1:], strict=False):
        assert end <= begin < end + ALIGNMENT


class Device:
    """A device of so many bytes: which stream is current, and what has been allocated."""

    def __init__(self, size: int) -> None:
        self.size, self.stream, self.allocations = size, 1, 0

    def allocate(self, device: torch.device, size: int) -> Tensor:
        if size > self.size:
            raise UnsupportedError("scratch", "must fit", size, "less")
        self.allocations += 1
        return torch.empty(size, dtype=torch.uint8)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    made = Device(1 << 20)
    for name in ("_reserved", "_scratch", "_calls"):
        monkeypatch.setattr(workspace, name, {})
    monkeypatch.setattr(workspace, "allocate", made.allocate)
    monkeypatch.setattr(workspace, "_current", lambda device: (device, made.stream))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return made


def test_what_is_reserved_is_not_allocated_again(device: Device) -> None:
    reserve(CPU, 4096)
    for size in (1, 4096, 256):
        carve(CPU, ((size,), torch.uint8))
    assert device.allocations == 1 and scratch_bytes(CPU) == 4096
    device.stream = 2  # takes its own, as large
    carve(CPU, ((1,), torch.uint8))
    assert device.allocations == 2 and scratch_bytes(CPU) == 8192


def test_calls_of_a_stream_share_a_block_and_streams_do_not(device: Device) -> None:
    (first,), (second,) = carve(CPU, ((64,), torch.uint8)), carve(CPU, ((64,), torch.uint8))
    assert first.data_ptr() == second.data_ptr()
    device.stream = 2
    assert carve(CPU, ((64,), torch.uint8))[0].data_ptr() != first.data_ptr()


def test_what_lies_behind_outlives_calls_that_carve_less(device: Device) -> None:
    reserve(CPU, 4096)
    (kept,) = carve(CPU, ((8,), torch.float32), behind=1000)
    kept.fill_(7.0)
    (other,) = carve(CPU, ((1000,), torch.uint8))
    other.fill_(1)
    assert (kept == 7.0).all() and kept.data_ptr() - other.data_ptr() == 1024 and device.allocations == 1


@pytest.mark.usefixtures("capturing")
def test_in_a_capture_nothing_is_allocated_to_lie_in_front() -> None:
    (kept,) = carve(CPU, ((8,), torch.float32), behind=1 << 30)
    assert kept.untyped_storage().nbytes() == ALIGNMENT


def test_a_failed_reservation_changes_nothing(device: Device) -> None:
    reserve(CPU, 4096)
    with pytest.raises(UnsupportedError, match="scratch"):
        reserve(CPU, device.size + 1)
    assert scratch_bytes(CPU) == 4096
    reserve(CPU, 8192)
    device.stream = 2
    carve(CPU, ((1,), torch.uint8))
    assert scratch_bytes(CPU) == 2 * 8192


def test_threads_on_a_stream_take_turns(device: Device) -> None:
    assert exclusive(CPU) is exclusive(CPU)
    mine = exclusive(CPU)
    with mine, mine:  # a call may make another
        taken: list[bool] = []
        thread = threading.Thread(target=lambda: taken.append(mine.acquire(blocking=False)))
        thread.start()
        thread.join()
        assert taken == [False]
    device.stream = 2
    assert exclusive(CPU) is not mine
