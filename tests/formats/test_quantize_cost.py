# SPDX-License-Identifier: Apache-2.0
"""What `quantize` costs on a CPU: no more time than torchao in the same run, at most twice its input in memory."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import pytest
import torch

from nvfp4_experts.formats.nvfp4 import RECIPES, quantize

PEAK = """
import sys
import torch
from nvfp4_experts.formats.nvfp4 import quantize

def peak():  # not ru_maxrss, which a child inherits from its parent
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

recipe, dtype, transposed = sys.argv[1], getattr(torch, sys.argv[2]), sys.argv[3] == "True"
w = torch.empty(8192, 4096, dtype=dtype).fill_(0.5)
w[::3, ::5] = -1.25
w = w.T if transposed else w
quantize(w[:64, :64], recipe)  # code and tables are loaded before the measurement
before = peak()
t = quantize(w, recipe)
print(peak() - before, w.nbytes, t.nbytes)
"""


@pytest.fixture(params=[1, 2], ids=lambda n: f"{n}-threads")
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def medians(*functions: Callable[[], object], rounds: int = 3) -> list[float]:
    """Median seconds of each, taken in turn so that a busy moment of the machine hits all of them."""
    seconds: list[list[float]] = [[] for _ in functions]
    for _ in range(rounds):
        for function, record in zip(functions, seconds, strict=True):
            start = time.perf_counter()
            function()
            record.append(time.perf_counter() - start)
    return [median(record) for record in seconds]


def test_no_slower_than_torchao(threads: int) -> None:
    module = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    w = torch.randn(4096, 2048).bfloat16()

    def torchao() -> object:
        return module.nvfp4_quantize(w, per_tensor_scale=module.per_tensor_amax_to_scale(w.abs().amax()))

    theirs, *ours = medians(torchao, *(lambda recipe=recipe: quantize(w, recipe) for recipe in RECIPES))
    print(f"{threads} threads: torchao {theirs * 1e3:.0f} ms, " + ", ".join(f"{o * 1e3:.0f} ms" for o in ours))
    for recipe, seconds in zip(RECIPES, ours, strict=True):
        assert seconds <= theirs, recipe


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
@pytest.mark.parametrize(
    ("recipe", "dtype", "transposed"),
    [("modelopt", "bfloat16", False), ("kernel", "bfloat16", True), ("torchao", "float32", False)],
)
def test_peak_memory_is_the_result_and_a_constant(root: Path, recipe: str, dtype: str, transposed: bool) -> None:
    command = [sys.executable, "-c", PEAK, recipe, dtype, str(transposed)]
    run = subprocess.run(command, env={"PYTHONPATH": str(root / "src")}, capture_output=True, text=True, check=True)
    extra, source, result = (int(n) for n in run.stdout.split())
    print(f"{recipe} {dtype}: {extra / 2**20:.1f} MiB extra, {result / 2**20:.1f} of them the result")
    assert source >= 64 << 20
    assert extra >= result / 2, "the measurement missed the result itself"
    assert extra <= 2 * source
    assert extra <= result + (source if transposed else 0) + (32 << 20)
