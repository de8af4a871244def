# SPDX-License-Identifier: Apache-2.0
"""`nvfp4-experts bench`: this layer and its peers on the same work, next to the floor that the machine sets."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import InputError
from . import render
from .bench_ranks import bench_over_ranks
from .exactness import percent
from .files import check_outputs, whole_file
from .options import ActivationScale, Backend, Force, numbers, words

if TYPE_CHECKING:
    from ..diagnostics.bench.exact import ExactSection
    from ..diagnostics.bench.report import BenchReport, Row

NAME = "bench"
HELP = "Time one shared expert, or a mixture of experts, next to its peers and the floor that this machine sets."
EXAMPLE = "Example: [bold]nvfp4-experts bench --shape V4-Pro --tokens 1,16,64 --picture bench.png[/]"

_QUICK_TOKENS, _QUICK_SECONDS = "1,64", 5.0


def command(
    shape: Annotated[str, typer.Option(help="V4-Pro, V4-Flash, V4.1-Flash, or HxI.")] = "V4-Flash",
    moe: Annotated[
        bool, typer.Option("--moe", help="Time routed experts and the shared one together, without the router.")
    ] = False,
    experts: Annotated[
        int | None, typer.Option(help="Number of routed experts; --moe too.", show_default="that of the shape")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Experts of a token; --moe too.", show_default="6")] = None,
    shared: Annotated[
        bool | None,
        typer.Option("--shared/--no-shared", help="A shared expert beside them; --moe too.", show_default="shared"),
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option(help="Numbers of tokens.", show_default="8 from 1 to 8192; on a CPU, and with --moe, fewer"),
    ] = None,
    activations: Annotated[str, typer.Option(help="Activation formats of this layer.")] = "bf16,fp8,nvfp4",
    activation_scale: Annotated[
        ActivationScale, typer.Option(help="Where nvfp4 activations get their global scale.")
    ] = "dynamic",
    backend: Backend = "auto",
    device: Annotated[
        str | None, typer.Option(help="Torch device.", show_default="cuda where there is one, else cpu")
    ] = None,
    seconds: Annotated[float, typer.Option(help="Time for samples; building and checking come on top.")] = 30.0,
    ranks: Annotated[
        int | None,
        typer.Option(
            help="Instead: shared and routed experts over so many processes (a GPU each, or on the CPU) next to one.",
            show_default=False,
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help=f"Tokens {_QUICK_TOKENS} and {_QUICK_SECONDS:g} seconds.")
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the report as JSON to this file.", show_default=False)
    ] = None,
    csv_file: Annotated[
        Path | None, typer.Option("--csv", help="Write the rows as CSV to this file.", show_default=False)
    ] = None,
    report_file: Annotated[
        Path | None,
        typer.Option(
            "--report",
            help="Write one JSON file to send to us: machine, what can run, bits against backend exact, checks, times.",
            show_default=False,
        ),
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(help="Draw time against tokens: .png, .svg or .pdf.", show_default=False)
    ] = None,
    force: Force = False,
) -> None:
    check_outputs({"--json": json_file, "--csv": csv_file, "--report": report_file, "--picture": picture}, force)
    if quick:
        tokens, seconds = tokens or _QUICK_TOKENS, _QUICK_SECONDS

    if ranks is not None:
        others = {"--csv": csv_file, "--report": report_file, "--picture": picture}
        if given := [name for name, value in others.items() if value is not None]:
            raise InputError("--ranks", "is measured without other files", given, "use --json")
        bench_over_ranks(
            shape,
            ranks,
            json_file,
            activations=words(activations),
            activation_scale=activation_scale,
            backend=backend,
            tokens=numbers(tokens) if tokens is not None else None,
            device=device,
            experts=experts,
            top_k=top_k,
            seconds=seconds,
            command=" ".join(["nvfp4-experts", *sys.argv[1:]]),
        )
        return

    from ..diagnostics.bench.exact import measure_exactness, report_to_dict
    from ..diagnostics.bench.measure import (
        MOE_PEERS,
        PEERS,
        bench,
        checked_device,
        our_candidates,
        our_moe_candidates,
    )
    from ..diagnostics.bench.picture import draw_bench
    from ..diagnostics.bench.work import TOP_K, MoeWork, Work, find_moe, find_work
    from ..diagnostics.plotting import check_plotting

    if picture is not None:
        check_plotting()
    modes = words(activations), activation_scale, words(backend)
    work: Work | MoeWork
    if moe or (experts, top_k, shared) != (None, None, None):
        work = find_moe(shape, experts, TOP_K if top_k is None else top_k, shared is not False)
        candidates = (*our_moe_candidates(*modes), *MOE_PEERS)
    else:
        work, candidates = find_work(shape), (*our_candidates(*modes), *PEERS)
    section = None
    with render.progress(as_json=False, in_bytes=False) as progress:
        report = bench(
            work,
            candidates,
            tokens=numbers(tokens) if tokens is not None else None,
            device=device,
            seconds=seconds,
            command=" ".join(["nvfp4-experts", *sys.argv[1:]]),
            progress=progress,
        )
        if report_file is not None:
            progress(0, 1, "bits against backend exact")
            section = measure_exactness(our_candidates(*modes), checked_device(device))
    _print(report)
    if report_file is not None and section is not None:
        _print_exactness(section)
        with whole_file(report_file) as partial:
            partial.write_text(render.json_text(report_to_dict(report, section)) + "\n", encoding="utf-8")
    if json_file is not None:
        with whole_file(json_file) as partial:
            partial.write_text(render.json_text(report.to_dict()) + "\n", encoding="utf-8")
    if csv_file is not None:
        with whole_file(csv_file) as partial:
            report.write_csv(partial)
    if picture is not None:
        with whole_file(picture) as partial:
            draw_bench(report, partial)
    if not report.passed:
        raise typer.Exit(1)


def _print(report: BenchReport) -> None:
    out = render.console()
    machine, ceilings = report.machine, report.ceilings
    software = {"torch": machine.torch, "CUDA": machine.cuda, "driver": machine.driver, **machine.packages}
    out.print(
        render.facts(
            {
                "work": str(report.work),
                "machine": f"{machine.device}, {machine.threads} CPU threads",
                "software": ", ".join(f"{name} {version}" for name, version in software.items() if version),
                "date": report.date,
                "ceilings": f"read {render.size(int(ceilings.read_bytes_per_second))}/s ({ceilings.read_by}), "
                f"matmul {ceilings.matmul_flop_per_second / 1e12:.3g} TFLOP/s ({ceilings.matmul_by})",
                "weights": f"no candidate reads one again before {render.size(report.rotation_bytes)} of others",
            }
        )
    )
    checks = render.table("Checks", ("candidate", "what runs", "outcome"), ("weights", "copies", "rel-L2", "bound"))
    for name in report.candidates:
        checks.add_row(*_check_row(report.of(name)))
    out.print(checks)
    timed = [name for name in report.candidates if any(row.status == "timed" for row in report.of(name))]
    hits = any(row.hits is not None for row in report.rows)
    columns = ("tokens", *(["experts hit"] if hits else []), "floor", *map(_text, timed))
    times = render.table("Median µs per call, and how many times the floor", (), columns)
    for count in report.tokens:
        rows = [row for name in timed for row in report.of(name) if row.tokens == count]
        found = [] if rows[0].hits is None else [_digits(rows[0].hits)]
        times.add_row(str(count), *found, _digits(rows[0].floor_us), *map(_time, rows))
    if timed:
        out.print(times)


def _print_exactness(section: ExactSection) -> None:
    """Each comparison in a line, and whether the exact side can be trusted on this device."""
    out = render.console()
    numbers = ("tokens", "with other h", "bit-equal bf16", "fp32")
    table = render.table("nvfp4 outputs against backend exact", ("backend", "shape", "activation scale"), numbers)
    for case in section.cases:
        cells = [case.backend, case.shape, case.activation_scale, str(case.tokens)]
        if case.found is None:
            out.print(f"{' '.join(cells)}: {case.reason}", markup=False)
            continue
        cells[0] = case.found.backend
        equal = [percent(output.share) for output in case.found.outputs]
        table.add_row(*cells, str(case.found.tokens_with_other_h), *equal)
    out.print(table)
    check = section.against_cpu
    same = check.first is None
    verdict = "[green]the same bits[/]" if same else f"[bold red]{percent(check.share)} equal[/]"
    out.print(f"exact sums here ({section.form}) and on the CPU: {verdict}")


def _check_row(rows: tuple[Row, ...]) -> list[str]:
    """One candidate over all numbers of tokens: the worst error, and every reason with the tokens it is about."""
    first = rows[0]
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row.reason is not None:
            reasons.setdefault(row.reason, []).append(str(row.tokens))
    outcome = "[green]right[/]"
    if first.status == "failed":
        outcome = f"[bold red]FAILED[/]: {_text(first.reason)}"
    elif reasons:
        some = len(next(iter(reasons.values()))) < len(rows)
        outcome = "; ".join(
            f"{_text(reason)}" + (f" ({', '.join(counts)} tokens)" if some else "")
            for reason, counts in reasons.items()
        )
    errors = [row.rel_l2 for row in rows if row.rel_l2 is not None]
    worst = max(errors, key=lambda error: (error != error, error), default=None)
    weights = "–" if first.resident_bytes is None else render.size(first.resident_bytes)
    copies = str(first.copies or "–")
    figures = [weights, copies, render.number(worst), render.number(first.bound)]
    return [_text(first.candidate), first.detail, outcome, *figures]


def _text(reason: str | None) -> str:
    return (reason or "").replace("[", r"\[")


def _time(row: Row) -> str:
    if row.median_us is None or row.times_floor is None:
        return "–"
    return f"{_digits(row.median_us)} ({_digits(row.times_floor)}×)"


def _digits(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
