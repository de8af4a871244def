# SPDX-License-Identifier: Apache-2.0
"""What a mutant is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """One wrong version of one file.

    Args:
        name: what went wrong, in words.
        file: the file below src/nvfp4_experts.
        old: source text that occurs exactly once in it.
        new: what the mistake would have written instead.
        killed_by: the pytest node id that must fail on it.
    """

    name: str
    file: str
    old: str
    new: str
    killed_by: str
