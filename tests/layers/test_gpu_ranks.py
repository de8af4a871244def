# SPDX-License-Identifier: Apache-2.0
"""Layers over two GPUs: the cases of gpu_ranks_cases.py."""

from __future__ import annotations

import pytest
import torch

from tests.layers.gpu_ranks_cases import CASES
from tests.layers.ranks import run_cases

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return run_cases("tests.layers.gpu_ranks_cases", tmp_path_factory.mktemp("ranks"), ranks=2, device="cuda")


@pytest.mark.parametrize("name", CASES)
def test_over_gpus(name: str, outcomes: dict[str, list[str]]) -> None:
    assert not outcomes[name], "\n".join(outcomes[name])
