# SPDX-License-Identifier: Apache-2.0
"""How reports look: tables and panels for people, one JSON object for machines.

Reports go to stdout; progress and errors go to stderr, so that stdout can always be piped. In JSON a number that is
not finite (NaN, or the infinite SQNR of equal tensors) is null.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer
from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ..errors import Nvfp4Error

PIPED_WIDTH = 120

SEVERITY_STYLE = {"error": "bold red", "warning": "yellow", "note": "dim"}

ProgressCallback = Callable[[int, int, str], None]


def console(stderr: bool = False) -> Console:
    """A console on stdout or stderr; as wide as the terminal, or PIPED_WIDTH where there is none."""
    made = Console(stderr=stderr, highlight=False)
    if not made.is_terminal and "COLUMNS" not in os.environ:
        made.width = PIPED_WIDTH
    return made


def table(title: str, text: Sequence[str], numbers: Sequence[str]) -> Table:
    """A table with columns of text, aligned left, and then columns of numbers, aligned right."""
    made = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0)
    )
    for header in text:
        made.add_column(header, overflow="fold")
    for header in numbers:
        made.add_column(header, justify="right", overflow="fold")
    return made


def facts(rows: dict[str, object]) -> Table:
    """Two columns without lines: a name and a value. Values that are None are left out."""
    made = Table.grid(padding=(0, 2))
    made.add_column(style="cyan")
    made.add_column(overflow="fold")
    for name, value in rows.items():
        if value is not None:
            made.add_row(name, value if isinstance(value, Text) else Text(str(value)))
    return made


def failure(error: Nvfp4Error, as_json: bool) -> None:
    """Print an error on stderr: a red panel, or one JSON object."""
    if as_json:
        fields = {name: str(getattr(error, name)) for name in ("what", "rule", "got", "way_out")}
        typer.echo(json.dumps({"error": type(error).__name__, **fields, "message": str(error)}), err=True)
        return
    body = facts({"what": error.what, "rule": error.rule, "got": error.got, "way out": error.way_out})
    out = console(stderr=True)
    out.print(Panel(body, title=type(error).__name__, title_align="left", border_style="red", expand=False))


def print_json(report: dict[str, Any]) -> None:
    """Print a report as one JSON object on stdout."""
    typer.echo(json_text(report))


def json_text(report: dict[str, Any]) -> str:
    """A report as JSON that every parser accepts: numbers that are not finite become null."""
    return json.dumps(_finite(report), indent=2, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def size(count: int) -> str:
    """Bytes with a decimal unit: 16842364 -> '16.8 MB'."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{count} B" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.4g} TB"


def number(value: float | None, digits: int = 3) -> str:
    """So many significant digits; a dash for None."""
    return "–" if value is None else f"{value:.{digits}g}"


def span(low: float | None, high: float | None, digits: int = 3) -> str:
    """A range of numbers, or the one number that is both its ends."""
    return number(low, digits) if low == high else f"{number(low, digits)}…{number(high, digits)}"


@contextmanager
def progress(as_json: bool, *, in_bytes: bool = True) -> Iterator[ProgressCallback]:
    """A progress bar on stderr, fed with (done, total, label); silent for machines and off a terminal."""
    out = console(stderr=True)
    amount = TextColumn("{task.fields[amount]}", justify="right")
    columns = (TextColumn("[progress.description]{task.description}"), BarColumn(), amount, TimeRemainingColumn())
    with Progress(*columns, console=out, transient=True, disable=as_json or not out.is_terminal) as bar:
        task = bar.add_task("", total=None, amount="")

        def advance(done: int, total: int, label: str) -> None:
            amount = f"{size(done)} of {size(total)}" if in_bytes else f"{done} of {total}"
            bar.update(task, completed=done, total=total, description=label, amount=amount)

        yield advance
