# SPDX-License-Identifier: Apache-2.0
"""The demo's result as a picture: what NVFP4 costs in loss and per layer, and what it saves in bytes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

if TYPE_CHECKING:
    from examples.demo import Result, Row

# Okabe and Ito's palette: told apart by readers with any colour vision.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9")
CONTROL, GREY = "#D55E00", "#666666"
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
}


def draw(result: Result, path: Path) -> None:
    """Draw the four panels and write them to `path`, whole or not at all."""
    with plt.rc_context(STYLE):
        figure, ((loss, sizes), (original, nvfp4)) = plt.subplots(2, 2, figsize=(11, 7.6), layout="constrained")
        figure.suptitle("A trained DeepSeek-V4-architecture model with its shared experts in NVFP4", fontsize=14)
        draw_loss(loss, result)
        draw_bytes(sizes, result)
        draw_layers(original, result, "against_original", "Layer output against the original weights")
        draw_layers(nvfp4, result, "against_nvfp4", "The activation format alone")
        figure.legend(*original.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
        beside = path.with_name(path.name + ".tmp")
        figure.savefig(beside, format="png", dpi=130)
        plt.close(figure)
    os.replace(beside, path)


def style(row: Row, position: int) -> dict[str, Any]:
    """Colour and marker of a row, the same in every panel; the controls are wrong on purpose and look it."""
    if row.is_control:
        return {"color": CONTROL, "marker": "Xv"[position % 2], "label": f"control: {row.name}"}
    return {"color": COLOURS[position % len(COLOURS)], "marker": "o", "label": row.name}


def draw_loss(axes: Axes, result: Result) -> None:
    """One mark per activation format, the original as a line, the controls in another colour."""
    original, *rows = result.rows
    axes.axvline(original.nats_per_byte, color=GREY, linestyle="--", linewidth=1)
    above = {"textcoords": "offset points", "va": "center", "fontsize": 9}
    for position, row in enumerate(rows):
        axes.plot(row.nats_per_byte, position, linestyle="none", markersize=9, **style(row, position))
        on_the_right = row.nats_per_byte > original.nats_per_byte + 0.05
        place = {"xytext": (-9, 0), "ha": "right"} if on_the_right else {"xytext": (9, 0), "ha": "left"}
        axes.annotate(f"{row.nats_per_byte:.4f}", (row.nats_per_byte, position), **place, **above)
    place = {"xytext": (5, 0), "color": GREY}
    axes.annotate(f"original {original.nats_per_byte:.4f}", (original.nats_per_byte, -0.75), **place, **above)
    axes.set_yticks(range(len(rows)), [f"control:\n{row.name}" if row.is_control else row.name for row in rows])
    axes.set_ylim(len(rows) - 0.4, -1.1)
    axes.margins(x=0.1)
    axes.set_xlabel(f"nats per byte on {result.windows * 256:,} held-out bytes")
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
    axes.set_title("Shared experts' size")
    axes.legend(frameon=False, fontsize=9, loc="upper center", ncols=2)
    axes.set_ylim(0, max(result.disk_bytes) / 2**20 * 1.25)
