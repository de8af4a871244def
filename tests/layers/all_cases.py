# SPDX-License-Identifier: Apache-2.0
"""All cases that test_parallel.py runs on four processes."""

from __future__ import annotations

from tests.layers import parallel_cases, parts_cases, peers_cases

CASES = {**parallel_cases.CASES, **parts_cases.CASES, **peers_cases.CASES}
