# SPDX-License-Identifier: Apache-2.0
"""A benchmark as one picture: time per call against tokens, both logarithmic, one line per candidate, named at its end.

Thick lines are this library's, thin ones its peers'; the dashed line is the floor that this machine sets: NVFP4
weights read, or multiplied in bf16, at the rates reached here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..plotting import BLUE, FAINT, GREEN, GREY, INK, ORANGE, PURPLE, SKY, SMALL, VERMILION, figure_file
from .report import BenchReport, Row

_OURS = [(BLUE, "o"), (GREEN, "D"), (SKY, "^"), (PURPLE, "v"), (INK, "P"), ("#999999", "X")]
_PEERS = [(ORANGE, "s"), (VERMILION, "h"), ("#8C6D1F", "d"), ("#882255", "p")]
_FLOOR_POINTS = 200
_LABEL_GAP = 0.055  # least distance of two names, as a share of the axis


def draw_bench(report: BenchReport, path: str | Path) -> None:
    """Draw a report into a file; its suffix chooses the format (.png, .svg, .pdf).

    Raises:
        UnsupportedError: matplotlib is not installed, or the suffix is no format it writes.
    """
    title = str(report.work)
    with figure_file(path, (9, 5.4), title[0].upper() + title[1:]) as figure:
        axes = figure.subplots()
        axes.set_title(_caption(report), loc="left", fontsize=SMALL, color=GREY)
        axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="time per call, µs (lower is better)")
        ends = [_draw_candidate(axes, report.of(name), *look) for name, look in _looks(report).items()]
        _draw_floor(axes, report)
        _axes(axes, report)
        _name_lines(axes, [end for end in ends if end is not None])


def _caption(report: BenchReport) -> str:
    machine, ceilings = report.machine, report.ceilings
    return (
        f"{machine.device} · torch {machine.torch} · {report.date[:10]} · medians · "
        f"read {ceilings.read_bytes_per_second / 1e9:,.4g} GB/s, "
        f"matmul {ceilings.matmul_flop_per_second / 1e12:.3g} TFLOP/s"
    )


def _looks(report: BenchReport) -> dict[str, tuple[str, str, float]]:
    """Colour, marker and line width of each candidate with a time, by its place among its kind."""
    looks = {}
    for ours, palette, width in ((True, _OURS, 2.4), (False, _PEERS, 1.3)):
        names = [name for name in report.candidates if report.of(name)[0].ours is ours]
        for place, name in enumerate(names):
            looks[name] = (*palette[place % len(palette)], width)
    return looks


def _draw_candidate(axes: Any, rows: Sequence[Row], colour: str, marker: str, width: float) -> Any:
    """One line; (last tokens, last time, name, colour, bold) for its label, or None where nothing was timed."""
    points = [(row.tokens, row.median_us) for row in sorted(rows, key=lambda row: row.tokens) if row.median_us]
    if not points:
        return None
    axes.plot(*zip(*points, strict=True), color=colour, marker=marker, linewidth=width, markersize=3.4 + width)
    return (*points[-1], rows[0].candidate, colour, rows[0].ours)


def _draw_floor(axes: Any, report: BenchReport) -> None:
    floors: dict[float, float] = {row.tokens: row.floor_us for row in report.rows}
    tokens = sorted(floors)
    if len(tokens) == 1:
        axes.axhline(floors[tokens[0]], color=INK, linestyle="--", linewidth=1.4)
        return
    low, high = tokens[0], tokens[-1]
    places = [low * (high / low) ** (i / _FLOOR_POINTS) for i in range(_FLOOR_POINTS + 1)]
    rates = report.ceilings.read_bytes_per_second, report.ceilings.matmul_flop_per_second
    line = [1e6 * report.work.floor_seconds(place, *rates) for place in places]
    axes.plot(places, line, color=INK, linestyle="--", linewidth=1.4)
    axes.fill_between(places, line, [1e-9] * len(places), color=FAINT, alpha=0.5, linewidth=0, zorder=0)
    axes.annotate(
        "floor: reads at full rate, then multiplies at full rate", (low, line[0]), xytext=(4, -4),
        textcoords="offset points", va="top", fontsize=SMALL,
    )  # fmt: skip


def _axes(axes: Any, report: BenchReport) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

    axes.xaxis.set_major_locator(FixedLocator(sorted(report.tokens)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.tick_params(length=0)
    axes.minorticks_off()
    times = [row.median_us for row in report.rows if row.median_us] + [row.floor_us for row in report.rows]
    axes.set_ylim(min(times) / 1.6, max(times) * 1.4)


def _name_lines(axes: Any, ends: list[tuple[float, float, str, str, bool]]) -> None:
    """Names right of where the lines end, moved apart where they would touch."""
    low, high = (math.log(limit) for limit in axes.get_ylim())
    ends = sorted(ends, key=lambda end: end[1])
    places = [(math.log(time) - low) / (high - low) for _, time, *_ in ends]
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + _LABEL_GAP)
    ceiling = 1.0
    for i in reversed(range(len(places))):
        places[i] = min(places[i], ceiling)
        ceiling = places[i] - _LABEL_GAP
    for place, (tokens, time, name, colour, bold) in zip(places, ends, strict=True):
        line = {"arrowstyle": "-", "color": colour, "linewidth": 0.6, "alpha": 0.6, "shrinkB": 4, "relpos": (0, 0.5)}
        axes.annotate(
            name, (tokens, time), xytext=(1.02, place), textcoords="axes fraction", color=colour, va="center",
            fontweight="bold" if bold else "normal", fontsize=9, annotation_clip=False, arrowprops=line,
        )  # fmt: skip
