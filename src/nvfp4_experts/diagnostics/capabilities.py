# SPDX-License-Identifier: Apache-2.0
"""What this machine can run: each backend and each tier of the CPU kernel, and why not what it cannot."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from .._version import __version__
from ..errors import UnsupportedError
from ..kernels import native
from ..kernels.dispatch import ACTIVATIONS, ALL_BACKENDS, BACKENDS_BY_NAME, Problem, get_backend
from ..kernels.exact import rule
from ..kernels.target import cpu_threads, target_of
from .bench.machine import cpu_model, default_device

# A size every backend takes: what is asked is what the machine lacks, not what a layer does.
_HIDDEN, _INTERMEDIATE = 256, 256


@dataclass(frozen=True)
class Ability:
    """Something that runs here, or why it does not (`reason`, a clause); `where` is a device or None.

    `note` says what else there is to know of how it runs.
    """

    name: str
    where: str | None
    reason: str | None
    note: str | None = None


@dataclass(frozen=True)
class Capabilities:
    """One machine as this package sees it.

    Args:
        cpu, threads: model, and how many threads the CPU kernel takes now (torch's number, the process's affinity).
        gpu: name and compute capability of the first CUDA device; None where torch sees none.
        backends: every backend on the CPU and, where there is one, on the GPU.
        library: file of the CPU kernel, or None.
        library_reason: why there is none.
        tiers: its instruction sets, best first.
        tier: the one that runs; None without the library or where the environment asks for one that is not here.
        tier_reason: what is wrong with what the environment asks for.
    """

    version: str
    torch: str
    cpu: str
    threads: int
    gpu: str | None
    backends: tuple[Ability, ...]
    library: str | None
    library_reason: str | None
    tiers: tuple[Ability, ...]
    tier: str | None
    tier_reason: str | None

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def describe_capabilities() -> Capabilities:
    """Ask the machine, the backends and the CPU kernel."""
    devices = [torch.device("cpu")]
    gpu = None
    if (device := default_device()).type == "cuda":
        devices.append(device)
        target = target_of(device)
        gpu = f"{target.name}, compute capability {'.'.join(map(str, target.capability or ()))}"
    loaded, reason = native.load()
    tier = tier_reason = None
    if loaded is not None:
        try:
            tier = native.tier().name
        except UnsupportedError as error:
            tier_reason = str(error)
    tiers = [
        Ability(known.name, None, None if known.present else f"this processor does not have all of: {known.needs}")
        for known in (() if loaded is None else loaded.tiers)
    ]
    return Capabilities(
        version=__version__,
        torch=torch.__version__,
        cpu=cpu_model(),
        threads=cpu_threads(),
        gpu=gpu,
        backends=tuple(_backend(name, where) for where in devices for name in ALL_BACKENDS),
        library=None if loaded is None else str(loaded.file),
        library_reason=reason or None,
        tiers=tuple(tiers),
        tier=tier,
        tier_reason=tier_reason,
    )


def _backend(name: str, device: torch.device) -> Ability:
    """Whether a backend runs on a device, and in which activation formats; the first reason where it does in none."""
    backend, target = get_backend(name), target_of(device)
    reasons = {}
    for activations in ACTIVATIONS:
        try:
            reasons[activations] = backend.refusal(Problem(_HIDDEN, _INTERMEDIATE, activations, target))
        except UnsupportedError as error:
            reasons[activations] = str(error)
    accepted = [activations for activations, reason in reasons.items() if reason is None]
    if not accepted:
        return Ability(name, device.type, next(iter(reasons.values())))
    notes = [] if len(accepted) == len(ACTIVATIONS) else [f"{', '.join(accepted)} activations alone"]
    if name in BACKENDS_BY_NAME:
        notes.append("when asked for by name")
    if name == "exact":
        notes.append(rule.form(device))
    return Ability(name, device.type, None, "; ".join(notes) or None)
