# SPDX-License-Identifier: Apache-2.0
"""What the pictures share: colours, style, and a figure with a title that becomes a file, or nothing.

    with figure_file("bench.png", (9, 5.4), "One shared expert") as figure:
        axes = figure.subplots()

Colours of series are Okabe and Ito's, told apart by marker shape as well.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import UnsupportedError

INK, GREY, FAINT, RED = "#222222", "#666666", "#dddddd", "#B22222"
BLUE, ORANGE, GREEN, SKY, PURPLE, VERMILION = "#0072B2", "#E69F00", "#009E73", "#56B4E9", "#CC79A7", "#D55E00"
SMALL = 8.5  # points, of captions and legends

_STYLE = {
    "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": INK,
    "axes.labelcolor": INK, "text.color": INK, "xtick.color": INK, "ytick.color": INK, "axes.axisbelow": True,
    "axes.grid": True, "axes.grid.axis": "y", "grid.color": FAINT, "grid.linewidth": 0.8,
}  # fmt: skip


def check_plotting() -> None:
    """Raise UnsupportedError, naming the extra, if matplotlib is not there; cheap, so ask before long work."""
    if importlib.util.find_spec("matplotlib") is None:
        way_out = "pip install 'nvfp4-experts[plot]', or leave the picture out"
        raise UnsupportedError("picture", "needs matplotlib, which the [plot] extra installs", "no matplotlib", way_out)


@contextmanager
def figure_file(path: str | Path, size: tuple[float, float], title: str) -> Iterator[Any]:
    """Give a matplotlib figure to draw on; write it to `path` at the end, unless an error leaves the block.

    Args:
        path: its suffix chooses the format (.png, .svg, .pdf).
        size: width and height in inches, at 160 dots per inch.
        title: at the top left.

    Raises:
        UnsupportedError: matplotlib is not installed, or the suffix is no format it writes.
    """
    check_plotting()
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        figure = Figure(figsize=size, dpi=160, layout="constrained")
        supported = FigureCanvasAgg(figure).get_supported_filetypes()
        suffix = Path(path).suffix.lstrip(".")
        if suffix not in supported:
            raise UnsupportedError(str(path), f"must end in one of {sorted(supported)}", repr(suffix), "use .png")
        figure.suptitle(title, fontsize=13, fontweight="bold", x=0.008, ha="left")
        yield figure
        figure.savefig(path)
