# SPDX-License-Identifier: Apache-2.0
"""`nvfp4-experts tune`: find the fastest launch configurations on this GPU and write them as a table."""

from __future__ import annotations

import datetime
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import render
from .files import check_output, whole_file
from .options import numbers, words

if TYPE_CHECKING:
    from ..diagnostics.tune.search import Pair, Row

NAME = "tune"
HELP = "Find the fastest launch configurations of the Hopper kernels on this GPU, and write them as a table."
EXAMPLE = "Example: [bold]nvfp4-experts tune --shape V4-Pro --tokens 16,64 --output sm_90-132.json[/]"


def command(
    shape: Annotated[
        str, typer.Option(help="V4-Pro, V4-Flash, V4.1-Flash, or HxI; several with commas.")
    ] = "V4-Pro,V4-Flash,V4.1-Flash",
    tokens: Annotated[
        str | None, typer.Option(help="Numbers of tokens whose ranges are tuned.", show_default="all ranges")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="The table; what it holds already and is not tuned now stays.",
            show_default="the one this package reads on this GPU",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="Torch device, a Hopper GPU.")] = "cuda",
    seconds: Annotated[float, typer.Option(help="Time for samples; building and checking come on top.")] = 120.0,
) -> None:
    check_output(output, force=True)

    from ..diagnostics.bench.machine import describe_machine
    from ..diagnostics.bench.work import find_work
    from ..diagnostics.tune import halves, search
    from ..kernels.sm90.choice import device_class, table_path
    from ..kernels.sm90.table import Run, Table, load_table, table_text

    works = [find_work(name) for name in words(shape)]
    counts = None if tokens is None else numbers(tokens)
    where, target = search.hopper(device)
    name = device_class(target)
    path, in_use = output or table_path(target), table_path(target)
    base = next((load_table(file, name) for file in (path, in_use) if file.exists()), Table(name))
    machine = describe_machine(where)
    run = Run(
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        device=machine.device,
        driver=machine.driver,
        torch=machine.torch,
        command=" ".join(["nvfp4-experts", *sys.argv[1:]]),
    )
    with render.progress(as_json=False, in_bytes=False) as progress:
        layer_of = partial(halves.Layer, device=where)
        table, rows = search.tune(works, layer_of, target, base, run, tokens=counts, seconds=seconds, progress=progress)
    path.parent.mkdir(exist_ok=True)
    with whole_file(path) as partial_path:
        partial_path.write_text(table_text(table), encoding="utf-8")
    _print(rows, path)
    if any(row.wrong for row in rows):
        raise typer.Exit(1)


def _print(rows: tuple[Row, ...], path: Path) -> None:
    out = render.console()
    title = "Configurations of gate_up and down: row groups/column groups/tokens/split; µs of the layer"
    shown = render.table(title, ("shape", "tokens", "before", "now"), ("µs before", "µs now", "gain"))
    for row in rows:
        limit = "more" if row.limit is None else f"to {row.limit}"
        gain = None if row.old_us is None else row.old_us / row.new_us
        figures = ("–" if row.old_us is None else f"{row.old_us:,.1f}", f"{row.new_us:,.1f}", f"{render.number(gain)}×")
        shown.add_row(row.shape, limit, _text(row.old), "same" if row.new == row.old else _text(row.new), *figures)
    out.print(shown)
    for row in rows:
        for reason in row.wrong:
            out.print(f"[bold red]WRONG[/]: {row.shape}, {row.limit or 'more'} tokens, {reason}")
    out.print(f"Wrote {path}", highlight=False)


def _text(pair: Pair) -> str:
    return f"{pair[0]}  {pair[1]}"
