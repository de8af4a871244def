# SPDX-License-Identifier: Apache-2.0
"""Output files appear whole or not at all, and an old one survives a failed write."""

from __future__ import annotations

from pathlib import Path

import pytest

from nvfp4_experts.cli.files import check_output, check_outputs, whole_file
from nvfp4_experts.errors import InputError


def test_a_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "report.json"
    with whole_file(target) as partial:
        partial.write_text("{}")
        assert partial.suffix == ".json" and not target.exists()
    assert target.read_text() == "{}"
    assert list(tmp_path.iterdir()) == [target]


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "report.json"
    target.write_text("old")
    with pytest.raises(RuntimeError, match="disk"), whole_file(target) as partial:
        partial.write_text("half")
        raise RuntimeError("disk")
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_outputs_are_checked_first(tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.touch()
    check_output(None, force=False)
    check_output(tmp_path / "free", force=False)
    check_output(taken, force=True)
    with pytest.raises(InputError, match="must not exist yet"):
        check_output(taken, force=False)
    with pytest.raises(InputError, match="existing folder"):
        check_output(tmp_path / "no" / "file", force=True)


def test_two_outputs_are_two_files(tmp_path: Path) -> None:
    one, same = tmp_path / "a.json", tmp_path / "b" / ".." / "a.json"
    (tmp_path / "b").mkdir()
    check_outputs({"--json": one, "--csv": tmp_path / "a.csv", "--picture": None, "--more": None}, force=False)
    with pytest.raises(InputError, match="--json and --picture: must be two files"):
        check_outputs({"--json": one, "--csv": None, "--picture": same}, force=False)
    with pytest.raises(InputError, match="existing folder"):
        check_outputs({"--json": one, "--csv": tmp_path / "no" / "file"}, force=False)
