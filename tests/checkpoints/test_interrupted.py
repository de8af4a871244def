# SPDX-License-Identifier: Apache-2.0
"""Conversions that are killed, run into a full disk, or meet each other."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from nvfp4_experts.checkpoints import convert, errors, open_checkpoint
from tests.checkpoints import factory
from tests.checkpoints.test_convert import fingerprint

SHARDS = 4

KILLED = """
import os, signal, sys
from nvfp4_experts.checkpoints import convert
from nvfp4_experts.checkpoints.safetensors_file import SafetensorsWriter

source, target, place, count = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])

def deadly(original):
    def call(*arguments, **options):
        global count
        count -= 1
        if count < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)
    return call

owner, name = {"write": (SafetensorsWriter, "write"), "replace": (os, "replace"), "rename": (os, "rename")}[place]
setattr(owner, name, deadly(getattr(owner, name)))
convert(source, target, experts="all")
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return factory.write(tmp_path / "src", factory.model(factory.fp8((32, 32)), factory.mxfp4())[0], shards=SHARDS)


def run_child(code: str, *arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False, **options)


def leftovers(folder: Path) -> list[str]:
    return sorted(
        str(p.relative_to(folder)) for p in folder.rglob("*") if p.name.endswith((".tmp", ".partial", ".lock"))
    )


@pytest.mark.parametrize(
    ("place", "count", "finished"),
    [("write", 0, 0), ("write", 45, None), ("replace", 2, 2), ("replace", SHARDS + 1, SHARDS), ("rename", 0, SHARDS)],
)
def test_killed_and_started_again_it_ends_with_the_same_bytes(
    tmp_path: Path, source: Path, place: str, count: int, finished: int | None
) -> None:
    before = fingerprint(source)
    target = tmp_path / "dst"
    child = run_child(KILLED, source, target, place, count)
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert not target.exists()
    kept = sorted(path.name for path in (tmp_path / "dst.partial").glob("*.safetensors"))
    assert finished in (len(kept), None)
    assert convert(source, target, experts="all").reused_shards == kept
    convert(source, tmp_path / "whole", experts="all")
    assert fingerprint(target) == fingerprint(tmp_path / "whole")
    assert fingerprint(source) == before
    assert leftovers(tmp_path) == []


def interrupted(
    source: Path, target: Path, monkeypatch: pytest.MonkeyPatch, writes: int, code: int = errno.ENOSPC
) -> None:
    """A conversion whose disk is full after `writes` writes."""
    original, left = os.pwrite, writes

    def full(*arguments: object) -> int:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(code, os.strerror(code))
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        convert(source, target, experts="all")


@pytest.mark.parametrize("writes", [0, 1, 7, 40, 60])
def test_a_full_disk_leaves_nothing_that_looks_finished(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    with pytest.raises(errors.DiskFullError, match="make room and start it again"):
        interrupted(source, tmp_path / "dst", monkeypatch, writes)
    assert not (tmp_path / "dst").exists()
    assert leftovers(tmp_path) == ["dst.partial", "dst.partial.lock"]
    for shard in (tmp_path / "dst.partial").glob("*.safetensors"):
        assert open_checkpoint(shard).tensors  # what has its name is whole
    convert(source, tmp_path / "dst", experts="all")
    assert open_checkpoint(tmp_path / "dst").problems == []
    assert leftovers(tmp_path) == []


def test_a_real_file_size_limit_is_a_full_disk(tmp_path: Path, source: Path) -> None:
    code = "import sys; from nvfp4_experts.checkpoints import convert; convert(sys.argv[1], sys.argv[2])"
    limit = 20_000
    child = run_child(
        code, source, tmp_path / "dst", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    )
    assert child.returncode == 1
    assert "DiskFullError" in child.stderr
    assert not (tmp_path / "dst").exists()
    assert leftovers(tmp_path) == ["dst.partial", "dst.partial.lock"]


def test_other_errors_of_the_disk_keep_their_name(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OSError, match="Input/output error") as caught:
        interrupted(source, tmp_path / "dst", monkeypatch, 3, errno.EIO)
    assert not isinstance(caught.value, errors.CheckpointError)


def test_too_little_room_is_told_before_a_shard_is_written(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10, 0, 10))
    with pytest.raises(errors.DiskFullError, match="bytes are left to write, got 10 bytes free"):
        convert(source, tmp_path / "dst")
    assert list((tmp_path / "dst.partial").iterdir()) == []


@pytest.mark.parametrize("change", ["options", "source", "config"])
def test_shards_of_another_conversion_are_not_reused(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    with pytest.raises(errors.DiskFullError):
        interrupted(source, tmp_path / "dst", monkeypatch, 60)
    assert list((tmp_path / "dst.partial").glob("*.safetensors"))
    options = {"recipe": "kernel"} if change == "options" else {}
    if change == "source":
        os.utime(next(source.glob("*.safetensors")), (1, 1))
    if change == "config":
        (source / "config.json").write_text('{"swiglu_limit": 7.0}')
    report = convert(source, tmp_path / "dst", experts="all", **options)
    assert report.reused_shards == []
    convert(source, tmp_path / "whole", experts="all", **options)
    assert fingerprint(tmp_path / "dst") == fingerprint(tmp_path / "whole")


@pytest.mark.parametrize("change", ["vanished", "written anew"])
def test_other_files_are_those_of_the_source_as_it_is_now(tmp_path: Path, source: Path, change: str) -> None:
    extra = source / "encoding" / "encode.py"
    extra.parent.mkdir()
    extra.write_text("old = True")
    target = tmp_path / "dst"
    assert run_child(KILLED, source, target, "rename", 0).returncode == -signal.SIGKILL
    assert (tmp_path / "dst.partial" / "encoding" / "encode.py").exists()
    extra.unlink()
    if change == "written anew":
        extra.write_text("new = True")
    assert convert(source, target, experts="all").reused_shards == []
    assert (target / "encoding" / "encode.py").exists() == extra.exists()
    convert(source, tmp_path / "whole", experts="all")
    assert fingerprint(target) == fingerprint(tmp_path / "whole")


def test_a_finished_shard_that_was_damaged_is_written_again(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(errors.DiskFullError):
        interrupted(source, tmp_path / "dst", monkeypatch, 60)
    shard = min((tmp_path / "dst.partial").glob("*.safetensors"))
    os.truncate(shard, shard.stat().st_size - 1)
    report = convert(source, tmp_path / "dst", experts="all")
    assert shard.name not in report.reused_shards
    assert open_checkpoint(tmp_path / "dst").problems == []


def test_a_destination_that_appears_meanwhile_is_not_replaced(tmp_path: Path, source: Path) -> None:
    target = tmp_path / "dst"
    with pytest.raises(errors.OutputExistsError):
        convert(source, target, progress=lambda *_: target.mkdir(exist_ok=True))  # rename alone would take its place
    assert list(target.iterdir()) == []
    target.rmdir()
    assert len(convert(source, target).reused_shards) == SHARDS


def test_two_conversions_do_not_share_a_destination(tmp_path: Path, source: Path) -> None:
    with open(tmp_path / "dst.partial.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(errors.ConversionRunningError, match="another is running"):
            convert(source, tmp_path / "dst")
    convert(source, tmp_path / "dst")
    assert leftovers(tmp_path) == []


def test_a_directory_of_that_name_that_is_someone_elses_is_left_alone(tmp_path: Path, source: Path) -> None:
    mine = tmp_path / "dst.partial" / "thesis.txt"
    mine.parent.mkdir()
    mine.write_text("ten years")
    with pytest.raises(errors.OutputExistsError, match=r"dst\.partial"):
        convert(source, tmp_path / "dst")
    assert mine.read_text() == "ten years"
    assert leftovers(tmp_path) == ["dst.partial"]
