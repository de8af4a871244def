# SPDX-License-Identifier: Apache-2.0
"""The tests are tested: every mistake in `mutants/table.py` must be caught by the test named for it.

Each mutant is a copy of `src` with one piece of text replaced; the named test runs against the copy in a process of its
own. C++ is built into the copy first, its portable tier alone. The working tree is never changed.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.mutants.mutant import Mutant
from tests.mutants.runner import ROOT, build_native, run_tests
from tests.mutants.table import MUTANTS

TESTS_FAILED = 1  # pytest's exit code; 2 and above mean that it could not run them

pytestmark = pytest.mark.slow


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of `src` to spoil."""
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    return Path(shutil.copytree(ROOT / "src", tmp_path / "src", ignore=ignore))


def spoil(source: Path, mutant: Mutant) -> None:
    path = source / "nvfp4_experts" / mutant.file
    text = path.read_text(encoding="utf-8")
    found = text.count(mutant.old)
    assert found == 1, (
        f"mutant {mutant.name!r}: its text occurs {found} times in {mutant.file}, and must occur once; "
        f"the code has moved on, so bring tests/mutants/table.py up to date:\n{mutant.old}"
    )
    path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
    if path.parent.name == "csrc":
        build_native(source)


@pytest.mark.parametrize("file", sorted({mutant.killed_by.partition("::")[0] for mutant in MUTANTS}))
def test_the_named_tests_pass_on_the_unspoiled_copy(file: str, source: Path) -> None:
    """A copy can run them; all of their cases run on the working tree anyway."""
    named = sorted({m.killed_by for m in MUTANTS if m.killed_by.startswith(f"{file}::")})
    code, output = run_tests(source, *named, cases=2)
    assert code == 0, output


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_is_killed(mutant: Mutant, source: Path) -> None:
    spoil(source, mutant)
    code, output = run_tests(source, mutant.killed_by)
    assert code != 0, f"{mutant.killed_by} does not notice: {mutant.name}"
    assert code == TESTS_FAILED, f"{mutant.killed_by} could not run:\n{output}"


def test_there_are_a_dozen_mutants_with_names_of_their_own() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 12


def test_a_mutant_whose_text_is_gone_says_so(source: Path) -> None:
    with pytest.raises(AssertionError, match="the code has moved on"):
        spoil(source, Mutant("lost", "errors.py", "no such text", "", ""))
