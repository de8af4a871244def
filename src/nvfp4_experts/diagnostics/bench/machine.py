# SPDX-License-Identifier: Apache-2.0
"""What a measurement must say about where it was taken: device, driver, CPU, versions; and how big the caches are."""

from __future__ import annotations

import importlib.metadata
import platform
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ...kernels.target import target_of

CUDA_ROTATION_BYTES = 400_000_000  # several times the largest L2 cache
_LEAST_ROTATION_BYTES = 100_000_000
_PACKAGES = ("triton", "humming-kernels")
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


@dataclass(frozen=True)
class Machine:
    """One machine; None for what it does not have or does not tell."""

    device: str
    cpu: str
    threads: int
    driver: str | None
    cuda: str | None
    python: str
    torch: str
    packages: dict[str, str]

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def describe_machine(device: torch.device) -> Machine:
    """The machine this process runs on, as seen from a device."""
    cuda = device.type == "cuda"
    cpu = cpu_model()
    return Machine(
        device=target_of(device).name if cuda else cpu,
        cpu=cpu,
        threads=torch.get_num_threads(),
        driver=_driver() if cuda else None,
        cuda=torch.version.cuda if cuda else None,
        python=platform.python_version(),
        torch=torch.__version__,
        packages={name: version for name in _PACKAGES if (version := installed_version(name)) is not None},
    )


def default_device() -> torch.device:
    """The first CUDA device where there is one, else the CPU."""
    try:
        target_of("cuda")
    except (AssertionError, RuntimeError):  # torch without CUDA; no driver or no device
        return torch.device("cpu")
    return torch.device("cuda")


def rotation_bytes(device: torch.device) -> int:
    """Bytes of distinct weights to cycle through so that none is still cached when its turn comes again.

    400 MB on CUDA; elsewhere a quarter more than the largest cache of the CPU, and at least 100 MB.
    """
    if device.type == "cuda":
        return CUDA_ROTATION_BYTES
    return max(_LEAST_ROTATION_BYTES, largest_cache_bytes() * 5 // 4)


def largest_cache_bytes(caches: Path = _CACHES) -> int:
    """Size of the largest cache Linux lists for the first CPU; 0 where it lists none."""
    sizes = [0]
    for file in caches.glob("index*/size"):
        if found := re.fullmatch(r"(\d+)([KMG]?)", file.read_text().strip()):
            sizes.append(int(found[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[found[2]])
    return max(sizes)


def cpu_model(file: Path = Path("/proc/cpuinfo")) -> str:
    """What a person calls this CPU."""
    found = re.search(r"^model name\s*:\s*(.+)$", _text(file), flags=re.M)
    return found[1].strip() if found else platform.processor() or platform.machine()


def _driver(file: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    found = re.search(r"\s(\d{3}\.\d+(?:\.\d+)?)\s", _text(file))
    return found[1] if found else None


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""


def installed_version(package: str) -> str | None:
    """Version of an installed distribution; None if it is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
