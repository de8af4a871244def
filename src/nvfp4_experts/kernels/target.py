# SPDX-License-Identifier: Apache-2.0
"""What machine this is: the only file that asks.

Predicates name the feature a kernel needs, never the chip, so that dispatch reads as a list of needs.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass

import torch

from ..errors import UnsupportedError


@dataclass(frozen=True)
class Target:
    """One device as the kernels see it.

    Args:
        device_type: "cpu", "cuda", or whatever torch calls it.
        name: what a person would call it.
        capability: CUDA compute capability (major, minor); None elsewhere.
        multiprocessors: how many the GPU has; None elsewhere.
    """

    device_type: str
    name: str
    capability: tuple[int, int] | None = None
    multiprocessors: int | None = None

    @property
    def has_native_fp4(self) -> bool:
        """Tensor cores multiply NVFP4 by NVFP4 (compute capability 10.x and 12.x)."""
        return self.capability is not None and self.capability[0] in (10, 12)

    @property
    def has_bf16_matmul_with_fp32_result(self) -> bool:
        """torch.mm takes bf16 operands and returns the fp32 sum unrounded."""
        return self.capability is not None and self.capability >= (8, 0)


def usable_device(device: torch.device | str) -> torch.device:
    """The device of that name, if a value can be put on it and read back.

    Raises:
        UnsupportedError: no such device, one that this torch or machine lacks, or one without values (meta).
    """
    try:
        made = torch.device(device)
        torch.ones((), device=made).item()
    except (RuntimeError, AssertionError, NotImplementedError) as bad:  # torch has no one error for this
        got = str(bad).partition("\n")[0]
        raise UnsupportedError(f"device {str(device)!r}", "must be one that works here", got, 'use "cpu"') from bad
    return made


def target_of(device: torch.device | str) -> Target:
    """Describe a device; cached, so that asking on every call costs a dictionary look-up."""
    device = torch.device(device)
    return _target(device.type, device.index)


def current_device() -> torch.device:
    """The CUDA device that torch launches on, or the CPU where there is none."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def identity_of(device: torch.device) -> str | None:
    """What tells a GPU from all others, in every process; None of another device."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None


def identities_in_reach(device: torch.device) -> set[str | None]:
    """Of the GPUs whose memory this process can map beside that of a device, which is one of them."""
    if device.type != "cuda":
        return set()
    others = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    return {identity_of(o) for o in others if o == device or torch.cuda.can_device_access_peer(device, o)}


def cpu_threads() -> int:
    """Threads a CPU kernel may use: torch's number, and no more than the processors this process may run on."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(torch.get_num_threads(), allowed)


@functools.cache
def _target(device_type: str, index: int | None) -> Target:
    if device_type != "cuda":
        return Target(device_type, device_type)
    properties = torch.cuda.get_device_properties(torch.cuda.current_device() if index is None else index)
    capability = (properties.major, properties.minor)
    return Target("cuda", properties.name, capability, properties.multi_processor_count)
