# SPDX-License-Identifier: Apache-2.0
"""`nvfp4-experts verify`: how far a checkpoint is from the one it was made from, or a backend from Blackwell's sums."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from ..errors import InputError
from . import render
from .blocks import print_blocks
from .exactness import print_exactness
from .files import check_outputs, whole_file
from .options import AsJson, Backend, Checkpoint, Device, Experts, Force, Layers, Recipe, Shared

if TYPE_CHECKING:
    from ..diagnostics.exactness import ExactnessReport
    from ..diagnostics.verify import ExpertVerification, OutputError, VerificationReport

NAME = "verify"
HELP = (
    "Compare a checkpoint with its original: weights, outputs in each activation format, and bits where promised; "
    "or a backend, on its layers, with what Blackwell's FP4 tensor core computes."
)
EXAMPLE = "Example: [bold]nvfp4-experts verify tiny-nvfp4 --against tiny-bf16 --picture verify.png[/]"

DEFAULT_MAX_ERROR = 0.25
DEFAULT_MIN_EQUAL = 0.99


def command(
    checkpoint: Checkpoint,
    against: Annotated[
        str | None,
        typer.Option(metavar="ORIGINAL", help="What CKPT was made from: directory or Hub id.", show_default=False),
    ] = None,
    exact: Annotated[
        bool,
        typer.Option("--exact", help="Instead: --backend against backend exact, bit for bit, with nvfp4 activations."),
    ] = False,
    layer: Layers = None,
    moe: Annotated[
        bool,
        typer.Option("--moe", help="Compare whole blocks instead: routes, and outputs of all experts together."),
    ] = False,
    shared: Annotated[
        Shared | None,
        typer.Option(help="With --moe: how CKPT's shared experts run, see `run`.", show_default="nvfp4"),
    ] = None,
    experts: Annotated[Experts, typer.Option(help="Which experts to compare.")] = "shared",
    sample: Annotated[
        int | None, typer.Option(min=1, help="At most so many routed experts per layer.", show_default="all")
    ] = None,
    input: Annotated[
        Path | None, typer.Option(help="Hidden states (…, H): a safetensors file.", show_default="synthetic")
    ] = None,
    tensor: Annotated[
        str | None, typer.Option(help="Which tensor of the --input file, where it holds several.", show_default=False)
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Without --input: so many rows of N(0, 1).")] = 64,
    seed: Annotated[int, typer.Option(help="Seed of the synthetic rows.")] = 0,
    recipe: Annotated[
        Recipe | None,
        typer.Option(help="Demand the very bits that this recipe makes of ORIGINAL.", show_default="none demanded"),
    ] = None,
    max_error: Annotated[
        float,
        typer.Option(min=0.0, help="Largest rel-L2 of an expert's bf16-activation output against ORIGINAL's weights."),
    ] = DEFAULT_MAX_ERROR,
    min_equal: Annotated[
        float,
        typer.Option(min=0.0, max=1.0, help="With --exact: share of an expert's bf16 outputs that must be bit-equal."),
    ] = DEFAULT_MIN_EQUAL,
    report: Annotated[
        Path | None, typer.Option(help="Write the report as JSON to this file.", show_default=False)
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(help="Draw the report into this file: .png, .svg or .pdf.", show_default=False)
    ] = None,
    device: Device = "cpu",
    backend: Backend = "auto",
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    check_outputs({"--report": report, "--picture": picture}, force)
    if exact == (against is not None):
        got = "both" if exact else "neither"
        raise InputError("verify", "takes --against ORIGINAL or --exact", got, "ask one question at a time")
    if exact and (recipe is not None or picture is not None):
        got = "--recipe" if picture is None else "--picture"
        raise InputError("verify --exact", "compares a backend's outputs, and draws nothing", got, "leave it out")

    if moe:
        _check_moe({"--exact": exact, "--recipe": recipe, "--picture": picture, "--sample": sample,
            "--experts": experts != "shared"})  # fmt: skip
    elif shared is not None:
        raise InputError("--shared", "goes with --moe", "no --moe", "add it")

    from ..diagnostics.exactness import verify_exact
    from ..diagnostics.hidden_states import load_hidden_states
    from ..diagnostics.picture import draw
    from ..diagnostics.plotting import check_plotting
    from ..diagnostics.verify import VerificationReport, verify_checkpoint
    from ..diagnostics.verify_blocks import BlocksReport, verify_blocks

    if picture is not None:
        check_plotting()
    common: dict[str, Any] = {
        "layers": layer or None,
        "hidden_states": load_hidden_states(input, tensor) if input else None,
        "tokens": tokens,
        "seed": seed,
        "device": device,
        "backend": backend,
    }
    selected: dict[str, Any] = {"experts": experts, "sample": sample}
    found: VerificationReport | ExactnessReport | BlocksReport
    with render.progress(as_json, in_bytes=False) as progress:
        common["progress"] = progress
        if against is None:
            found = verify_exact(checkpoint, **common, **selected, min_equal=min_equal)
        elif moe:
            found = verify_blocks(checkpoint, against, **common, shared=shared or "nvfp4", max_error=max_error)
        else:
            found = verify_checkpoint(checkpoint, against, **common, **selected, recipe=recipe, max_error=max_error)
    if input is not None:
        found = replace(found, hidden_states=str(input))
    if report is not None:
        with whole_file(report) as partial:
            partial.write_text(render.json_text(found.to_dict()) + "\n")
    if picture is not None and isinstance(found, VerificationReport):
        with whole_file(picture) as partial:
            draw(found, partial)
    if as_json:
        render.print_json(found.to_dict())
    elif isinstance(found, VerificationReport):
        _print(found)
    elif isinstance(found, BlocksReport):
        print_blocks(found)
    else:
        print_exactness(found)
    if not found.passed:
        raise typer.Exit(1)


def _check_moe(options: dict[str, object]) -> None:
    """--moe compares all experts of a layer together: what chooses among them, or draws them, has no place there."""
    if given := [name for name, value in options.items() if value]:
        raise InputError("verify --moe", "compares the outputs of whole blocks", given[0], "leave it out")


def _print(report: VerificationReport) -> None:
    out = render.console()
    out.print(
        render.facts(
            {
                "checkpoint": report.checkpoint,
                "original": report.original,
                "hidden states": f"{report.tokens} tokens ({report.hidden_states})",
            }
        )
    )
    _print_weights(out, report.experts)
    _print_outputs(out, report)
    _print_verdict(out, report)


def _print_weights(out: Console, experts: list[ExpertVerification]) -> None:
    table = render.table("weights", ("expert", "projection", "format", "bits"), ("rel-L2", "max", "SQNR dB"))
    for expert in experts:
        promises = {check.projection: check for check in expert.bits}
        for i, weight in enumerate(expert.weights):
            promise = promises.get(weight.projection)
            verdict = "–" if promise is None else promise.promise
            if promise and promise.mismatch:
                verdict = f"[red]not {verdict}[/]"
            elif promise:
                verdict = f"[green]{verdict}[/]"
            table.add_row(
                "" if i else expert.name,
                weight.projection,
                weight.format
                if weight.format == weight.original_format
                else f"{weight.original_format} → {weight.format}",
                verdict,
                render.number(weight.error.rel_l2),
                render.number(weight.error.max_error),
                render.number(weight.error.sqnr_db),
            )
    out.print(table)


def _print_outputs(out: Console, report: VerificationReport) -> None:
    """rel-L2 of the outputs: experts down, activation formats across."""
    labels = list(dict.fromkeys(output.label for expert in report.experts for output in expert.outputs))
    lost = render.table("outputs against the original weights, rel-L2", ("expert",), ("exact math", *labels))
    cost = render.table("outputs against the same weights in exact math, rel-L2", ("expert",), labels)
    for expert in report.experts:
        found = {output.label: output for output in expert.outputs}
        past = not expert.bound_figure.within(report.max_error)
        lost.add_row(
            expert.name,
            render.number(expert.exact.rel_l2),
            *(_cell(found.get(label), "against_original", past and label == "bf16") for label in labels),
        )
        cost.add_row(expert.name, *(_cell(found.get(label), "against_own_weights", False) for label in labels))
    out.print(lost)
    if labels:
        out.print(cost)


def _cell(output: OutputError | None, side: str, past: bool) -> str:
    text = "–" if output is None else render.number(getattr(output, side).rel_l2)
    return f"[bold red]{text}[/]" if past else text


def _print_verdict(out: Console, report: VerificationReport) -> None:
    for expert in report.experts:
        for check in expert.broken_promises:
            out.print(f"{expert.name} {check.projection}, {check.promise}: {check.mismatch}", style="red", markup=False)
        for hint in expert.hints:
            out.print(f"{expert.name}: {hint}", style="yellow", markup=False)
    if report.passed:
        out.print(f"[bold green]passed[/]: every expert within {report.max_error:g}")
        return
    out.print(
        f"[bold red]failed[/]: {len(report.offenders)} of {len(report.experts)} experts past {report.max_error:g}, "
        "or with other bits than promised:"
    )
    for expert in report.offenders:
        bits = ", other bits than promised" if expert.broken_promises else ""
        out.print(f"    {expert.name}: {render.number(expert.bound_figure.rel_l2)}{bits}")
