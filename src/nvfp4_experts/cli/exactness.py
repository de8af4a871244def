# SPDX-License-Identifier: Apache-2.0
"""How a comparison with the sums of Blackwell's FP4 tensor core looks: `verify --exact`, `bench --report`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import render

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.table import Table

    from ..diagnostics.bits import BitComparison
    from ..diagnostics.exactness import Exactness, ExactnessReport

_NAMED = ("1", "2", "3–4")  # distances in ulp with a column of their own; larger ones share one


def print_exactness(report: ExactnessReport) -> None:
    """Facts, the table, the first mismatches, the verdict."""
    out = render.console()
    backends = dict.fromkeys(mode.backend for expert in report.experts for mode in expert.modes)
    out.print(
        render.facts(
            {
                "checkpoint": report.checkpoint,
                "compared": f"backend {', '.join(backends)} on {report.device}, with nvfp4 activations",
                "with": f"backend exact ({report.form}): the sums of Blackwell's FP4 tensor core, by a published model",
                "hidden states": report.hidden_states,
            }
        )
    )
    rows = [(expert.name, mode) for expert in report.experts for mode in expert.modes]
    out.print(exactness_table(rows))
    for name, mode in rows:
        if text := first_mismatch(mode):
            out.print(f"{name}, {mode.activation_scale}: {text}", markup=False, style="dim")
    if report.passed:
        out.print(f"[bold green]passed[/]: {percent(report.min_equal)} or more of each expert's bf16 outputs are equal")
    else:
        names = ", ".join(report.offenders)
        out.print(f"[bold red]failed[/]: under {percent(report.min_equal)} of the bf16 outputs equal: {names}")


def exactness_table(rows: Iterable[tuple[str, Exactness]]) -> Table:
    """One line per name, activation scale mode and output dtype: the share that is equal, the others by distance."""
    numbers = ("tokens with other h", "bit-equal", "1 ulp", *_NAMED[1:], "more", "NaN")
    table = render.table("nvfp4 outputs, bit for bit", ("what", "activation scale", "output"), numbers)
    for name, mode in rows:
        for i, output in enumerate(mode.outputs):
            table.add_row(
                "" if i else name,
                "" if i else mode.activation_scale,
                output.dtype,
                "" if i else f"{mode.tokens_with_other_h} of {mode.tokens}",
                _equal(output),
                *_distances(output),
            )
    return table


def first_mismatch(mode: Exactness) -> str | None:
    """The first output that differs, in words; of bf16 if one does, else of fp32."""
    for output, stage in zip(mode.outputs, mode.stages, strict=True):
        if (first := output.first) is not None:
            ulp = "NaN" if first.ulp is None else f"{first.ulp} ulp"
            return (
                f"first {output.dtype} mismatch at token {first.token}, channel {first.channel}: {first.got:.9g}, "
                f"exact {first.expected:.9g} ({ulp}); that token first differs in {stage}"
            )
    return None


def _equal(output: BitComparison) -> str:
    style = "green" if output.equal == output.values else "yellow"
    return f"[{style}]{percent(output.share)}[/]"


def _distances(output: BitComparison) -> list[str]:
    shown = [output.histogram.get(name, 0) for name in _NAMED]
    nan = output.histogram.get("NaN", 0)
    more = output.values - output.equal - sum(shown) - nan
    return [str(count or "–") for count in (*shown, more, nan)]


def percent(share: float) -> str:
    """Never rounded up to 100 %."""
    return f"{int(share * 1e6) / 1e4:g} %"
