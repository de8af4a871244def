# SPDX-License-Identifier: Apache-2.0
"""The benchmark over ranks: real processes once, through the command line; what it refuses to time, in this one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from nvfp4_experts.diagnostics.bench import rank_process
from nvfp4_experts.diagnostics.bench.rank_process import RankRow, Settings
from nvfp4_experts.diagnostics.bench.ranks import OTHER_EXPERTS, bench_ranks
from nvfp4_experts.diagnostics.bench.work import find_work
from nvfp4_experts.errors import InputError
from tests.cli.commands import invoke

PLANS = ["tp", "ep", "dispatch slots", "dispatch ranks"]


def test_two_processes_from_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "ranks.json"
    options = ("--tokens", 5, "--device", "cpu", "--seconds", 0.1, "--activations", "nvfp4")
    result = invoke("bench", "--ranks", 2, "--shape", "64x48", *options, "--json", file)
    for text in ("2 processes", "gloo", "dispatch slots", "nvfp4 dynamic"):
        assert text in " ".join(result.stdout.split())
    report = json.loads(file.read_text())
    assert report["passed"] is True and (report["ranks"], report["experts"], report["top_k"]) == (2, OTHER_EXPERTS, 6)
    assert report["command"].startswith("nvfp4-experts")
    rows = {row["plan"]: row for row in report["rows"]}
    assert list(rows) == PLANS
    for row in rows.values():
        assert row["status"] == "timed" and row["rel_l2"] <= row["bound"] and row["samples"] >= 5
        assert row["speedup"] == pytest.approx(row["one_us"] / row["plan_us"])
    assert rows["dispatch slots"]["equal_bits"] == 1.0


def test_files_that_have_no_ranks_are_refused(tmp_path: Path) -> None:
    result = invoke("bench", "--ranks", 2, "--csv", tmp_path / "ranks.csv", code=2)
    assert "--ranks" in result.stderr and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranks": 1}, "ranks: must be at least 2"),
        ({"tokens": [0]}, "tokens"),
        ({"top_k": 17}, "top_k: must be at most E=16"),
        ({"seconds": 0}, "seconds"),
        ({"activations": ["int8"]}, "activations"),
    ],
)
def test_bad_options_are_refused_before_a_process_starts(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        bench_ranks(find_work("64x48"), **{"ranks": 2, "device": "cpu", **options})  # type: ignore[arg-type]


@pytest.fixture
def alone() -> Iterator[rank_process._Rank]:
    """The one rank of a group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    work, mode = find_work("64x48"), ("bf16", "dynamic")
    settings = Settings(work, 1, "cpu", (3,), (mode,), "auto", 5, 2, seconds=0.01, rotate=1)
    with torch.no_grad():
        yield rank_process._Rank(0, settings, torch.device("cpu"))
    dist.destroy_process_group()


def rows_of(rank: rank_process._Rank) -> list[RankRow]:
    mode = rank.settings.modes[0]
    return [*rank.shared(mode), *rank.routed(mode)]


def test_one_rank_alone_has_the_bits_of_one_rank(alone: rank_process._Rank) -> None:
    rows = rows_of(alone)
    assert [row.plan for row in rows] == PLANS
    assert all(row.status == "timed" and row.equal_bits == 1.0 and row.launched == "called" for row in rows)


@pytest.mark.parametrize("wrong", ["truth", "nan"])
def test_nothing_wrong_is_timed(alone: rank_process._Rank, monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    if wrong == "nan":
        run = rank_process.SummedOverRanks.forward
        monkeypatch.setattr(rank_process.SummedOverRanks, "forward", lambda *a, **k: run(*a, **k) * torch.nan)
    else:
        right = rank_process.reference.shared_expert
        monkeypatch.setattr(rank_process.reference, "shared_expert", lambda *a, **k: 1.05 * right(*a, **k))
    rows = rows_of(alone)
    failed = {row.plan for row in rows if row.status == "failed"}
    assert failed == ({"tp", "ep"} if wrong == "nan" else {"tp"})
    for row in rows:
        assert (row.one_us is None) == (row.status == "failed") and (row.reason is None) == (row.status == "timed")


def test_what_cannot_run_here_says_why(alone: rank_process._Rank) -> None:
    object.__setattr__(alone.settings, "backend", "sm90")
    rows = rows_of(alone)
    assert [row.status for row in rows] == ["unavailable"] * 4
    assert "needs a Hopper GPU" in str(rows[0].reason)
