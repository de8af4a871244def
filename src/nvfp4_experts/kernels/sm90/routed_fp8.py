# SPDX-License-Identifier: Apache-2.0
"""Routed experts with FP8 activations on Hopper: as routed.py says; many tokens on FP8 tensor cores.

Weights are packed as fp8_backend.py packs them.
"""

from __future__ import annotations

from .fp8_backend import BACKEND
from .routed import Sm90RoutedExperts

ROUTED = Sm90RoutedExperts(BACKEND)
