# SPDX-License-Identifier: Apache-2.0
"""`nvfp4-experts run`: one shared expert, or a whole block, on hidden states, with timing and statistics."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InputError
from . import render
from .files import check_output, whole_file
from .options import Activations, ActivationScale, AsJson, Backend, Checkpoint, Device, Force, Shared

if TYPE_CHECKING:
    from ..diagnostics.metrics import TensorStatistics
    from ..diagnostics.run import RunReport

NAME = "run"
HELP = "Run a shared expert, or a whole block, on hidden states; report its time and what went in and came out."
EXAMPLE = "Example: [bold]nvfp4-experts run tiny-nvfp4 --layer 3 --random 64 --activations nvfp4[/]"


def command(
    checkpoint: Checkpoint,
    layer: Annotated[int, typer.Option(help="Layer number, from 0.", show_default=False)],
    moe: Annotated[
        bool, typer.Option("--moe", help="The whole block: router, routed experts and shared expert.")
    ] = False,
    shared: Annotated[
        Shared | None,
        typer.Option(
            help="With --moe, of a shared expert in FP8 or floating: quantise it, or keep it as it is stored.",
            show_default="nvfp4",
        ),
    ] = None,
    input: Annotated[
        Path | None, typer.Option(help="Hidden states (…, H): a safetensors file.", show_default=False)
    ] = None,
    tensor: Annotated[
        str | None, typer.Option(help="Which tensor of the --input file, where it holds several.", show_default=False)
    ] = None,
    token_ids: Annotated[
        str | None,
        typer.Option(
            help="With --moe, where a layer routes by token id: the tensor of the --input file that has them."
        ),
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
    if not moe and (shared is not None or token_ids is not None):
        got = "--shared" if shared is not None else "--token-ids"
        raise InputError("run", "takes it with --moe alone", got, "add --moe, or leave it out")
    check_output(output, force)

    import torch
    from safetensors.torch import save

    from ..diagnostics.hidden_states import (
        load_hidden_states,
        load_token_ids,
        synthetic_hidden_states,
        synthetic_token_ids,
    )
    from ..diagnostics.run import load_block, load_layer, run_layer

    x = load_hidden_states(input, tensor) if input is not None else None
    tokens = x.numel() // max(x.shape[-1], 1) if x is not None else random or 0
    options: dict[str, Any] = {
        "max_tokens": max(tokens, 1),
        "device": device,
        "activations": activations,
        "activation_scale": activation_scale,
        "backend": backend,
    }
    if moe:
        loaded = load_block(checkpoint, layer, shared=shared or "nvfp4", **options)
    else:
        loaded = load_layer(checkpoint, layer, **options)
    ids = None
    if input is not None and x is not None and loaded.vocabulary is not None:
        if token_ids is None:
            rule = f"must name the token ids in {input}: layer {layer} routes by them"
            raise InputError("--token-ids", rule, "none", "name that tensor, or try --random")
        ids = load_token_ids(input, token_ids, x, loaded.vocabulary)
    if x is None:
        x = synthetic_hidden_states(tokens, loaded.expert.hidden_size, seed, torch.bfloat16)
        ids = None if loaded.vocabulary is None else synthetic_token_ids(tokens, loaded.vocabulary, seed)
    y, report = run_layer(loaded, x, ids, warmup=warmup, repeat=repeat)
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
    block: dict[str, object] = {}
    if (found := report.block) is not None:
        how = "by token id" if found.by_token_id else "by score"
        block["routed experts"] = (
            f"{found.routed}; {found.top_k} a token {how}, weighted {found.weighting.replace('_', ' ')}; "
            f"{found.experts_hit} of {found.experts} hit"
        )
        runs = {None: None, "kept": "kept, bf16 activations", "nvfp4": "runs in nvfp4"}[found.shared_runs]
        scale = f" ({found.shared_activation_scale} scale)" if found.shared_activation_scale else ""
        block["shared expert"] = f"{found.shared}, {runs}{scale}" if runs else "none"
    out.print(
        render.facts(
            {
                "layer": f"{report.layer} of {report.checkpoint}, H {report.hidden_size}, I {report.intermediate_size}",
                **block,
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
