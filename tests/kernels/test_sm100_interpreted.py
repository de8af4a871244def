# SPDX-License-Identifier: Apache-2.0
"""The kernels for Blackwell under Triton's interpreter: their cases in processes of their own.

Whether kernels are interpreted is decided when Triton is imported.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("triton")
HERE = Path(__file__).parent
CASES = ("sm100_cases.py", "sm100_routed_cases.py")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[subprocess.Popen[bytes], Path]]]:
    """Both files side by side, each on one core: the process, and where it prints."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short"]
    begun = {}
    for cases in CASES:
        log = tmp_path_factory.mktemp("interpreted") / "log"
        with open(log, "wb") as file:
            process = subprocess.Popen(
                [*command, str(HERE / cases)],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=HERE.parents[1],
            )
        begun[cases] = process, log
    yield begun
    for process, _ in begun.values():
        process.kill()
        process.wait()


@pytest.mark.parametrize("cases", CASES)
def test_every_case_under_the_interpreter(cases: str, runs: dict[str, tuple[subprocess.Popen[bytes], Path]]) -> None:
    process, log = runs[cases]
    code, printed = process.wait(), log.read_text(encoding="utf-8")
    assert code == 0, printed[-8000:]
    assert " passed" in printed and "skipped" not in printed
