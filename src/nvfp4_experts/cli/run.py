# SPDX-License-Identifier: Apache-2.0
"""`nvfp4-experts run`: one shared expert on hidden states, with timing and statistics."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import InputError
from . import render
from .files import check_output, whole_file
from .options import Activations, ActivationScale, AsJson, Backend, Checkpoint, Device, Force

if TYPE_CHECKING:
    from ..diagnostics.metrics import TensorStatistics
    from ..diagnostics.run import RunReport

NAME = "run"
HELP = "Run one shared expert on hidden states, and report its time and what went in and came out."
EXAMPLE = "Example: [bold]nvfp4-experts run tiny-nvfp4 --layer 3 --random 64 --activations nvfp4[/]"


def command(
    checkpoint: Checkpoint,
    layer: Annotated[int, typer.Option(help="Layer number, from 0.", show_default=False)],
    input: Annotated[
        Path | None, typer.Option(help="Hidden states (…, H): a safetensors file.", show_default=False)
    ] = None,
    tensor: Annotated[
        str | None, typer.Option(help="Which tensor of the --input file, where it holds several.", show_default=False)
    ] = None,
    random: Annotated[
        int | None, typer.Option(min=0, help="Instead of --input: so many rows of N(0, 1), bf16.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of --random.")] = 0,
    activations: Annotated[
        Activations, typer.Option(help="What enters each GEMM; auto is nvfp4 on FP4 hardware, else bf16.")
    ] = "auto",
    activation_scale: Annotated[
        ActivationScale | None,
        typer.Option(
            help="Where nvfp4 activations get their global scale.",
            show_default="static if the checkpoint has input scales, else dynamic",
        ),
    ] = None,
    device: Device = "cpu",
    backend: Backend = "auto",
    warmup: Annotated[int, typer.Option(min=0, help="Calls before timing starts.")] = 1,
    repeat: Annotated[int, typer.Option(min=1, help="Calls timed.")] = 5,
    output: Annotated[
        Path | None, typer.Option(help='Write the result to this safetensors file, as tensor "y".', show_default=False)
    ] = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    if (input is None) == (random is None):
        got = "both" if input is not None else "neither"
        raise InputError("hidden states", "must come from one of --input and --random", got, "try --random 64")
    check_output(output, force)

    import torch
    from safetensors.torch import save

    from ..diagnostics.hidden_states import load_hidden_states, synthetic_hidden_states
    from ..diagnostics.run import load_layer, run_layer

    x = load_hidden_states(input, tensor) if input is not None else None
    tokens = x.numel() // max(x.shape[-1], 1) if x is not None else random or 0
    loaded = load_layer(
        checkpoint,
        layer,
        max_tokens=max(tokens, 1),
        device=device,
        activations=activations,
        activation_scale=activation_scale,
        backend=backend,
    )
    if x is None:
        x = synthetic_hidden_states(tokens, loaded.expert.hidden_size, seed, torch.bfloat16)
    y, report = run_layer(loaded, x, warmup=warmup, repeat=repeat)
    if output is not None:
        with whole_file(output) as partial:
            partial.write_bytes(save({"y": y.cpu().contiguous()}))
    if as_json:
        render.print_json({**report.to_dict(), "saved": str(output) if output else None})
    else:
        _print(report, output)


def _print(report: RunReport, output: Path | None) -> None:
    mode = f"{report.activations} ({report.activation_scale} scale)" if report.activation_scale else report.activations
    converted = "" if report.stored == ("nvfp4",) else f"quantised from {', '.join(report.stored)} on loading, "
    out = render.console()
    out.print(
        render.facts(
            {
                "layer": f"{report.layer} of {report.checkpoint}, H {report.hidden_size}, I {report.intermediate_size}",
                "activations": mode,
                "swiglu limit": f"{report.swiglu_limit:g}" if report.swiglu_limit else "off",
                "runs on": f"{report.device}, backend {report.backend}",
                "weights": f"{converted}{render.size(report.resident_bytes)} resident",
                "loading": f"{report.load_seconds:.2f} s",
                "time": f"{report.median_ms:.3g} ms median, {report.min_ms:.3g} ms best of {report.calls} calls, "
                f"{report.tokens} tokens",
                "saved": output,
            }
        )
    )
    table = render.table("", ("tensor", "shape"), ("rms", "amax", "NaN", "inf"))
    for name, seen in (("input", report.input), ("output", report.output)):
        table.add_row(*_row(name, seen))
    out.print(table)


def _row(name: str, seen: TensorStatistics) -> list[str]:
    counts = [f"[bold red]{count}[/]" if count else "0" for count in (seen.nan_count, seen.inf_count)]
    return [name, str(seen.shape), render.number(seen.rms), render.number(seen.amax), *counts]
