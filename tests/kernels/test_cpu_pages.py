# SPDX-License-Identifier: Apache-2.0
"""Weights of the CPU backend lie on large pages where the system has them, and nothing else about them changes."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from nvfp4_experts.kernels import native
from nvfp4_experts.kernels.cpu import pages
from nvfp4_experts.kernels.dispatch import get_backend, get_routed_backend
from tests.kernels.test_routed_experts import make_experts

SMAPS = Path("/proc/self/smaps")
OFFERED = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def large_bytes(tensor: torch.Tensor) -> int:
    """Bytes on large pages in the mappings that the tensor touches."""
    total, counts = 0, False
    for line in SMAPS.read_text().splitlines():
        if mapping := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            start, end = (int(edge, 16) for edge in mapping.groups())
            counts = start < tensor.data_ptr() + tensor.nbytes and end > tensor.data_ptr()
        elif counts and line.startswith("AnonHugePages:"):
            total += int(line.split()[1]) << 10
    return total


def needs_large_pages() -> None:
    if not SMAPS.exists() or not OFFERED.exists() or "[never]" in OFFERED.read_text():
        pytest.skip("this system has no large pages for who asks")
    probe = pages.on_large_pages(torch.ones(8 * pages.PAGE, dtype=torch.uint8))
    if large_bytes(probe) < 7 * pages.PAGE:
        pytest.skip("this system gave no large pages to who asked")


def test_values_and_address_stay() -> None:
    for nbytes in (0, 1, pages.PAGE - 1, pages.PAGE, 5 * pages.PAGE + 3):
        values = torch.randint(256, (nbytes,), dtype=torch.uint8)
        before, address = values.clone(), values.data_ptr()
        assert pages.on_large_pages(values) is values
        assert values.data_ptr() == address and torch.equal(values, before)


def test_only_whole_pages_of_the_tensor_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(pages, "_madvise", lambda: lambda first, nbytes, advice: asked.append((first, nbytes)))
    memory = torch.empty(6 * pages.PAGE, dtype=torch.uint8)
    start = -memory.data_ptr() % pages.PAGE
    for first, count in ((0, pages.PAGE), (1, 2 * pages.PAGE), (pages.PAGE // 2, pages.PAGE), (5, 3 * pages.PAGE + 7)):
        asked.clear()
        part = memory[start + first : start + first + count]
        pages.on_large_pages(part)
        inside = [n for n in range(6) if first <= n * pages.PAGE and (n + 1) * pages.PAGE <= first + count]
        want = (memory.data_ptr() + start + inside[0] * pages.PAGE, len(inside) * pages.PAGE) if inside else None
        assert set(asked) == ({want} if want else set()), (first, count)
    pages.on_large_pages(torch.empty(4 * pages.PAGE, dtype=torch.uint8, device="meta"))
    assert set(asked) == {want}


def test_another_system_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert pages._madvise.__wrapped__() is None


@pytest.mark.skipif(native.load()[0] is None, reason=f"the native library is not here: {native.load()[1]}")
def test_packed_weights_lie_on_large_pages() -> None:
    needs_large_pages()
    gate, up, down = make_experts(4, 2048, 2048)
    one = get_backend("cpu").pack(gate[0], up[0], down[0])
    for name, packed in (*one.items(), *get_routed_backend("cpu").pack(gate, up, down).items()):
        if "_rows" in name:
            assert large_bytes(packed) >= packed.nbytes - 2 * pages.PAGE, name
