# SPDX-License-Identifier: Apache-2.0
"""The demo's result as a picture: what the model writes, what NVFP4 costs in loss and per layer, what it saves."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

if TYPE_CHECKING:
    from examples.demo import Result, Row, Writing

# Okabe and Ito's palette: told apart by readers with any colour vision.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9")
CONTROL, GREY = "#D55E00", "#666666"
MONO_POINTS, MONO_ADVANCE = 8.0, 0.602  # of DejaVu Sans Mono, which matplotlib brings
STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "text.hinting": "none",
}


def draw(result: Result, path: Path) -> None:
    """Draw the texts and the panels and write them to `path`, whole or not at all."""
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(12, 12))
        figure.suptitle(
            "A trained DeepSeek-V4-architecture model, every expert in NVFP4", fontsize=15, x=0.03, ha="left"
        )
        texts = figure.add_gridspec(1, 2, left=0.03, right=0.98, top=0.905, bottom=0.665, wspace=0.04)
        original, *_, ours = result.writings
        for column, writing in enumerate((original, ours)):
            draw_text(figure.add_subplot(texts[0, column]), result, writing)
        middle = figure.add_gridspec(
            1, 3, left=0.135, right=0.98, top=0.61, bottom=0.385, width_ratios=(5, 3, 3), wspace=0.22
        )
        draw_loss(figure.add_subplot(middle[0]), result)
        draw_bytes(figure.add_subplot(middle[1]), result)
        draw_speed(figure.add_subplot(middle[2]), result)
        below = figure.add_gridspec(1, 2, left=0.065, right=0.98, top=0.305, bottom=0.085, wspace=0.15)
        layers = figure.add_subplot(below[0])
        draw_layers(layers, result, "against_original", "Each layer's experts, against the original weights")
        draw_layers(figure.add_subplot(below[1]), result, "against_nvfp4", "The activation format alone")
        figure.legend(*layers.get_legend_handles_labels(), loc="lower center", ncols=7, frameon=False, fontsize=9)
        beside = path.with_name(path.name + ".tmp")
        figure.savefig(beside, format="png", dpi=110)
        plt.close(figure)
    os.replace(beside, path)


def draw_text(axes: Axes, result: Result, writing: Writing) -> None:
    """What a model wrote: prompts grey, its own bytes black, in colour from the first that the original has not."""
    is_original = writing is result.writings[0]
    width, height = axes.get_window_extent().transformed(axes.figure.dpi_scale_trans.inverted()).size
    axes.set_xlim(0, width * 72 / (MONO_ADVANCE * MONO_POINTS))
    axes.set_ylim(height * 72 / (MONO_POINTS * 1.3), 0)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.set_facecolor("#fafafa")
    line = 0.8
    for prompt, text, reference in zip(result.prompts, writing.texts, result.writings[0].texts, strict=True):
        text = text.rstrip()
        same = next((i for i, pair in enumerate(zip(text, reference)) if pair[0] != pair[1]), len(text))  # noqa: B905
        column = 0
        for part, colour in ((prompt, GREY), (text[:same], "black"), (text[same:], COLOURS[0])):
            for number, piece in enumerate(part.split("\n")):
                line, column = (line + 1, 0) if number else (line, column)
                axes.text(column + 1, line, piece, color=colour, family="monospace", size=MONO_POINTS, va="center")
                column += len(piece)
        line += 2.2
    name = "transformers: bf16 experts" if is_original else "this package: NVFP4 experts, NVFP4 activations"
    axes.set_title(f"{name}\n", loc="left")
    said = "prompts grey, what the model writes black" if is_original else "blue: where it begins to say something else"
    axes.text(0, 1.02, said, transform=axes.transAxes, color=GREY, fontsize=9)


def draw_speed(axes: Axes, result: Result) -> None:
    """Bytes that `generate` writes in a second of CPU time, one prompt, one thread."""
    for position, writing in enumerate(result.writings):
        axes.bar(position, writing.bytes_per_second, 0.6, color=GREY if position == 0 else COLOURS[0])
        axes.annotate(f"{writing.bytes_per_second:.1f}", (position, writing.bytes_per_second), ha="center", va="bottom")
    names = ["bf16\nmodel", *(f"ours\n{w.name.replace(' ', chr(10))}" for w in result.writings[1:])]
    axes.set_xticks(range(len(names)), names, fontsize=8)
    axes.grid(axis="x", visible=False)
    axes.margins(y=0.12)
    axes.set_ylabel("bytes per second of CPU time")
    axes.set_title("Speed of generate")


def style(row: Row, position: int) -> dict[str, Any]:
    """Colour and marker of a row, the same in every panel; the controls are wrong on purpose and look it."""
    if row.is_control:
        return {"color": CONTROL, "marker": "Xv"[position % 2], "label": f"control: {row.name}"}
    return {"color": COLOURS[position % len(COLOURS)], "marker": "o", "label": row.name}


def draw_loss(axes: Axes, result: Result) -> None:
    """One mark per activation format, the original as a line; what lies far to the right is told at the edge."""
    original, *rows = result.rows
    base, honest = original.nats_per_byte, [row.nats_per_byte for row in rows if not row.is_control]
    left, right = min(base, *honest), max(base, *honest)
    margin = max(right - left, 0.001)
    axes.set_xlim(left - 0.5 * margin, right + 1.5 * margin)
    axes.axvline(base, color=GREY, linestyle="--", linewidth=1)
    above = {"textcoords": "offset points", "va": "center", "fontsize": 9}
    for position, row in enumerate(rows):
        loss, edge = row.nats_per_byte, axes.get_xlim()[1]
        place, text = {"xytext": (9, 0), "ha": "left"}, f"{loss:.4f}"
        if loss > edge - 0.4 * margin:
            place, text = {"xytext": (-9, 0), "ha": "right"}, f"{text} \u2192" if loss > edge else text
        axes.plot(min(loss, edge), position, linestyle="none", markersize=9, clip_on=False, **style(row, position))
        axes.annotate(text, (min(loss, edge), position), **place, **above)
    place = {"xytext": (5, 0), "color": GREY}
    axes.annotate(f"original {base:.4f}", (base, -0.75), **place, **above)
    axes.set_yticks(range(len(rows)), [f"control:\n{row.name}" if row.is_control else row.name for row in rows])
    axes.set_ylim(len(rows) - 0.4, -1.1)
    axes.set_xlabel(f"nats per byte on {result.windows * 256:,} held-out bytes")
    axes.locator_params(axis="x", nbins=5)
    axes.set_title("Loss: lower is better")


def draw_layers(axes: Axes, result: Result, yardstick: str, title: str) -> None:
    """Error of each layer's output by one yardstick, side by side within a layer, logarithmic."""
    rows, layers = result.rows[1:], range(len(result.weight_errors))
    for position, row in enumerate(rows):
        beside = (position - (len(rows) - 1) / 2) * 0.11
        places = [layer + beside for layer in layers]
        axes.plot(places, getattr(row, yardstick), linestyle="none", markersize=7, **style(row, position))
    axes.set_yscale("log")
    axes.set_xticks(layers, [f"layer {layer}" for layer in layers])
    axes.grid(axis="x", visible=False)
    axes.set_ylabel("relative L2 error")
    axes.set_title(title)


def draw_bytes(axes: Axes, result: Result) -> None:
    """Bytes before and after, on disk and in memory."""
    for position, pair in enumerate((result.disk_bytes, result.memory_bytes)):
        for side, (size, colour) in enumerate(zip(pair, (GREY, COLOURS[0]), strict=True)):
            label = ("bf16", "NVFP4")[side] if position == 0 else None
            bar = axes.bar(position + (side - 0.5) * 0.38, size / 2**20, 0.34, color=colour, label=label)
            axes.bar_label(bar, fmt="%.2f", fontsize=9, padding=2)
        axes.annotate(f"{pair[0] / pair[1]:.2f}x", (position + 0.19, pair[1] / 2**20), xytext=(0, 16),
                      textcoords="offset points", ha="center", fontweight="bold", color=COLOURS[0])  # fmt: skip
    axes.set_xticks((0, 1), ("on disk", "in memory"))
    axes.set_ylabel("MiB")
    axes.grid(axis="x", visible=False)
    axes.set_title("Experts' size")
    axes.legend(frameon=False, fontsize=9, loc="upper center", ncols=2)
    axes.set_ylim(0, max(result.disk_bytes) / 2**20 * 1.25)
