# SPDX-License-Identifier: Apache-2.0
"""`nvfp4-experts bench --ranks N`: layers over several ranks next to the same layers on one, as a table and a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from . import render
from .exactness import percent
from .files import whole_file

if TYPE_CHECKING:
    from ..diagnostics.bench.ranks import RanksReport


def bench_over_ranks(shape: str, ranks: int, json_file: Path | None, **options: Any) -> None:
    """Measure, print, write; exit code 1 if a plan is wrong. `options` are those of `bench_ranks`."""
    from ..diagnostics.bench.ranks import bench_ranks
    from ..diagnostics.bench.work import find_work

    report = bench_ranks(find_work(shape), ranks, **options)
    _print(report)
    if json_file is not None:
        with whole_file(json_file) as partial:
            partial.write_text(render.json_text(report.to_dict()) + "\n", encoding="utf-8")
    if not report.passed:
        raise typer.Exit(1)


def _print(report: RanksReport) -> None:
    out = render.console()
    machine = report.machine
    sizes = f"H {report.hidden_size}, I {report.intermediate_size}"
    out.print(
        render.facts(
            {
                "work": f"{report.shape}: {sizes}; routed: E {report.experts}, k {report.top_k}",
                "machine": f"{report.ranks} processes, {machine.device}, {report.transport}, torch {machine.torch}",
                "date": report.date,
            }
        )
    )
    columns = ("layer", "plan", "activations", "backend", "launched")
    figures = ("tokens", "1 rank", f"{report.ranks} ranks", "speedup", "rel-L2", "bits as 1")
    table = render.table("Median µs per call, of the slowest rank", columns, figures)
    for row in report.rows:
        cells = [row.layer, row.plan, row.activations, row.backend]
        if row.status != "timed":
            colour = "bold red" if row.status == "failed" else "yellow"
            reason = (row.reason or "").replace("[", r"\[")
            out.print(f"{' '.join(cells)} {row.tokens} tokens: [{colour}]{row.status}[/], {reason}")
            continue
        assert row.one_us is not None and row.plan_us is not None and row.speedup is not None
        times = [f"{row.one_us:,.1f}", f"{row.plan_us:,.1f}", f"{row.speedup:.2f}"]
        right = [render.number(row.rel_l2), percent(row.equal_bits or 0.0)]
        table.add_row(*cells, row.launched, str(row.tokens), *times, *right)
    if any(row.status == "timed" for row in report.rows):
        out.print(table)
