# SPDX-License-Identifier: Apache-2.0
"""A verification as one picture: how well the weights survived, and what the outputs lost, layer by layer.

Left: SQNR of gate, up and down in dB. Right: rel-L2 of the output in each activation format, on a logarithmic axis,
filled against the original weights (all that was lost) and hollow against the checkpoint's own (what the activation
format alone costs). Where a layer has several experts, the marker is their median and the bar their range.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

from .plotting import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, RED, SKY, SMALL, figure_file
from .verify import ExpertVerification, VerificationReport

_PROJECTIONS = {"gate": (BLUE, "o"), "up": (ORANGE, "s"), "down": (GREEN, "D")}
_OUTPUTS = {
    "bf16": (BLUE, "o"),
    "fp8": (ORANGE, "s"),
    "nvfp4 static": (PURPLE, "v"),
    "nvfp4 dynamic": (GREEN, "D"),
    "nvfp4 per_token": (SKY, "^"),
}
_CROWDED = 16  # layers beyond which markers shrink and not every layer is numbered

_Figure = Callable[[ExpertVerification], float]


def draw(report: VerificationReport, path: str | Path) -> None:
    """Draw a report into a file; its suffix chooses the format (.png, .svg, .pdf).

    Raises:
        UnsupportedError: matplotlib is not installed, or the suffix is no format it writes.
    """
    with figure_file(path, (10, 4.6), _title(report)) as figure:
        figure.text(0.995, 0.975, _caption(report), fontsize=SMALL, color=GREY, ha="right", va="top")
        weights, outputs = figure.subplots(1, 2, width_ratios=(2, 3))
        _draw_weights(weights, report.experts)
        _draw_outputs(outputs, report)


def _title(report: VerificationReport) -> str:
    return f"{Path(report.checkpoint).name} against {Path(report.original).name}"


def _caption(report: VerificationReport) -> str:
    count = len(report.experts)
    return f"{count} expert{'s' * (count != 1)}, {report.tokens} tokens each: {report.hidden_states}"


def _draw_weights(axes: Any, experts: list[ExpertVerification]) -> None:
    def sqnr(name: str) -> _Figure:
        return lambda expert: next(w.error.sqnr_db for w in expert.weights if w.projection == name)

    _prepare(axes, experts, "Weights against the original", "SQNR, dB (higher is better)")
    for i, (name, (colour, marker)) in enumerate(_PROJECTIONS.items()):
        _series(axes, experts, sqnr(name), colour, marker, 0.18 * (i - 1), name)
    low, high = axes.get_ylim()
    axes.set_ylim(low - 0.5, high + 0.5)
    _legend(axes)


def _draw_outputs(axes: Any, report: VerificationReport) -> None:
    _prepare(axes, report.experts, "Outputs", "relative L2 error (lower is better)")
    reading = "filled: all that was lost  ·  hollow: lost to the activation format alone"
    axes.set_title(reading, loc="right", fontsize=SMALL, color=GREY)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    labels = dict.fromkeys(output.label for expert in report.experts for output in expert.outputs)
    for i, label in enumerate(labels):
        colour, marker = _OUTPUTS[label]
        offset = 0.14 * (i - (len(labels) - 1) / 2)
        for filled in (True, False):
            figure = _output_figure(label, filled)
            _series(axes, report.experts, figure, colour, marker, offset, label if filled else None, filled)
    if not labels:
        _series(axes, report.experts, lambda expert: expert.exact.rel_l2 or math.nan, INK, "o", 0.0, "exact math")
    if all(expert.exact.rel_l2 == 0 for expert in report.experts) and not labels:
        axes.text(0.5, 0.5, "no error: the weights are the original's", transform=axes.transAxes, ha="center")
    axes.axhline(report.max_error, color=RED, linewidth=1.2, linestyle="--", zorder=1)
    axes.annotate(
        f"bound for bf16: {report.max_error:g}", (1, report.max_error), xycoords=("axes fraction", "data"),
        xytext=(0, 3), textcoords="offset points", ha="right", color=RED, fontsize=SMALL,
    )  # fmt: skip
    low, high = axes.get_ylim()
    axes.set_ylim(low, max(high, 1.6 * report.max_error))
    _legend(axes)


def _output_figure(label: str, against_original: bool) -> _Figure:
    def figure(expert: ExpertVerification) -> float:
        for output in expert.outputs:
            if output.label == label:
                side = output.against_original if against_original else output.against_own_weights
                return side.rel_l2 or math.nan  # zero has no place on a logarithmic axis
        return math.nan

    return figure


def _prepare(axes: Any, experts: list[ExpertVerification], title: str, label: str) -> None:
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_ylabel(label)
    axes.set_xlabel("layer")
    layers = sorted({expert.layer for expert in experts})
    axes.set_xlim(-0.6, len(layers) - 0.4)
    step = -(-len(layers) // _CROWDED)
    axes.set_xticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    axes.tick_params(length=0)


def _series(
    axes: Any,
    experts: Iterable[ExpertVerification],
    figure: _Figure,
    colour: str,
    marker: str,
    offset: float,
    label: str | None = None,
    filled: bool = True,
) -> None:
    """One marker per layer: the median of its experts, with their range as a bar."""
    by_layer: dict[int, list[float]] = {}
    for expert in experts:
        by_layer.setdefault(expert.layer, [])
        if math.isfinite(value := figure(expert)):
            by_layer[expert.layer].append(value)
    places, middle, low, high = [], [], [], []
    for place, layer in enumerate(sorted(by_layer)):
        if found := by_layer[layer]:
            places.append(place + offset)
            middle.append(median(found))
            low.append(middle[-1] - min(found))
            high.append(max(found) - middle[-1])
    axes.errorbar(
        places, middle, yerr=(low, high), fmt=marker, color=colour, label=label, elinewidth=1.4, markeredgewidth=1.2,
        markerfacecolor=colour if filled else "white", markersize=6 if len(by_layer) <= _CROWDED else 3.5,
    )  # fmt: skip


def _legend(axes: Any) -> None:
    """One row below the axes: the series, drawn without their bars."""
    series, labels = axes.get_legend_handles_labels()
    axes.legend(
        [bars.lines[0] for bars in series], labels, loc="upper left", bbox_to_anchor=(-0.02, -0.12),
        ncols=len(labels), frameon=False, fontsize=SMALL, handletextpad=0.1, columnspacing=0.8,
    )  # fmt: skip
