# SPDX-License-Identifier: Apache-2.0
"""The same bits while processes take turns on a GPU: turns.py says why."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROCESSES, CALLS = 8, 1000


@pytest.mark.gpu
@pytest.mark.slow
def test_the_same_bits_while_processes_take_turns() -> None:
    command = [sys.executable, "-m", "tests.kernels.turns", str(CALLS)]
    started = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(PROCESSES)]
    printed = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0] * PROCESSES
    for found in map(json.loads, printed):
        assert found and not any(found.values()), found
