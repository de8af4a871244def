# SPDX-License-Identifier: Apache-2.0
"""Runs tests against another copy of the package, in a process forked from one that has torch loaded already."""

from __future__ import annotations

import faulthandler
import itertools
import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_SECONDS = 300

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["hypothesis", "pytest", "torch", "torch._inductor.config"])


def run_tests(source: Path, *node_ids: str, cases: int | None = None) -> tuple[int, str]:
    """Run tests of the working tree with the package in `source`: pytest's exit code, and what it printed.

    Args:
        cases: of a test with parameters, at most so many; None: all.
    """
    log = source / "log"
    process = _processes.Process(target=_child, args=(source, log, node_ids, cases))
    process.start()
    process.join(TIMEOUT_SECONDS)
    process.kill()
    process.join()
    return process.exitcode or 0, log.read_text(encoding="utf-8")


def build_native(source: Path) -> None:
    """Build the native library of the package in `source` into it, as `make native` does, its portable tier alone."""
    shutil.copy(ROOT / "CMakeLists.txt", source.parent)
    build = str(source.parent / "build")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    configure = ["-S", str(source.parent), "-B", build, "-G", "Ninja", "-DNVFP4_PORTABLE_ONLY=ON"]
    for arguments in (configure, ["--build", build], ["--install", build, "--prefix", str(source)]):
        command = [shutil.which("cmake", path=path) or "cmake", *arguments]
        subprocess.run(command, check=True, env={**os.environ, "PATH": path}, stdout=subprocess.DEVNULL)


class _FewCases:
    """A plugin that runs a test with its first parameters alone."""

    def __init__(self, most: int | None) -> None:
        self._most = most

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        tests = itertools.groupby(items, key=lambda item: item.nodeid.partition("[")[0])
        items[:] = [item for _, of_test in tests for item in itertools.islice(of_test, self._most)]


def _child(source: Path, log: Path, node_ids: tuple[str, ...], cases: int | None) -> None:
    with open(log, "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    faulthandler.dump_traceback_later(TIMEOUT_SECONDS - 10)
    # With CI set, pytest prints differences whole, however long that takes.
    for name in [name for name in os.environ if name.startswith("PYTEST_") or name in ("CI", "BUILD_NUMBER")]:
        del os.environ[name]
    # An editable install finds the package in the working tree, whatever the path says.
    sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in type(finder).__module__]
    os.chdir(ROOT)
    sys.dont_write_bytecode = True
    assert "nvfp4_experts" not in sys.modules
    options = ["-q", "-x", "--tb=line", "-p", "no:cacheprovider", "-o", f"pythonpath={source} {ROOT}"]
    sys.exit(pytest.main([*options, *node_ids], plugins=[_FewCases(cases)]))
