# SPDX-License-Identifier: Apache-2.0
"""The kernels for Blackwell without its FP4 instruction: on other GPUs, and under Triton's interpreter on a CPU.

For tests and diagnosis, and so never the choice of "auto": the result is that of `sm100` but for the order of sums.
"""

from .backend import Sm100Backend
from .routed import Sm100RoutedExperts

BACKEND = Sm100Backend("sm100-decode", decoding=True)
ROUTED = Sm100RoutedExperts(BACKEND)
