# SPDX-License-Identifier: Apache-2.0
"""What the benchmark measures with: timers, ceilings, and what it says of the machine."""

from __future__ import annotations

import contextlib
import math
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nvfp4_experts.diagnostics.bench import ceilings, machine, timing
from nvfp4_experts.diagnostics.bench.candidates import TorchBf16
from nvfp4_experts.diagnostics.bench.work import find_work
from nvfp4_experts.diagnostics.metrics import rel_l2
from nvfp4_experts.errors import UnsupportedError

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
    assert [[float(y) for y in pair] for pair in timer.outputs()] == [[5.0, 5.0]]


SECONDS_PER_REPLAY = 1e-4


@dataclass
class Gpu:
    """What the stand-in for CUDA saw: calls, those within captures, seconds replayed, the sync debug mode."""

    calls: list[int] = field(default_factory=list)
    captured: list[list[int]] = field(default_factory=list)
    seconds: float = 0.0
    mode: object = 0


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """The structure of a graph timer without a GPU: what is captured runs at once, and a replay takes its time."""
    seen = Gpu()

    class Graph:
        def replay(self) -> None:
            seen.seconds += SECONDS_PER_REPLAY

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.at = math.nan

        def record(self) -> None:
            self.at = seen.seconds

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: Event) -> float:
            return 1000 * (end.at - self.at)

    @contextlib.contextmanager
    def capture(graph: Graph) -> Any:
        before = len(seen.calls)
        yield
        seen.captured.append(seen.calls[before:])

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
        "get_sync_debug_mode": lambda: seen.mode,
        "set_sync_debug_mode": lambda mode: setattr(seen, "mode", mode),
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return seen


def test_a_graph_holds_one_call_per_copy(gpu: Gpu) -> None:
    copies = 5

    def call(i: int) -> Callable[[Tensor], Tensor]:
        return lambda x: (gpu.calls.append(i), x + 1)[1]  # type: ignore[func-returns-value]

    timer = timing.GraphTimer([call(i) for i in range(copies)], torch.zeros(()))
    assert gpu.captured == [list(range(copies))]
    assert timer.sample() == pytest.approx(SECONDS_PER_REPLAY / copies)
    before = gpu.seconds
    timer.sample()
    assert gpu.seconds - before >= timing.MIN_SAMPLE_SECONDS
    assert [[float(y) for y in pair] for pair in timer.outputs()] == [[i, i] for i in range(1, copies + 1)]


def test_a_candidate_whose_last_bits_vary_is_not_called_wrong(gpu: Gpu) -> None:
    """A chain amplifies what its calls differ by: two runs of a noisy candidate end up unrelated, and yet are right."""
    work, copies = find_work("256x128"), 20
    run = TorchBf16().prepare(work.weights(CPU), 4).run
    generator = torch.Generator().manual_seed(0)

    def noisy(x: Tensor) -> Tensor:
        y = run(x)
        return y * (1 + 2e-3 * torch.randn(y.shape, generator=generator)).to(y.dtype)

    x = work.hidden_states(4, CPU)
    ends = [timing.chain([noisy] * copies, x)[-1] for _ in range(2)]
    assert rel_l2(*ends) > 0.5
    errors = [rel_l2(*pair) for pair in timing.GraphTimer([noisy] * copies, x).outputs()]
    assert len(errors) == copies and max(errors) < 0.01


def test_a_call_of_the_chain_that_is_wrong_in_its_replay_is_found(gpu: Gpu) -> None:
    timer = timing.GraphTimer([lambda x: x + 1] * 3, torch.ones(4))
    timer._states[2].mul_(1.1)  # as if the second call had written something else
    errors = [rel_l2(*pair) for pair in timer.outputs()]
    assert errors[0] == 0 and errors[1] == pytest.approx(0.1)


def test_a_call_that_waits_for_the_device_is_refused_before_a_capture(gpu: Gpu) -> None:
    def call(x: Tensor) -> Tensor:
        if gpu.mode == "error":
            raise RuntimeError(message)
        return x

    message = "called a synchronizing CUDA operation"
    with pytest.raises(UnsupportedError, match="must not wait for the device"):
        timing.GraphTimer([call], torch.zeros(()))
    assert gpu.mode == 0 and gpu.captured == []
    message = "another story"
    with pytest.raises(RuntimeError, match="another story"):
        timing.GraphTimer([call], torch.zeros(()))


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
