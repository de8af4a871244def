# SPDX-License-Identifier: Apache-2.0
"""Mailboxes of the decode kernel, as far as it goes without a GPU: their size, their first bytes, who shares one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from nvfp4_experts.errors import UnsupportedError
from nvfp4_experts.kernels.sm90 import mailbox
from nvfp4_experts.kernels.sm90.mailbox import all_bytes, decode_box, mailbox_bytes, mailboxes, routed_box

GPU = torch.device("cuda", 0)
BOX, OTHER = decode_box(64, 32), decode_box(128, 32)


class Stream:
    """What is current: a stream, and the capture it is part of; and a driver that gives host memory."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.stream, self.capture, self.made, self.refuses = 7, 0, 0, False
        patch.setattr(mailbox, "_all", {})
        patch.setattr(mailbox, "allocate", self.allocate)
        patch.setattr(mailbox, "fill", lambda memory, byte: memory.fill_(byte))
        patch.setattr(mailbox, "capture_id", lambda _: self.capture)
        patch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=self.stream))
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capture > 0)

    def allocate(self, device: torch.device, size: int) -> Tensor:
        if self.refuses:
            raise UnsupportedError("device memory", f"must get {size} bytes", 2, "less")
        self.made += 1
        return torch.zeros(size, dtype=torch.uint8)


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> Stream:
    return Stream(monkeypatch)


def test_bytes() -> None:
    """A line for the number of the launch, then two boxes of 8 tokens: x in bf16, h in fp32, amax of 8 channels."""
    assert mailbox_bytes(decode_box(4096, 2048)) == 128 + 2 * 8 * (2 * 4096 + 4 * 2048 + 4 * 256)
    assert mailbox_bytes(decode_box(144, 80)) == 128 + 2 * 8 * (
        2 * 192 + 4 * 128 + 4 * 10
    )  # rows are whole chunks of 64
    assert mailbox_bytes(decode_box(16, 16)) % 128 == 0


def test_bytes_of_routed_experts() -> None:
    """Rows of 64 slots and 8 of a shared expert: h in bf16; NVFP4: h in fp32, x in bf16 and a count of blocks too."""
    assert routed_box(144, 80, "bf16") == 72 * 2 * 128
    assert routed_box(144, 80, "static") == 72 * (2 * 128 + 4 * 80 + 2 * 192) + 16
    for mode in ("dynamic", "per_token"):  # x by token; and amax of 10 tiles, in 12 words
        assert routed_box(144, 80, mode) == 72 * (2 * 128 + 4 * 80 + 4 * 12) + 8 * 2 * 192 + 16
        assert mailbox_bytes(routed_box(144, 80, mode)) % 128 == 0


def test_a_new_mailbox_is_at_launch_0_with_empty_boxes(current: Stream) -> None:
    made = mailboxes(GPU, BOX).current()
    assert made.numel() == mailbox_bytes(BOX)
    assert not made[:128].any() and set(made[128:].tolist()) == {0xFF}


def test_launches_that_follow_each_other_share_one_and_others_do_not(current: Stream) -> None:
    first = mailboxes(GPU, BOX).current()
    assert mailboxes(GPU, BOX).current() is first
    seen = [first]
    for stream, capture in ((8, 0), (8, 1), (8, 2), (9, 2)):  # a stream, two captures on it, another stream of one
        current.stream, current.capture = stream, capture
        seen.append(mailboxes(GPU, BOX).current())
        assert mailboxes(GPU, BOX).current() is seen[-1]
    current.stream, current.capture = 7, 0
    seen.append(mailboxes(GPU, OTHER).current())
    seen += [mailboxes(GPU, BOX, ("static", hidden, 32)).current() for hidden in (64, 80)]  # rows of other lengths
    assert len({t.data_ptr() for t in seen}) == len(seen) == current.made
    assert all_bytes(GPU) == 7 * mailbox_bytes(BOX) + mailbox_bytes(OTHER)
    assert all_bytes(torch.device("cuda", 1)) == 0


def test_no_memory_leaves_things_as_they_were(current: Stream) -> None:
    current.refuses = True
    with pytest.raises(UnsupportedError, match="device memory"):
        mailboxes(GPU, BOX).current()
    assert all_bytes(GPU) == 0
    current.refuses = False
    assert mailboxes(GPU, BOX).current().numel() == all_bytes(GPU)
