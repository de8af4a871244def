# SPDX-License-Identifier: Apache-2.0
"""How `verify --moe` reports: blocks down, activation formats across."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import render

if TYPE_CHECKING:
    from ..diagnostics.verify_blocks import BlocksReport


def print_blocks(report: BlocksReport) -> None:
    """Print a report as tables and a verdict."""
    out = render.console()
    out.print(
        render.facts(
            {
                "checkpoint": f"{report.checkpoint}, shared experts: {report.shared}",
                "original": report.original,
                "hidden states": f"{report.tokens} tokens ({report.hidden_states})",
            }
        )
    )
    labels = list(dict.fromkeys(output.label for block in report.blocks for output in block.outputs))
    lost = render.table("blocks against the original, rel-L2", ("layer",), ("same routes", "exact math", *labels))
    cost = render.table("blocks against the same weights in exact math, rel-L2", ("layer",), labels)
    for block in report.blocks:
        found = {output.label: output for output in block.outputs}
        outputs = [found.get(label) for label in labels]
        routes = f"{block.same_routes:.4g}"
        lost.add_row(
            str(block.layer),
            routes if block.same_routes == 1 else f"[bold red]{routes}[/]",
            render.number(block.exact.rel_l2),
            *("–" if o is None else render.number(o.against_original.rel_l2) for o in outputs),
        )
        cost.add_row(
            str(block.layer), *("–" if o is None else render.number(o.against_own_weights.rel_l2) for o in outputs)
        )
    out.print(lost)
    out.print(cost)
    if report.passed:
        out.print(f"[bold green]passed[/]: every block within {report.max_error:g}")
        return
    wrong = [block for block in report.blocks if not block.within(report.max_error)]
    out.print(
        f"[bold red]failed[/]: {len(wrong)} of {len(report.blocks)} blocks past {report.max_error:g} or misrouted:"
    )
    for block in wrong:
        out.print(
            f"    layer {block.layer}: {render.number(block.bound_figure.rel_l2)}, routes {block.same_routes:.4g}"
        )
