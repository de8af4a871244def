# SPDX-License-Identifier: Apache-2.0
"""`nvfp4-experts inspect`: what is in a checkpoint, and what is wrong with it; or what this machine can run."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..errors import InputError
from . import render
from .options import AsJson, Layers

if TYPE_CHECKING:
    from ..diagnostics.anomalies import Anomaly
    from ..diagnostics.blocks import BlockFormats
    from ..diagnostics.capabilities import Ability, Capabilities
    from ..diagnostics.inspect import Group, InspectionReport

NAME = "inspect"
HELP = "Show what is in a checkpoint: formats, sizes, scale ranges and every anomaly; or what this machine can run."
EXAMPLE = "Example: [bold]nvfp4-experts inspect tiny-nvfp4 --strict[/]"

_PLACES_SHOWN = 3


def command(
    checkpoint: Annotated[
        str | None,
        typer.Argument(metavar="[CKPT]", help="Checkpoint directory, .safetensors file or Hub id.", show_default=False),
    ] = None,
    machine: Annotated[
        bool, typer.Option("--machine", help="Show what this machine can run, and why not more, instead.")
    ] = False,
    layer: Layers = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit 1 for warnings too, not for errors alone.")] = False,
    as_json: AsJson = False,
) -> None:
    if (checkpoint is None) != machine:
        got = "neither" if checkpoint is None else "both"
        raise InputError("inspect", "takes a checkpoint or --machine", got, "give one of them")
    if checkpoint is None:
        from ..diagnostics.capabilities import describe_capabilities

        found = describe_capabilities()
        render.print_json(found.to_dict()) if as_json else _print_machine(found)
        return
    from ..diagnostics.inspect import inspect_checkpoint

    with render.progress(as_json, in_bytes=False) as progress:
        report = inspect_checkpoint(checkpoint, layers=layer or None, progress=progress)
    if as_json:
        render.print_json(report.to_dict())
    else:
        _print(report)
    if report.count("error") or (strict and report.count("warning")):
        raise typer.Exit(1)


def _print_machine(found: Capabilities) -> None:
    out = render.console()
    kernel = found.library or f"none: {found.library_reason}"
    rows = {"CPU": found.cpu, "threads": found.threads, "GPU": found.gpu or "none that torch sees"}
    software = {"software": f"nvfp4-experts {found.version}, torch {found.torch}", "CPU kernel": kernel}
    out.print(render.facts({**rows, **software, "its tier": found.tier or found.tier_reason}))
    out.print(_abilities("Backends", found.backends))
    if found.tiers:
        out.print(_abilities("Tiers of the CPU kernel, best first", found.tiers))


def _abilities(title: str, abilities: tuple[Ability, ...]) -> Table:
    table = render.table(title, ("name", "on", "runs here"), ())
    for ability in abilities:
        outcome = Text("yes", "green") if ability.reason is None else Text(f"no: {ability.reason}")
        outcome.append(f": {ability.note}" if ability.note else "", "default")
        table.add_row(ability.name, ability.where or "cpu", outcome)
    return table


def _print(report: InspectionReport) -> None:
    out = render.console()
    if report.dialect is not None:
        dtypes = " · ".join(f"{name} {render.size(count)}" for name, count in report.dtypes.items())
        out.print(
            render.facts(
                {
                    "checkpoint": report.path,
                    "dialect": report.dialect,
                    "size": f"{render.size(report.nbytes)} in {report.tensors} tensors, {report.shards} shard(s); "
                    f"experts {render.size(report.expert_bytes)}",
                    "dtypes": dtypes,
                    "swiglu limit": "off" if report.swiglu_limit is None else f"{report.swiglu_limit:g}",
                }
            )
        )
        _print_groups(out, report.groups)
        _print_blocks(out, report.blocks)
    _print_anomalies(out, report.anomalies)


def _print_groups(out: Console, groups: list[Group]) -> None:
    table = render.table(
        "",
        ("layer", "experts", "format", "shapes", "block scales", "global scale"),
        ("bytes", "bits", "static"),
    )
    for group in groups:
        name = group.kind if group.kind == "shared" else f"{group.experts} routed"
        if len(group.projections) < 3:
            name += f" ({', '.join(group.projections)})"
        modules = group.experts * len(group.projections)
        table.add_row(
            str(group.layer),
            name,
            group.format,
            ", ".join(f"{rows}x{columns}" for rows, columns in group.shapes),
            render.span(group.scale_min, group.scale_max),
            render.span(group.global_scale_min, group.global_scale_max, digits=2),
            render.size(group.nbytes),
            f"{group.bits_per_weight:.3g}",
            f"{group.input_scales}/{modules}" if group.format == "nvfp4" else "–",
        )
    out.print(table)


def _print_blocks(out: Console, blocks: list[BlockFormats]) -> None:
    """One line for layers in a row that are alike."""
    columns = ("layers", "routed experts", "shared expert", "with --shared nvfp4", "with --shared keep")
    table = render.table("what is stored, and what loading makes of it", columns, ())
    for _, alike in groupby(blocks, key=lambda block: (block.is_mtp, block.formats)):
        first, *rest = alike
        layers = f"{first.layer}…{rest[-1].layer}" if rest else f"{first.layer}"
        table.add_row(f"mtp {layers}" if first.is_mtp else layers, *(text or "–" for text in first.formats))
    if blocks:
        out.print(table)


def _print_anomalies(out: Console, anomalies: list[Anomaly]) -> None:
    if not anomalies:
        out.print("[green]no anomalies[/]")
        return
    together: dict[str, list[Anomaly]] = {}
    for anomaly in anomalies:
        together.setdefault(anomaly.name, []).append(anomaly)
    for name, found in together.items():
        style = render.SEVERITY_STYLE[found[0].severity]
        out.print(f"[{style}]{found[0].severity}[/] [bold]{name}[/] ×{len(found)}")
        for anomaly in found[:_PLACES_SHOWN]:
            out.print(f"    {anomaly.where}: {anomaly.message}", markup=False)
        if len(found) > _PLACES_SHOWN:
            out.print(f"    … and {len(found) - _PLACES_SHOWN} more; --json lists all")
        out.print(f"    way out: {found[0].way_out}", markup=False, style="dim")
