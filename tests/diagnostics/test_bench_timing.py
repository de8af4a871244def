# SPDX-License-Identifier: Apache-2.0
"""What the benchmark measures with: timers, ceilings, and what it says of the machine."""

from __future__ import annotations

import contextlib
import math
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nvfp4_experts.diagnostics.bench import ceilings, machine, timing

CPU = torch.device("cpu")

# --- timers -------------------------------------------------------------------------------------------------------


def test_the_clock_goes_over_all_copies_and_chains_them() -> None:
    order: list[tuple[int, float]] = []

    def call(i: int) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            order.append((i, float(x)))
            return x + 1

        return run

    timer = timing.ClockTimer([call(i) for i in range(3)], torch.zeros(()))
    for _ in range(4):
        assert timer.sample() > 0
    assert order == [(0, 0.0), (1, 1.0), (2, 2.0), (0, 3.0), (1, 4.0)]
    assert float(timer.outputs()[0]) == 5.0


def test_a_graph_holds_one_call_per_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Structure without a GPU: what is captured, and what a replay's time is divided by."""
    copies, seconds_per_replay = 5, 1e-4
    calls: list[int] = []
    captured: list[list[int]] = []
    clock = {"now": 0.0}

    class Graph:
        def replay(self) -> None:
            clock["now"] += seconds_per_replay

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.at = math.nan

        def record(self) -> None:
            self.at = clock["now"]

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: Event) -> float:
            return 1000 * (end.at - self.at)

    @contextlib.contextmanager
    def capture(graph: Graph) -> Any:
        before = len(calls)
        yield
        captured.append(calls[before:])

    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    for name, stand_in in {
        "device": lambda device: contextlib.nullcontext(),
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "synchronize": lambda: None,
        "CUDAGraph": Graph,
        "graph": capture,
        "Event": Event,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)

    def call(i: int) -> Callable[[Tensor], Tensor]:
        return lambda x: (calls.append(i), x + 1)[1]  # type: ignore[func-returns-value]

    timer = timing.GraphTimer([call(i) for i in range(copies)], torch.zeros(()))
    assert captured == [list(range(copies))]
    assert timer.sample() == pytest.approx(seconds_per_replay / copies)
    before = clock["now"]
    timer.sample()
    assert clock["now"] - before >= timing.MIN_SAMPLE_SECONDS
    assert [float(y) for y in timer.outputs()] == [copies, copies]


# --- ceilings and machine -----------------------------------------------------------------------------------------


def test_ceilings_are_the_faster_way(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([2e-3] * 5 + [1e-3] * 5 + [1e-3] * 5 + [4e-3] * 5)
    monkeypatch.setattr(ceilings, "seconds_per_call", lambda function, repeats, device: next(times))
    found = ceilings.measure_ceilings(CPU, 1 << 20, 64)
    assert found.read_bytes_per_second == pytest.approx((2 << 20) / 1e-3) and found.read_by.endswith("by rows")
    assert found.matmul_flop_per_second == pytest.approx(2 * 64**3 / 1e-3) and found.matmul_by == "64^3 bfloat16"


def test_the_largest_cache_is_found(tmp_path: Path) -> None:
    for i, size in enumerate(("48K", "2048K", "480M")):
        (tmp_path / f"index{i}").mkdir()
        (tmp_path / f"index{i}" / "size").write_text(size + "\n")
    assert machine.largest_cache_bytes(tmp_path) == 480 << 20
    assert machine.largest_cache_bytes(tmp_path / "nowhere") == 0


def test_rotation_is_larger_than_the_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.rotation_bytes(torch.device("cuda")) == 400_000_000
    monkeypatch.setattr(machine, "largest_cache_bytes", lambda: 1 << 30)
    assert machine.rotation_bytes(CPU) > 1 << 30
    monkeypatch.setattr(machine, "largest_cache_bytes", lambda: 0)
    assert machine.rotation_bytes(CPU) == 100_000_000


@pytest.mark.parametrize(
    "text",
    [
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27 06:54:38 UTC 2025\nGCC: 12.3.0\n",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n",
    ],
)
def test_driver_and_cpu_are_read_where_linux_keeps_them(tmp_path: Path, text: str) -> None:
    (tmp_path / "version").write_text(text)
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\n")
    assert machine._driver(tmp_path / "version") == "580.65.06"
    assert machine._driver(tmp_path / "nowhere") is None
    assert machine.cpu_model(tmp_path / "cpuinfo") == "Some CPU @ 2 GHz"
