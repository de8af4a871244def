# SPDX-License-Identifier: Apache-2.0
"""The CPU kernel as a program of its own: under sanitizers, and on an emulated ARM; with the same bits everywhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# From the environment first: requirements/test.txt brings cmake and ninja.
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
CROSS_COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"

pytestmark = pytest.mark.slow


def tool(name: str) -> str | None:
    return shutil.which(name, path=PATH)


def needs(*names: str) -> pytest.MarkDecorator:
    missing = [name for name in names if tool(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}")


def output(*command: str, **environment: str) -> str:
    env = {**os.environ, "PATH": PATH, **environment}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
    return done.stdout


def build(folder: Path, *options: str) -> str:
    """The driver, built with options of CMake."""
    source = ["-S", str(ROOT), "-B", str(folder), "-G", "Ninja", "-DNVFP4_DRIVER=ON"]
    output("cmake", *source, *options)
    output("cmake", "--build", str(folder))
    return str(folder / "driver")


def digests(printed: str) -> dict[str, tuple[str, str]]:
    """{tier: (hash of nvfp4 results, hash of the others)}"""
    lines = [line.split() for line in printed.splitlines()]
    return {tier: (exact, others) for tier, exact, others in lines}


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    driver = build(tmp_path_factory.mktemp("sanitized"), "-DNVFP4_SANITIZE=address,undefined")
    return digests(output(driver, UBSAN_OPTIONS="print_stacktrace=1"))


@needs("cmake", "ninja", "g++")
def test_sanitizers_find_nothing_and_tiers_agree(sanitized: dict[str, tuple[str, str]]) -> None:
    """AddressSanitizer and UndefinedBehaviorSanitizer end the program at what they find."""
    assert "portable" in sanitized
    assert len({exact for exact, _ in sanitized.values()}) == 1, sanitized
    assert len({others for tier, (_, others) in sanitized.items() if tier != "avx512bf16"}) == 1, sanitized


@needs("cmake", "ninja", "g++", CROSS_COMPILER, EMULATOR)
def test_arm_gives_the_same_bits(sanitized: dict[str, tuple[str, str]], tmp_path: Path) -> None:
    """NEON with dot products, cross-compiled and emulated: every hash is that of this machine's portable tier."""
    system = ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={CROSS_COMPILER}"]
    driver = build(tmp_path, *system, "-DCMAKE_EXE_LINKER_FLAGS=-static")
    arm = digests(output(EMULATOR, "-cpu", "max", driver))
    assert arm["neon"] == arm["portable"] == sanitized["portable"]
