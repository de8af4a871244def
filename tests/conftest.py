# SPDX-License-Identifier: Apache-2.0
"""What holds for every test: fixed seeds, few threads, poisoned memory, and GPU tests skipped where there is no GPU.

Poison: while a test runs, memory that torch allocates without writing it (`torch.empty` and its kin, from Python and
from C++, inside custom ops too) is filled with NaN, or the largest integer. Reading what nobody wrote then shows.
`test_conftest.py` proves it.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
TINY_CHECKPOINT = ROOT / "data" / "tiny-deepseek-v4"
HELDOUT = TINY_CHECKPOINT / "heldout.txt"

# One thread for each of several test processes; a few for one alone, so that big machines do not drown small tests.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(torch.get_num_threads(), 4))
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic mode asks of cuBLAS

# No deadline: the first example of a property may pay for an import. The same examples on every run and machine.
hypothesis.settings.register_profile("project", deadline=None, derandomize=True, max_examples=50, database=None)
hypothesis.settings.load_profile("project")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked `gpu` where torch sees no CUDA device."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and torch.cuda.is_available() is False")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def seeds() -> None:
    """The same random numbers in every test, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Uninitialised memory is NaN during the test (`fill_uninitialized_memory` is torch's default)."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    before = torch.get_deterministic_debug_mode()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.set_deterministic_debug_mode(before)


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def tiny_checkpoint() -> Path:
    """The embedded trained DeepSeek-V4 checkpoint; never written to: copy it to `tmp_path` first."""
    return TINY_CHECKPOINT


@pytest.fixture(scope="session")
def heldout() -> Path:
    """65,536 bytes that the embedded checkpoint never saw in training."""
    return HELDOUT
